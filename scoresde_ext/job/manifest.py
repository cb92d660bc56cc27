"""What exists: a line of JSON for each shard, in a log of each worker's own.

A line is written after its shard is on disk, and synced. A kill can tear the last line of a log; the shard it was
about then counts as not written, and is made again with the same bytes. A line is never changed; one that drops it may
follow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .files import sync_folder

LOGS = "manifest"


@dataclass(frozen=True)
class Shard:
    """One shard.

    Args:
        file: its name.
        first, stop: it holds the samples from ``first`` to ``stop - 1``,
        failed: without these: why, by id.
        bytes, sha256: of the file.
        evaluations: how many samples took so many evaluations.
        batch: samples that were computed together.
        slot_evaluations: rows that the network was given.
        seconds: that it took to compute.
        written: when, in seconds since 1970.
        worker: its rank.
    """

    file: str
    first: int
    stop: int
    bytes: int
    sha256: str
    evaluations: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    batch: int = 0
    slot_evaluations: int = 0
    seconds: float = 0.0
    written: float = 0.0
    worker: int = 0

    @property
    def count(self) -> int:
        """Samples in the file."""
        return self.stop - self.first - len(self.failed)


class Log:
    """A worker's own log, to be appended to."""

    def __init__(self, folder: Path, worker: int) -> None:
        (folder / LOGS).mkdir(exist_ok=True)
        self.path = folder / LOGS / f"worker-{worker:05d}.jsonl"

    def append(self, shard: Shard) -> None:
        self._write(asdict(shard))

    def drop(self, shard: Shard) -> None:
        """The line of this shard does not count any more."""
        self._write({"drop": identity(shard)})

    def _write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values, separators=(",", ":"))
        new = not self.path.exists()
        with open(self.path, "ab") as file:
            file.write(f"\n{line}\n".encode())  # a line break first: what stands before may be torn
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)


def identity(shard: Shard) -> tuple[int, float, int]:
    """What tells a line from that of the same shard made again."""
    return shard.first, shard.written, shard.worker


def read(folder: Path) -> dict[int, Shard]:
    """The shards that exist, by their first id; of one that was made twice, the later."""
    found: dict[int, Shard] = {}
    dropped: set[tuple[int, float, int]] = set()
    for line in _lines(folder):
        try:
            values = json.loads(line)
            if "drop" in values:
                first, written, worker = values["drop"]
                dropped.add((first, written, worker))
                continue
            for name in ("evaluations", "failed"):
                values[name] = {int(key): value for key, value in values[name].items()}
            shard = Shard(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # torn
        if shard.first not in found or found[shard.first].written <= shard.written:
            found[shard.first] = shard
    for first, written, worker in dropped:
        if first in found and identity(found[first]) == (first, written, worker):
            del found[first]
    return found


def _lines(folder: Path) -> Iterator[bytes]:
    logs = folder / LOGS
    for path in sorted(logs.glob("*.jsonl")) if logs.is_dir() else ():
        with open(path, "rb") as file:
            yield from (line for line in file if line != b"\n")


def missing(shards: Iterable[Shard], samples: int) -> list[tuple[int, int]]:
    """The ids below ``samples`` that no shard covers, as intervals."""
    gaps, at = [], 0
    for shard in sorted(shards, key=lambda s: s.first):
        if shard.first > at:
            gaps.append((at, shard.first))
        at = max(at, shard.stop)
    if at < samples:
        gaps.append((at, samples))
    return [(first, min(stop, samples)) for first, stop in gaps if first < samples]


def cut(intervals: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The intervals, cut at the multiples of ``size``: the shards to be made."""
    return [
        (max(first, edge), min(stop, edge + size))
        for first, stop in intervals
        for edge in range(first // size * size, stop, size)
    ]
