"""Every op, called: those of ``tests/op_table.py``, and the few that are in no table. What the smoke part compares with
the CPU, and the sanitizers watch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde_ext import _C, ops
from scoresde_ext.ops import Draw

from .groups import ROOT
from .reporting import Failed

sys.path.insert(0, str(ROOT / "tests"))
from op_table import DTYPES, NOISE, OPS, Arguments, Op, arguments, check

__all__ = [
    "DTYPES",
    "OPS",
    "Arguments",
    "Op",
    "arguments",
    "calls",
    "channels_last",
    "check",
    "moved",
    "others",
    "require_cuda",
]

# On both sides of a vector, a tile of 1024 elements, a block of threads; the last has channels.
SHAPES = ((257, 3), (3, 1024), (2, 1025), (1, 2056), (2, 3, 5, 8))


def require_cuda() -> None:
    """Failed where the kernels cannot be run on a GPU."""
    if not torch.cuda.is_available():
        raise Failed("torch sees no CUDA device; --rehearse runs what a CPU can")
    if _C.build_info()["cuda"] is None:
        raise Failed("this build of scoresde_ext has no CUDA")


def moved(v: Any, device: str) -> Any:
    """Arguments, or anything in them, on a device; strides stay."""
    if isinstance(v, dict):
        return {name: moved(value, device) for name, value in v.items()}
    if isinstance(v, Draw):
        return Draw(*moved(tuple(v), device))
    if isinstance(v, tuple):
        return tuple(moved(part, device) for part in v)
    return v.to(device) if isinstance(v, Tensor) else v


def channels_last(op: Op, v: Arguments) -> Arguments:
    return v | {name: v[name].to(memory_format=torch.channels_last) for name in op.arrays}


def calls(every: bool) -> Iterator[tuple[str, Op, Arguments]]:
    """Calls of the ops in the table with their arguments on the CPU, ``every`` dtype and kind of noise or one of each
    in turn. All ops come once before any comes again: who has no time for all has seen something of each."""
    for i, shape in enumerate(SHAPES):
        for j, (name, op) in enumerate(OPS.items()):
            kinds = NOISE if op.noise else ("array",)
            for dtype in DTYPES if every else (DTYPES[(i + j) % len(DTYPES)],):
                for noise in kinds if every else (kinds[i % len(kinds)],):
                    v = arguments(op, shape, dtype, "per sample", noise)
                    yield name, op, v
                    if len(shape) == 4:
                        yield name, op, channels_last(op, v)


class Other(NamedTuple):
    """An op that is in no table. ``ulps``: how far a GPU's results may be from the CPU's, in the last place."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    ulps: int = 0


def others() -> dict[str, Other]:
    norm, h = torch.rand(2, 300, dtype=torch.float64)
    u, key = torch.rand(300), torch.tensor([1, 2])
    found = {"rk_control": Other(ops.rk_control, (norm, h, norm < 0.5, -0.2), ulps=45)}  # it takes a power
    for process in ("vp", "subvp", "ve"):
        found[f"marginal, {process}"] = Other(ops.marginal, (u, 1e-5, 1.0, process, 0.1, 20.0), ulps=4)
    for dtype, size in zip(DTYPES, ((300, 3), (300, 1024), (300, 1025), (300, 7)), strict=True):
        into, values = torch.randn(2, *size).to(dtype).unbind()
        found[f"put, {dtype}"] = Other(_put, (into, values, norm < 0.5))
    for n in ((3, 1025), (70, 3)):
        found[f"noise_normal {n}"] = Other(ops.noise_normal, (key, None, 0, n), ulps=2)
        found[f"noise_uniform {n}"] = Other(ops.noise_uniform, (key, None, 0, n))
        found[f"noise_integers {n}"] = Other(ops.noise_integers, (key, None, 0, n, 10))
    return found


def _put(into: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    into = into.clone()
    ops.put(into, values, chosen)
    return into


def main() -> None:
    """Calls everything on a device, for a sanitizer to watch, until the time is over: values are not looked at."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.suite")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("seconds", type=float)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    seen: dict[str, int] = {}
    for name, other in others().items():
        other.call(*moved(other.arguments, args.device))
        seen[name] = 1
    for name, op, v in calls(every=False):
        if name in seen and time.monotonic() > end:  # every op at least once
            break
        op.call(ops, moved(v, args.device))
        seen[name] = seen.get(name, 0) + 1
    if args.device == "cuda":
        torch.cuda.synchronize()
    print(f"suite: {len(seen)} kinds of call, {sum(seen.values())} calls", flush=True)


if __name__ == "__main__":
    main()
