"""The demo, a few times: ``python -m benchmarks.demo``

Runs what ``make demo`` runs, and writes the figures it gives, with the seconds of every run, as ``demo.json`` into
``benchmarks/results``. The pictures go into ``out``, as there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import record
from .problems import DIGITS

RUNS = 3


def draw() -> dict[str, Any]:
    """The figures of one run."""
    subprocess.run([sys.executable, DIGITS / "draw.py"], check=True)
    return json.loads(Path("out", "digits.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="The demo, a few times.")
    record.add_options(parser, "once")
    args = parser.parse_args()
    runs = [draw() for _ in range(1 if args.quick else RUNS)]
    seconds = [run.pop("seconds") for run in runs]
    path = record.folder_of(args) / "demo.json"
    record.write_json(path, {"benchmark": "demo", "seconds": seconds, **runs[0]})
    print(f"\nSeconds: {', '.join(f'{s:.1f}' for s in seconds)}\nWritten to {path}")


if __name__ == "__main__":
    main()
