"""How every benchmark writes down what it measured: points as CSV, and a JSON file that says where and with what."""

from __future__ import annotations

import argparse
import csv
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .machine import cores, processor, version

RESULTS = Path(__file__).parent / "results"
REHEARSAL = Path("out", "benchmark")  # where what --quick found is kept out of the way
PACKAGES = ("scoresde_ext", "torch", "numpy", "scipy", "torchdiffeq", "torchode")


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """``--quick``, in which ``quick`` says what is done instead, and ``--out``."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help=f"folder; default: {RESULTS}, with --quick {REHEARSAL}")


def folder_of(args: argparse.Namespace) -> Path:
    """Where the results are."""
    return args.out or (REHEARSAL if args.quick else RESULTS)


def environment() -> dict[str, Any]:
    """Machine, versions, threads and date."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "cores": cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each row; all rows have the keys of the first. Floats keep six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """``results`` and the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
