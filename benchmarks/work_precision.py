"""Curves of error against work, and what is read from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Point:
    """One run of a solver on a problem."""

    problem: str
    sde: str
    solver: str
    setting: float  # tolerance, or number of evaluations asked for
    evaluations: float  # of the network, a sample on average
    calls: int  # of the network, for the batch: what the slowest sample needed
    rms: float  # root mean square error over all samples
    median_rms: float  # of the median sample
    each: np.ndarray = field(repr=False)  # evaluations of each sample, (B,)


Curve = Sequence[Point]
Key = tuple[str, str, str]  # problem, SDE, solver


def curves(points: Iterable[Point]) -> dict[Key, list[Point]]:
    """The points of each solver on each problem, in the order they were run."""
    found: dict[Key, list[Point]] = {}
    for p in points:
        found.setdefault((p.problem, p.sde, p.solver), []).append(p)
    return found


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def line(curve: Curve, error: str = "rms", work: str = "evaluations") -> list[tuple[float, float]]:
    """``(work, error)`` by rising work. Adaptive runs at neighbouring tolerances often take the same work, with
    different errors: these are averaged."""
    amounts = sorted({getattr(p, work) for p in curve})
    return [(n, geometric_mean([getattr(p, error) for p in curve if getattr(p, work) == n])) for n in amounts]


def work_at(curve: Curve, target: float, error: str = "rms", work: str = "evaluations") -> float | None:
    """The work at which the :func:`line` of the curve has the error ``target``, between two of its points on
    logarithmic axes; the geometric mean where a bumpy line crosses it more than once. None where no two points enclose
    it: nothing is extrapolated."""
    crossings = []
    for (n, high), (n_next, low) in itertools.pairwise(line(curve, error, work)):
        if (high > target) != (low > target):
            share = math.log(high / target) / math.log(high / low)
            crossings.append(n * (n_next / n) ** share)
    return geometric_mean(crossings) if crossings else None


@dataclass(frozen=True)
class Ratio:
    """Work relative to the baseline's at equal error: geometric mean over the problems where both reach the error."""

    solver: str
    work: str
    problems: str
    error: str
    target: float
    ratio: float | None
    reached: int
    of: int


def ratio(
    found: dict[Key, list[Point]],
    baseline: str,
    solver: str,
    work: str,
    group: tuple[str, Sequence[str]],
    error: str,
    target: float,
) -> Ratio:
    """``group`` is a name and the problems it stands for; with every SDE each counts once."""
    name, problems = group
    pairs = [
        (work_at(curve, target, error, work), work_at(found[problem, sde, baseline], target, error))
        for (problem, sde, solver_of), curve in found.items()
        if solver_of == solver and problem in problems
    ]
    values = [own / other for own, other in pairs if own is not None and other is not None]
    mean = geometric_mean(values) if values else None
    return Ratio(solver, work, name, error, target, mean, len(values), len(pairs))
