"""The commands: from the words of the command line to an exit code.

0: done. 1: something failed on the way; what exists is whole, and the same command continues. 2: a wrong input, in one
line, before any work.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from .settings import Calibrate, Likelihood, Problem, Refused, Sample, flag, reason, resolve

SETTINGS: dict[str, tuple[type[Problem], str]] = {
    "sample": (Sample, "draw samples into a folder; continues where it was stopped"),
    "calibrate": (Calibrate, "fit fixed steps to a network"),
    "likelihood": (Likelihood, "likelihoods of data under a network"),
}


def add_to(commands: Any) -> None:
    """Adds the commands to those of the parser."""
    for name, (cls, help) in SETTINGS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
        command.add_argument("--config", metavar="FILE", help="YAML or TOML with these settings by name")
        for f in fields(cls):
            option = f"--{f.name.replace('_', '-')}"
            shown = not f.metadata["needed"] and f.default is not None and f.default is not False
            default = f" [{_plain(f.default)}]" if shown else ""
            if f.metadata["parse"] is flag:
                action: Any = argparse.BooleanOptionalAction
                command.add_argument(option, action=action, default=None, help=f.metadata["help"] + default)
            else:
                command.add_argument(option, metavar=f.metadata["metavar"], help=f.metadata["help"] + default)
        command.set_defaults(run=lambda options, name=name: run(name, options))
    for name, help in (
        ("status", "how far the job of a folder is"),
        ("verify", "whether all that was written is there, whole, once"),
    ):
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
        command.add_argument("folder", help="that `sample` wrote")
        command.set_defaults(run=lambda options, name=name: run(name, options))


def _plain(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def run(name: str, options: argparse.Namespace) -> int:
    """One command, and its exit code."""
    try:
        if name in SETTINGS:
            cls = SETTINGS[name][0]
            given = {f.name: getattr(options, f.name) for f in fields(cls)}
            return _function(name)(resolve(cls, options.config, given))
        return _function(name)(Path(options.folder))
    except Refused as refused:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(WAIT)  # the first worker says the same, and torchrun then ends this one
        print(f"scoresde {name}: {refused}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"scoresde {name}: stopped{_CONTINUES.get(name, '')}", file=sys.stderr)
        return 130
    except _dist_error() as error:
        lost = f"stopped: lost the store that the workers share, for its host is gone ({reason(error)})"
        print(f"scoresde {name}: {lost}{_CONTINUES.get(name, '')}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"scoresde {name}: stopped: {reason(error)}{_CONTINUES.get(name, '')}", file=sys.stderr)
        return 1


WAIT = 5.0
_CONTINUES = {"sample": ". What is written is whole, and the same command continues"}


def _dist_error() -> type[BaseException]:
    """What torch.distributed's store raises where its host is gone."""
    import torch

    return getattr(torch.distributed, "DistError", OSError)


_MODULES = {"sample": "run", "calibrate": "tasks", "likelihood": "tasks", "status": "audit", "verify": "audit"}


def _function(name: str) -> Callable[[Any], int]:
    """What a command does, imported when it is asked for: the help is there at once."""
    return getattr(importlib.import_module(f".{_MODULES[name]}", __package__), name)
