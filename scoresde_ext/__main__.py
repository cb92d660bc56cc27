"""The command line: ``scoresde COMMAND``, or ``python -m scoresde_ext COMMAND``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from typing import NoReturn

import torch

from scoresde_ext import _C, __version__
from scoresde_ext.job import commands as jobs


def devices() -> list[str]:
    """One line for each CUDA device that torch can use, or one that says why there is none."""
    if torch.version.cuda is None:
        return [f"cpu (torch {torch.__version__} is a build without CUDA)"]
    if not torch.cuda.is_available():
        return ["cpu (torch finds no CUDA device)"]
    lines = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index} {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.1f} GiB")
    return lines


def info() -> int:
    """Prints what this installation is made of and what it runs on."""
    build = _C.build_info()
    cuda = build["cuda"]
    rows = [
        ("scoresde_ext", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__} (built against {build['torch']})"),
        ("compiler", build["compiler"]),
        ("CUDA kernels", f"{cuda['archs']} by nvcc {cuda['nvcc']}" if cuda else "not built"),
        ("CPU kernels", f"{build['cpu_capability']} in use, of {', '.join(build['cpu_capabilities'])}"),
        ("threads", str(torch.get_num_threads())),
        *(("device", line) for line in devices()),
    ]
    for name, value in rows:
        print(f"{name:<14}{value}")
    return 0


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command leaves its function in ``run``."""
    top = Parser(prog="scoresde", description="Score-based generative modeling through SDEs.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    jobs.add_to(commands)
    command = commands.add_parser("info", help="versions, compiler, CUDA architectures, CPU instruction sets, devices")
    command.set_defaults(run=lambda _: info())
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; without a command prints the help."""
    top = parser()
    options = top.parse_args(arguments)
    if "run" not in options:
        top.print_help()
        return 0
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
