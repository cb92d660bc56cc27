"""What a part says to the driver: one JSON object a line, in the file ``running.jsonl`` of the folder of results.

A line holds one of ``fact`` (a dictionary), ``headline`` (name to number), ``result`` (what was measured or compared)
and ``outcome`` (the last line). Each is written at once: a part that is killed loses what it had not found yet.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LINES, JUNIT = "running.jsonl", "junit.xml"


class Failed(Exception):
    """A part, or a case of it, that failed, in words."""


class Skipped(Exception):
    """A part, or a case of it, that was left out, and why."""


class Measured(NamedTuple):
    """Seconds of one call, over several: 20 %, median, 80 %."""

    p20: float
    p50: float
    p80: float


class Report:
    """What a part has found so far, and how long it may take."""

    def __init__(self, folder: Path, seconds: float, rehearse: bool) -> None:
        self.folder, self.lines = folder, folder / LINES
        self.rehearse, self.end = rehearse, time.monotonic() + seconds
        self.cases, self.failures = 0, list[str]()

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def _write(self, **line: Any) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def fact(self, **facts: Any) -> None:
        self._write(fact=facts)
        for name, value in facts.items():
            print(f"   {name}: {value}", flush=True)

    def headline(self, name: str, value: float) -> None:
        self._write(headline={name: value})
        print(f"   {name}: {value:.4g}", flush=True)

    def result(self, name: str, **found: Any) -> None:
        self._write(result={"name": name, **found})

    def measured(self, name: str, seconds: Measured, **more: Any) -> float:
        """Notes a time; its median."""
        self.result(name, seconds=seconds._asdict(), **more)
        print(f"   {name}: {seconds.p50 * 1e6:.1f} µs", flush=True)
        return seconds.p50

    def outcome(self, outcome: str) -> None:
        self._write(outcome=outcome)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One of several things that a part looks at: where it fails, the others are still looked at."""
        self.cases += 1
        try:
            yield
        except Skipped as skipped:
            self.result(name, skipped=str(skipped))
            print(f"   {name}: left out, {skipped}", flush=True)
        except Exception as error:
            why = in_words(error)
            print(f"   {name}: {why}", flush=True)
            self.result(name, failed=why)
            self.failures.append(f"{name}: {why}")
            if not isinstance(error, Failed):
                traceback.print_exc()
                self._require_device(f"{name}: {why}")

    def _require_device(self, why: str) -> None:
        """An illegal access leaves a CUDA context in which nothing works any more: the others would only repeat it."""
        torch = sys.modules.get("torch")
        if torch is None or self.rehearse:
            return
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Failed(f"{why}; CUDA is of no use after it ({in_words(error)})") from error

    def conclude(self) -> None:
        """Failed where a case failed."""
        if self.failures:
            raise Failed(f"{len(self.failures)} of {self.cases} cases; the first, {self.failures[0]}")


def in_words(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, (Failed, Skipped)):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def replace(path: Path, text: str) -> None:
    """Writes a file anew: whoever reads it, or kills us, finds it old or new, and whole."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, "utf-8")
    new.replace(path)


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of the running part; the last may be torn where it was killed."""
    path = folder / LINES
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
