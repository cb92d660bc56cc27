"""One part, in a process of its own: ``python -m benchmarks.gpu_check.part NAME --out FOLDER --seconds S``"""

from __future__ import annotations

import argparse
import importlib
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import groups
from .reporting import Failed, Report, Skipped, in_words


class Part(NamedTuple):
    """Where a part is, and the seconds it may take. The modules import torch, or what not every machine has: one is
    imported where it is wanted."""

    function: str
    budget: float


# In this order: what is needed most comes first. The budgets are 615 s together; a part takes all of its own only where
# something hangs.
PARTS = {
    "facts": Part("facts.facts", 5),
    "build": Part("build.build", 75),
    "smoke": Part("smoke.smoke", 30),
    "kernels": Part("speed.kernels", 40),
    "solves": Part("speed.small_solves", 40),
    "steps": Part("speed.steps", 60),
    "compiled": Part("speed.compiled_steps", 40),
    "network": Part("speed.network_overhead", 45),
    "tests": Part("tools.marked_tests", 150),
    "ncu": Part("tools.profile", 30),
    "memcheck": Part("tools.memcheck", 50),
    "racecheck": Part("tools.racecheck", 50),
}
OURS = ("scoresde_ext", "benchmarks", "op_table", "fake_device")


def end_with(parent: int) -> None:
    """Ends all that this part started, and this process, when the driver is gone: nothing may go on beside whatever
    the device is used for next."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        groups.kill_tagged(os.environ.get(groups.TAG, ""), but=os.getpid())
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def function_of(name: str) -> Callable[[Report], None]:
    module, function = PARTS[name].function.split(".")
    found: Callable[[Report], None] = getattr(importlib.import_module(f".{module}", __package__), function)
    return found


def run(name: str, report: Report) -> str:
    """Runs a part and notes its outcome: ``passed``, or ``skipped`` or ``failed`` and why."""
    try:
        function_of(name)(report)
        report.conclude()
        outcome = "passed"
    except Skipped as skipped:
        outcome = f"skipped: {skipped}"
    except Failed as failed:
        outcome = f"failed: {failed}"
    except ModuleNotFoundError as error:
        traceback.print_exc()
        missing = (error.name or "").split(".")[0]
        outcome = f"failed: {in_words(error)}" if missing in OURS else f"skipped: {missing} is not installed"
    except Exception as error:
        traceback.print_exc()
        outcome = f"failed: {in_words(error)}"
    report.outcome(outcome)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.part")
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    end_with(os.getppid())
    run(args.name, Report(args.out, args.seconds, args.rehearse))


if __name__ == "__main__":
    main()
