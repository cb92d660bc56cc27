"""What an integration reached, and how it failed."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import name_rows
from ..graphs import ON_CPU, Choice


class Status(enum.IntEnum):
    """How the integration of one sample ended. Anything but SUCCESS is a failure."""

    SUCCESS = 0
    NOT_FINITE = 1  # NaN or Inf in the sample
    STEP_SIZE = 2  # the step size fell below the spacing of the numbers
    MAX_STEPS = 3  # max_steps attempted steps did not reach the end
    RAISED = 4  # the right-hand side raised an exception


RUNNING = -1

REASONS = {
    Status.NOT_FINITE: "NaN or Inf; the network or the data are at fault, or the state is too large",
    Status.STEP_SIZE: "the step size fell below the spacing of the numbers",
    Status.MAX_STEPS: "max_steps = {max_steps} attempted steps did not reach the end",
    Status.RAISED: "the right-hand side raised {error}",
}


NOISY = (
    "Dropout is on, the network draws random numbers, or its kernels are not deterministic. Step control takes such "
    "noise for errors, and makes ever smaller steps. Switch it off, use fixed steps (steps=...), or looser tolerances."
)


@dataclass(frozen=True)
class Solution:
    """What :func:`solve` reached.

    Attributes:
        y: state at the end of the interval, as ``y0`` was given; NaN in every sample that failed.
        t: ``(B,)``, float64: the time each sample reached.
        status: ``(B,)``, int8: a :class:`Status` for each sample.
        message: how it ended, in words; names the samples that failed.
        nfe: evaluations of the right-hand side, each for the whole batch.
        evaluations: ``(B,)``, int64: how many of them each sample needed.
        n_accepted, n_rejected: ``(B,)``, int64: steps of each sample.
        times: float64, where the integration stood, the start first: after every accepted step under joint control,
            ``(steps + 1,)``; after every attempted one under per-sample control, ``(attempts + 1, B)``.
        step_sizes, error_norms: of every attempted step, ``(attempts,)`` or ``(attempts, B)``; accepted iff the norm is
            below 1. NaN where a sample was finished.
        first_step: the first step size tried, of the samples that needed the smallest.
        ys: the states at the times ``t_eval``, ``(len(t_eval), B, *)``; None where none were asked for.
        graph: how the loop over the steps was run, ``while``, ``replay`` or ``off``, and why: see
            :mod:`scoresde_ext.graphs`.
    """

    y: Any
    t: Tensor
    status: Tensor
    message: str
    nfe: int
    evaluations: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    times: Tensor
    step_sizes: Tensor
    error_norms: Tensor
    first_step: float
    ys: Any = None
    graph: Choice = ON_CPU

    @property
    def success(self) -> bool:
        """Whether every sample reached the end."""
        return not bool(self.status.any())


class SolverError(RuntimeError):
    """The integration of some samples could not be finished. ``solution`` holds the others."""

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


def describe(
    status: Tensor,
    t: Tensor,
    span: tuple[float, float],
    nfe: int,
    max_steps: int,
    error: BaseException | None,
    noisy: bool = False,
) -> str:
    """The end of an integration in words; ``noisy``: whether two evaluations of the same differ."""
    if not bool(status.any()):
        return "reached the end of the interval"
    parts = []
    for kind, reason in REASONS.items():
        rows = torch.nonzero(status == kind).flatten().tolist()
        if rows:
            times = [f"{t[row].item():.6g}" for row in rows]
            if len(set(times)) == 1:
                named = f"{name_rows(rows)} at t = {times[0]}"
            else:
                named = name_rows([f"{row} (at t = {at})" for row, at in zip(rows, times, strict=True)])
            why = reason.format(max_steps=max_steps, error=f"{type(error).__name__}: {error}")
            parts.append(f"{named}: {why}")
    start, end = span
    message = f"The integration from t = {start:g} to {end:g} failed, after {nfe} evaluations, in " + "; in ".join(
        parts
    )
    return f"{message}. Two evaluations of the same state and time differ. {NOISY}" if noisy else message
