"""One competitor in a process of its own: it runs when it is asked, so that competitors take turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from . import digits
from .cases import CASES, COPY, Run, Shape, copy_of
from .processes import environment_of_children


class Worker:
    """The process. Methods are those of :class:`Runner`, and return what they return there."""

    def __init__(self, competitor: str, threads: int) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, competitor, threads), daemon=True)
        with environment_of_children(threads):
            self.process.start()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.pipe.send((method, arguments))
            worked, answer = self.pipe.recv()
            if not worked:
                raise RuntimeError(answer)
            return answer

        return call

    def stop(self) -> None:
        self.pipe.send(("stop", ()))
        self.process.join()


def _serve(pipe: Connection, competitor: str, threads: int) -> None:
    torch.set_num_threads(threads)
    runner = Runner(competitor)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:  # who asked is gone
            return
        if method == "stop":
            return
        try:
            pipe.send((True, getattr(runner, method)(*arguments)))
        except Exception as error:
            pipe.send((False, f"{competitor}: {type(error).__name__}: {error}"))


class Runner:
    """Keeps the run of one case and size ready."""

    def __init__(self, competitor: str) -> None:
        self.competitor = competitor
        self.run_of: tuple[str, Shape] | None = None
        self.run: Run = lambda draws: NotImplemented

    def prepare(self, case: str, shape: Shape) -> None:
        """Makes the run, and runs it twice: what is compiled or cached then is."""
        if self.run_of != (case, shape):
            make = copy_of if self.competitor == COPY else CASES[case].competitors[self.competitor]
            self.run, self.run_of = make(shape), (case, shape)
            for _ in range(2):
                self.run(None)

    def check(self, case: str, shape: Shape) -> np.ndarray:
        """What the case computes from the draws of its check."""
        self.prepare(case, shape)
        torch.manual_seed(0)
        return self.run(CASES[case].draws(shape)).values.detach().double().flatten().numpy()

    def seconds(self, case: str, shape: Shape, budget: float) -> list[float]:
        """Of each run begun within ``budget`` seconds, divided by its units of work."""
        self.prepare(case, shape)
        times: list[float] = []
        end = time.perf_counter() + budget
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            result = self.run(None)
            times.append((time.perf_counter() - start - result.aside) / result.units)
        return times

    def peak_bytes(self, case: str, shape: Shape) -> int:
        """The most memory that torch's tensors take during a run, beyond what they took before it."""
        self.prepare(case, shape)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.run(None)
        changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(int(n) for n in np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]))

    def sample(self, setting: float, samples: int, wanted: np.ndarray) -> digits.Timed:
        """The competitor, a sampler of :mod:`benchmarks.digits`, end to end."""
        return digits.timed(self.competitor, setting, samples, torch.from_numpy(wanted))
