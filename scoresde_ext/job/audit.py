"""What a folder of samples has: ``status`` and ``verify``."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import files, manifest, run, shards
from .manifest import Shard
from .settings import Refused

KEPT = {run.CONFIG, manifest.LOGS, files.LOCK, "report.html", "preview.png"}


def opened(folder: Path) -> tuple[dict[str, Any], dict[int, Shard]]:
    """The configuration and the shards of a folder; Refused where it is none."""
    config = run.stored_config(folder) if folder.is_dir() else None
    if config is None:
        raise Refused(f"folder: expected one that `scoresde sample` wrote, got {folder}")
    return config, manifest.read(folder)


def status(folder: Path) -> int:
    """Prints how far the job is."""
    config, there = opened(folder)
    wanted = config["samples"]
    count, failed = sum(s.count for s in there.values()), sum(len(s.failed) for s in there.values())
    busy = sum(s.seconds for s in there.values())
    evaluations = sum(n * many for s in there.values() for n, many in s.evaluations.items())
    rows = [
        ("samples", f"{count} of {wanted}" + (f", {failed} failed" if failed else "")),
        ("shards", f"{len(there)} {config['format']}, {run.in_bytes(sum(s.bytes for s in there.values()))}"),
        ("job", "at work" if files.is_locked(folder) else "not at work"),
    ]
    if count + failed:
        last = max(s.written for s in there.values())
        rows += [
            ("sampler", f"{config['sampler']}, {evaluations / (count + failed):.1f} evaluations a sample"),
            ("speed", f"{(count + failed) / max(busy, 1e-9):.1f} samples/s a worker"),
            ("last shard", f"{tqdm.format_interval(time.time() - last)} ago"),
        ]
    for name, value in rows:
        print(f"{name:<12}{value}")
    return 0


def verify(folder: Path) -> int:
    """Looks at every byte. Returns 0 where all samples are there, whole, once; else 1."""
    config, there = opened(folder)
    faults: list[str] = []
    listed = [shard for _, shard in sorted(there.items())]

    def look(shard: Shard) -> str | None:
        fault = run.fault(folder, shard, thoroughly=True) or wrong_ids(folder / shard.file, config["format"], shard)
        return fault and f"{shard.file} {fault}"

    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, listed), total=len(listed), unit=" shards", disable=None)
        faults += [fault for fault in looked if fault]
    damaged = len(faults)
    at = 0
    for shard in listed:
        if shard.first < at:
            faults.append(f"samples {shard.first} to {min(at, shard.stop) - 1} are there twice")
        at = max(at, shard.stop)
    gaps = manifest.missing(listed, config["samples"])
    faults += [f"samples {first} to {stop - 1} are not there yet" for first, stop in gaps]
    known = {shard.file for shard in listed} | KEPT
    strange = sorted(p.name for p in folder.iterdir() if p.name not in known and not p.name.endswith(files.PARTIAL))
    failed = sorted((i, why) for shard in listed for i, why in shard.failed.items())
    for line in faults:
        print(line)
    for name in strange:
        print(f"{name} is not in the manifest")
    for i, why in failed[:10]:
        print(f"sample {i} failed: {why}")
    if len(failed) > 10:
        print(f"... {len(failed)} samples failed in all")
    if damaged:
        print(f"To make damaged shards again: scoresde sample --config {folder / run.CONFIG} --remake")
    elif gaps:
        print(f"To continue: scoresde sample --config {folder / run.CONFIG}")
    if faults or failed:
        return 1
    print(f"{at} samples in {len(listed)} shards: all there, whole, once")
    return 0


def wrong_ids(path: Path, format: str, shard: Shard) -> str | None:
    """What is wrong with the ids in a shard."""
    expected = np.setdiff1d(np.arange(shard.first, shard.stop), list(shard.failed))
    try:
        found = shards.ids_in(path, format)
    except Exception as error:
        return f"cannot be read: {type(error).__name__}: {error}"
    same = found == len(expected) if isinstance(found, int) else np.array_equal(found, expected)
    return None if same else "has other ids than the manifest says"
