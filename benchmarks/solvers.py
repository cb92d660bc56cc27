"""Error against evaluations of the network, for ODE solvers: ``python -m benchmarks.solvers``

Every solver starts from the same noise and follows the same probability flow; errors are against a reference solved
far more tightly. The work is spread over one process a core, each of one thread; nothing depends on their number but
the time. Writes into ``benchmarks/results``: all points as ``solvers.csv``, the tables as ``solvers.md`` (also
printed), machine, versions and summary as ``solvers.json``, and plots.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scoresde_ext import sampling

from . import plots, processes, record, report
from .baselines import scipy_rk45, torchdiffeq_dopri5, torchode_dopri5
from .problems import KEPT_BACK, KINDS, MIXTURES, Network, Problem, problem_of, root_mean_square
from .work_precision import Point, curves

# ---- competitors: each a function (problem, network, setting) -> Outcome ----


class Outcome(NamedTuple):
    x: Tensor  # the samples, (B, *)
    each: Tensor | None = None  # evaluations of each sample, (B,); None: as many for all as calls of the network


class Counted:
    """A network that counts its calls."""

    def __init__(self, network: Network) -> None:
        self.network, self.calls = network, 0

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x, labels)


Run = Callable[[Problem, Network, float], Outcome]


def others(solve: Callable[..., Tensor]) -> Run:
    """A solver of :mod:`benchmarks.baselines`, on upstream's formulas; the setting is rtol = atol."""

    def run(problem: Problem, network: Network, tolerance: float) -> Outcome:
        f = functools.partial(problem.derivative, network)
        return Outcome(solve(f, problem.span, problem.z, tolerance, tolerance))

    return run


def solve(problem: Problem, network: Network, **options: Any) -> Outcome:
    """Through the sampler, as a user would."""
    sampler = sampling.get_ode_sampler(
        problem.sde, problem.z.shape, lambda x: x, eps=problem.span[1], device="cpu", **options
    )
    solution = sampler.solve(network, problem.z)
    return Outcome(solution.y, solution.evaluations)


def adaptive(**options: Any) -> Run:
    """Ours with a tolerance, rtol = atol."""
    return lambda problem, network, tolerance: solve(problem, network, rtol=tolerance, atol=tolerance, **options)


