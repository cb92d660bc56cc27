"""Three kernels, once each, for Nsight Compute to look at: ``python -m benchmarks.gpu_check.profiled cuda``"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch

from scoresde_ext import ops

from .speed import KERNELS, large_arguments, large_arrays
from .suite import OPS

CHOSEN = ("perturbation", "loss with gradient", "Runge-Kutta stage")


def main(device: str) -> None:
    shape = (64, 3, 256, 256) if device == "cuda" else (4, 3, 8, 8)
    arrays = large_arrays(shape, torch.float32, device, last=False)
    prepared = [(op, large_arguments(op, arrays)) for op in (OPS[KERNELS[name]] for name in CHOSEN)]
    for op, v in prepared:
        op.call(ops, v)
    with torch.cuda.profiler.profile() if device == "cuda" else nullcontext():
        for op, v in prepared:
            op.call(ops, v)


if __name__ == "__main__":
    main(sys.argv[1])
