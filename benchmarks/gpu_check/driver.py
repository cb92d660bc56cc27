"""Runs the parts, each for as long as its budget allows, and writes what they found after each of them.

Nothing but Python's library is imported here: what takes a part along, a lost CUDA context or a crash, leaves this
process and the results so far as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import groups, reporting
from .groups import ROOT
from .part import PARTS
from .reporting import JUNIT, LINES, replace

LIMIT = 540.0  # seconds for all parts: ten minutes, less what starting and ending them takes
RESULTS = ROOT / "benchmarks" / "results"
FOUND, LOG, RUNNING_LOG = "gpu-check.json", "gpu-check.log", "running.log"
LONGEST_LOG = 500_000  # bytes that are kept of one part's output

Command = Callable[[str, float], Sequence[str]]


class Check:
    """One run of parts. ``found`` is what the JSON file in ``folder`` holds; ``keep``: a folder that gets a copy of it
    where there is a GPU. ``command(name, seconds)`` starts a part."""

    def __init__(
        self,
        folder: Path,
        rehearse: bool,
        limit: float = LIMIT,
        keep: Path | None = None,
        budgets: dict[str, float] | None = None,
        command: Command | None = None,
    ) -> None:
        self.folder, self.rehearse, self.limit, self.keep = folder, rehearse, limit, keep
        self.budgets = {n: part.budget for n, part in PARTS.items()} if budgets is None else budgets
        self.command = self._command if command is None else command
        self.since = time.monotonic()
        self.stopping = ""  # why no part may go on
        self.device_before: str | None = None  # that of the results in the folder
        self.found: dict[str, Any] = {
            "device": None, "date": now(), "commit": commit(), "rehearsal": rehearse, "facts": {}, "parts": {},
        }  # fmt: skip

    def _command(self, name: str, seconds: float) -> list[str]:
        part = [sys.executable, "-m", f"{__package__}.part", name, "--out", str(self.folder)]
        return [*part, "--seconds", f"{seconds:.1f}", *(["--rehearse"] if self.rehearse else [])]

    def run(self, only: Sequence[str] = (), without: Sequence[str] = ()) -> int:
        """Runs all parts, or ``only`` some, whose results are merged into those in the folder. The exit status: 0 where
        nothing failed, 130 where a signal stopped it."""
        self.since = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        if only:
            self.take_up()
        else:
            for name in (FOUND, LOG, JUNIT):
                (self.folder / name).unlink(missing_ok=True)
        wanted = [name for name in self.budgets if (not only or name in ("facts", *only)) and name not in without]
        reason = ""
        for name in wanted:
            if self.seconds_left < min(3.0, self.budgets[name]):
                reason = reason or f"the {self.limit:.0f} s of --limit were over"
            reason = reason or self.stopping
            if reason:
                self.note(name, f"failed: not started, {reason}", 0.0, [])
                continue
            outcome = self.part(name)
            if name == "build" and outcome != "passed" and not self.stopping and not self.importable():
                reason = "the build failed, and there is no extension to import"
        bad = [name for name in wanted if self.found["parts"][name]["outcome"].startswith("failed")]
        seconds = time.monotonic() - self.since
        summary = (
            f"\n{self.table(wanted)}\n\n{'FAILED: ' + ', '.join(bad) if bad else 'nothing failed'} ({seconds:.0f} s)\n"
        )
        replace(self.folder / LOG, (self.folder / LOG).read_text("utf-8") + summary)
        self.say(f"\nWritten to {self.folder}\n{summary}")
        return 130 if self.stopping else int(bool(bad))

    def stop(self, number: int, _: Any = None) -> None:
        """For signals: the running part ends, what there is gets written, and no other part starts."""
        self.stopping = f"stopped by {signal.Signals(number).name}"

    @property
    def seconds_left(self) -> float:
        return self.limit - (time.monotonic() - self.since)

    def take_up(self) -> None:
        """Starts from the results in the folder."""
        path = self.folder / FOUND
        if path.exists():
            before = json.loads(path.read_text())
            kinds = {True: "a rehearsal", False: "a GPU"}
            self._require_same(kinds[before["rehearsal"]], kinds[self.rehearse])
            self.found |= {name: before[name] for name in ("facts", "parts")}
            self.device_before = before["device"]

    def _require_same(self, before: str | None, here: str | None) -> None:
        if before is not None and here != before:
            sys.exit(f"--out: {self.folder} has results of {before}, and this is {here}: give another folder")

    # ---- one part ----

    def part(self, name: str) -> str:
        """Runs a part, and writes what it found; its outcome."""
        self.say(f"\n== {name}\n")
        (self.folder / LINES).unlink(missing_ok=True)
        seconds, since = min(self.budgets[name], self.seconds_left), time.monotonic()
        tag, log = f"{os.getpid()}.{time.monotonic_ns()}", self.folder / RUNNING_LOG
        echo = groups.Echo(log)
        with log.open("wb") as output:
            ended = groups.run(
                self.command(name, seconds), seconds, output, tag=tag, enough=lambda: echo() or self.stopping
            )
        echo()
        lines, took = reporting.read(self.folder), time.monotonic() - since
        outcome = self.outcome(name, ended, seconds, lines)
        self.say(f"   {outcome} ({took:.1f} s)\n")
        self.note(name, outcome, took, lines)
        return outcome

    def outcome(self, name: str, ended: groups.Ended, seconds: float, lines: list[dict[str, Any]]) -> str:
        """What the part says of itself, or why it could not."""
        said = [line["outcome"] for line in lines if "outcome" in line]
        if self.stopping:
            return f"failed: {self.stopping}"
        if ended.late:
            whose = "its budget" if seconds == self.budgets[name] else f"the {self.limit:.0f} s of --limit"
            return f"failed: stopped after {seconds:.0f} s, the end of {whose}"
        if said and ended.status == 0:
            return str(said[-1])
        if ended.status < 0:
            return f"failed: ended by {signal.Signals(-ended.status).name}"
        return f"failed: ended with status {ended.status}, and said no outcome"

    def importable(self) -> bool:
        """Whether there is an extension to go on with, be it without CUDA."""
        with open(os.devnull, "wb") as output:
            command = [sys.executable, "-c", "import scoresde_ext"]
            return groups.run(command, 30, output, enough=lambda: self.stopping).status == 0

    # ---- what is printed and written ----

    def say(self, text: str) -> None:
        print(text, end="" if text.endswith("\n") else "\n", flush=True)

    def note(self, name: str, outcome: str, took: float, lines: list[dict[str, Any]]) -> None:
        """Takes a part into the results, and writes JSON and log."""
        headline: dict[str, float] = {}
        for line in lines:
            headline |= line.get("headline", {})
            self.found["facts"] |= line.get("fact", {})
        self.found["parts"][name] = {
            "outcome": outcome, "date": now(), "commit": self.found["commit"], "seconds": round(took, 2),
            "budget": self.budgets[name], "headline": headline,
            "results": [line["result"] for line in lines if "result" in line],
        }  # fmt: skip
        facts = self.found["facts"]
        self.found["device"] = facts.get("processor") if self.rehearse else facts.get("gpu", facts.get("torch_gpu"))
        if name == "facts":
            self._require_same(self.device_before, self.found["device"])
        self.write()
        self.write_log(name, outcome, took)

    def write(self) -> None:
        text = json.dumps(self.found, indent=1) + "\n"
        replace(self.folder / FOUND, text)
        if self.keep is not None and not self.rehearse and self.found["device"]:
            device = re.sub(r"[^a-z0-9]+", "-", self.found["device"].lower()).strip("-")
            replace(self.keep / f"gpu-{device}-{self.found['date'][:10]}.json", text)

    def write_log(self, name: str, outcome: str, took: float) -> None:
        log, running = self.folder / LOG, self.folder / RUNNING_LOG
        output = running.read_bytes().decode(errors="replace") if running.exists() else ""
        if len(output) > LONGEST_LOG:
            half = LONGEST_LOG // 2
            output = f"{output[:half]}\n... {len(output) - 2 * half} characters are left out ...\n{output[-half:]}"
        earlier = log.read_text("utf-8") if log.exists() else ""
        replace(log, f"{earlier}\n== {name}, {now()}\n{output.rstrip()}\n   {outcome} ({took:.1f} s)\n")
        for file in (running, self.folder / LINES):
            file.unlink(missing_ok=True)

    def table(self, names: Sequence[str]) -> str:
        parts = {name: self.found["parts"][name] for name in names}
        lines = [f"{name:<10}{part['seconds']:6.1f} s  {part['outcome']}" for name, part in parts.items()]
        headline = {name: value for part in parts.values() for name, value in part["headline"].items()}
        width = max(map(len, headline), default=0)
        return "\n".join([*lines, "", *(f"{name:<{width}} {value:10.4g}" for name, value in headline.items())])


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """None in a copy without git. (git asks for ``safe.directory`` in a checkout that another user owns.)"""
    git = ["git", "-c", f"safe.directory={ROOT}", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return found.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Build, test, sanitize and measure on a GPU."
    )
    parser.add_argument("--rehearse", action="store_true", help="what a CPU can run, on small sizes")
    parser.add_argument(
        "--part", action="append", default=[], choices=PARTS, help="run this one, and merge (repeatable)"
    )
    parser.add_argument("--without", nargs="*", default=[], choices=PARTS, metavar="PART", help="parts to leave out")
    parser.add_argument("--out", type=Path, help="folder of results; default: out/gpu-check, and benchmarks/results")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for all parts; default: {LIMIT:.0f}")
    args = parser.parse_args(arguments)
    folder = args.out or ROOT / "out" / ("gpu-rehearsal" if args.rehearse else "gpu-check")
    check = Check(folder.resolve(), args.rehearse, args.limit, keep=None if args.out else RESULTS)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, check.stop)
    return check.run(args.part, args.without)