def even(evaluations_a_step: int = 1, **options: Any) -> Run:
    """Ours in as many equal steps of the angle as ``setting`` evaluations pay for."""

    def run(problem: Problem, network: Network, evaluations: float) -> Outcome:
        return solve(problem, network, steps=int(evaluations) // evaluations_a_step, **options)

    return run


def karras(evaluations_a_step: int = 1, **options: Any) -> Run:
    """Ours on the grid of Karras et al. 2022 (arXiv 2206.00364, eq. 5): noise-to-signal ratios sigma = s / m equally
    spaced in sigma^(1 / 7)."""

    def run(problem: Problem, network: Network, evaluations: float) -> Outcome:
        steps, sde, (start, end) = int(evaluations) // evaluations_a_step, problem.sde, problem.span
        first, last = (math.exp(-sde.log_snr(t) / 7) for t in (start, end))
        roots = [first + (last - first) * i / steps for i in range(1, steps)]
        grid = [start, *(sde.time_at(-7 * math.log(root)) for root in roots), end]
        return solve(problem, network, grid=grid, **options)

    return run


def calibrated(order: int, coefficients: str) -> Run:
    """Ours on a grid made for the network from other noise: what calibration costs is paid once and not counted."""

    def run(problem: Problem, network: Network, evaluations: float) -> Outcome:
        grid = sampling.calibrate_grid(
            problem.sde, problem.network, problem.z.shape, nfe=int(evaluations), order=order, eps=problem.span[1],
            device="cpu", coefficients=coefficients,
        )  # fmt: skip
        return solve(problem, network, method="unipc", order=order, grid=grid)

    return run


BASELINE = "scipy RK45"
ADAPTIVE: dict[str, Run] = {
    BASELINE: others(scipy_rk45),
    "torchdiffeq dopri5": others(torchdiffeq_dopri5),
    "torchode dopri5": others(torchode_dopri5),
    "RK45 in t": adaptive(method="RK45"),
    "RK45 in the angle": adaptive(method="RK45", coordinate="angle"),
    "RK45 in the angle, per sample": adaptive(method="RK45", coordinate="angle", control="per_sample"),
    "UniPC-3 adaptive": adaptive(method="unipc", order=3),
    "UniPC-4 adaptive": adaptive(method="unipc", order=4),
    "UniPC-3 adaptive, per sample": adaptive(method="unipc", order=3, control="per_sample"),
    "UniPC-4 adaptive, per sample": adaptive(method="unipc", order=4, control="per_sample"),
}
ON_GRIDS: dict[str, Run] = {
    "Heun, Karras grid": karras(2, method="heun", coordinate="angle"),
    "DPM-Solver++(2M), Karras grid": karras(method="dpmpp_2m"),
    "UniPC-3, Karras grid": karras(method="unipc", order=3),
    "UniPC-3, even angles": even(method="unipc", order=3),
    "UniPC-3 calibrated, theory": calibrated(3, "theory"),
    "UniPC-3 calibrated, fitted": calibrated(3, "fitted"),
}
SOLVERS = {**ADAPTIVE, **ON_GRIDS}

# ---- the sweep ----

TARGETS = (1e-3, 1e-4)
Named = tuple[str, str, int]  # a problem: its name, kind and samples, as problem_of takes them


class Effort(NamedTuple):
    """How much is run: SDEs, mixtures and their samples, samples of the digits, tolerances, evaluations on a grid."""

    kinds: tuple[str, ...]
    mixtures: tuple[str, ...]
    samples: int
    digits: int
    tolerances: tuple[float, ...]
    evaluations: tuple[int, ...]


FULL = Effort(
    kinds=tuple(KINDS),
    mixtures=tuple(MIXTURES),
    samples=128,
    digits=32,
    tolerances=tuple(10 ** (-i / 2) for i in range(1, 17)),
    evaluations=(5, 6, 8, 10, 13, 16, 20, 26, 32, 40, 50, 64, 82, 104, 130),
)
QUICK = Effort(
    kinds=("vp",),
    mixtures=("mixture 16-D",),
    samples=16,
    digits=16,
    tolerances=tuple(10.0**-i for i in range(1, 7)),
    evaluations=(6, 10, 20, 40),
)


def settings_of(solver: str, problem: Problem, effort: Effort) -> tuple[float, ...]:
    """float32 states have rounding of their own at tolerances below 1e-6."""
    if solver in ON_GRIDS:
        return effort.evaluations
    least = 1e-6 if problem.z.dtype == torch.float32 else 0.0
    return tuple(t for t in effort.tolerances if t > 0.99 * least)


def reference(problem: Problem) -> Tensor:
    """By scipy's method of order 8, in float64."""
    f = functools.partial(problem.derivative, problem.exact_network)
    tolerance = problem.reference_tolerance
    return scipy_rk45(f, problem.span, problem.z.double(), tolerance, tolerance, method="DOP853")


@torch.no_grad()
def exact_samples(named: Named) -> np.ndarray:
    return reference(problem_of(*named)).numpy()


@torch.no_grad()
def sweep(named: Named, solver: str, effort: Effort, exact: np.ndarray) -> list[Point]:
    """From coarse to fine, until two settings in a row are well below the smallest error that is asked for."""
    problem, points, done = problem_of(*named), [], 0
    for setting in settings_of(solver, problem, effort):
        network = Counted(problem.network)
        outcome = SOLVERS[solver](problem, network, setting)
        each = torch.full((len(problem.z),), network.calls) if outcome.each is None else outcome.each
        errors = root_mean_square(outcome.x - torch.from_numpy(exact))
        rms = errors.square().mean().sqrt().item()
        points.append(Point(
            problem.name, problem.sde_name, solver, setting, each.double().mean().item(), network.calls, rms,
            errors.quantile(0.5).item(), each.numpy(),
        ))  # fmt: skip
        done = done + 1 if rms < min(TARGETS) / 3 else 0
        if done == 2:
            break
    return points


def problems(effort: Effort, kept_back: bool) -> Iterator[Named]:
    for kind in effort.kinds:
        for name in (*effort.mixtures, *(KEPT_BACK if kept_back else ())):
            yield name, kind, effort.samples
        if effort.digits:
            yield "digits", kind, effort.digits


def measure(effort: Effort, kept_back: bool) -> list[Point]:
    """Every solver on every problem, in this order; the curves are spread over the cores."""
    todo, points = list(problems(effort, kept_back)), []
    with processes.pool() as pool:
        found = pool.map(exact_samples, todo)
        exact = list(tqdm(found, "exact solutions", len(todo), unit="problem"))
        runs = [(named, solver, effort, x) for named, x in zip(todo, exact, strict=True) for solver in SOLVERS]
        with tqdm(pool.map(sweep, *zip(*runs, strict=True)), total=len(runs), unit="curve") as bar:
            for curve in bar:
                points += curve
                bar.set_description(f"{curve[-1].problem}, {curve[-1].sde}")
    return points


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers", description="Error against evaluations of the network, for ODE solvers."
    )
    record.add_options(parser, "fewer problems, samples and settings, VP alone: under two minutes")
    parser.add_argument(
        "--kept-back", action="store_true", help="also the mixture that no solver was tuned on; not for use in tuning"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the processes: this is what is written down
    points = measure(QUICK if args.quick else FULL, args.kept_back)
    found = curves(points)
    write(record.folder_of(args), found, points)


def write(folder: Path, found: dict[Any, list[Point]], points: list[Point]) -> None:
    tables, ratios = report.tables(found, BASELINE, TARGETS)
    print(f"\n{tables}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "solvers.md").write_text(tables + "\n")
    record.write_csv(folder / "solvers.csv", [report.row(p) for p in points])
    record.write_json(folder / "solvers.json", {"benchmark": "solvers", "ratios": ratios})
    plots.work_precision(folder / "solvers.png", found, TARGETS)
    plots.spread(folder / "solvers-spread.png", found, TARGETS[0])
    print(f"\nWritten to {folder}")


if __name__ == "__main__":
    main()
