"""The processes in which benchmarks run: what they find when they start, and a pool with one on every core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch

from .machine import cores

# glibc would give freed arrays back to the system and fault them in again at the next step, which can cost more than
# the step.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}


@contextmanager
def environment_of_children(threads: int) -> Iterator[None]:
    """Processes that start meanwhile have the allocator pinned, and ``threads`` for numpy's matrix products, of which
    scipy's solvers have some: both are read once, when a process starts."""
    wanted = ALLOCATOR | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def pool() -> Iterator[ProcessPoolExecutor]:
    """One process a core, of one thread each. What they are given and give back is numpy's: torch's tensors would each
    keep a file open."""
    context = get_context("spawn")
    with environment_of_children(1), ProcessPoolExecutor(cores(), context, torch.set_num_threads, (1,)) as executor:
        yield executor
