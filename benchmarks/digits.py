"""Samples of the digits network end to end: error against seconds, for whole samplers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde_ext import sampling

from . import baselines, solvers
from .problems import Problem, problem_of, root_mean_square

COMPARED = 64  # samples whose error is looked at, of fewer than 512 an eighth: their exact solution is expensive
TARGET = 1e-3  # RMS error at which samplers are compared
UPSTREAM = "scipy RK45"
K_DIFFUSION = "k-diffusion loop, DPM-Solver++(2M)"
FITTED = "UniPC-3 calibrated"
ADAPTIVE = ("scipy RK45", "torchdiffeq dopri5", "torchode dopri5", "RK45 in t", "UniPC-4 adaptive")
SAMPLERS = (*ADAPTIVE, K_DIFFUSION, FITTED)


@dataclass(frozen=True)
class Timed:
    """A run of a sampler on the whole batch."""

    sampler: str
    setting: float  # tolerance, or evaluations
    samples: int
    calls: int
    seconds: float
    rms: float


def settings_of(sampler: str, quick: bool) -> tuple[float, ...]:
    if sampler in ADAPTIVE:
        coarsest = 1 if sampler.startswith("UniPC") else 2
        return (0.01,) if quick else tuple(10.0**-i for i in range(coarsest, coarsest + 3))
    if sampler == FITTED:  # each is calibrated, in half a minute
        return (20,) if quick else (6, 10, 15, 24)
    return (10, 20) if quick else (10, 20, 40, 80)


def prepared(sampler: str, problem: Problem, setting: float) -> Callable[[solvers.Counted], Tensor]:
    """The sampler with all that is made once for a network, as a function of the network."""
    if sampler == K_DIFFUSION:
        sde, formulas, (start, end) = problem.sde, baselines.VP(), problem.span
        first, last = (math.exp(-sde.log_snr(t) / 7) for t in (start, end))
        steps = int(setting)
        sigmas = [(first + (last - first) * i / steps) ** 7 for i in range(steps + 1)]

        def loop(network: solvers.Counted) -> Tensor:
            x = problem.z * math.hypot(1.0, sigmas[0])
            x = baselines.dpmpp_2m(baselines.vp_denoiser(formulas, network), x, sigmas)
            return x / math.hypot(1.0, sigmas[-1])

        return loop
    if sampler == FITTED:
        grid = sampling.calibrate_grid(
            problem.sde, problem.network, problem.z.shape, nfe=int(setting), order=3, eps=problem.span[1], device="cpu"
        )  # fmt: skip
        return lambda network: solvers.solve(problem, network, method="unipc", order=3, grid=grid).x
    return lambda network: solvers.SOLVERS[sampler](problem, network, setting).x


def exact(samples: int) -> Tensor:
    """The first samples, solved far more tightly than the errors that are compared."""
    problem = problem_of("digits", "vp", samples)
    with torch.no_grad():
        return solvers.reference(replace(problem, z=problem.z[: min(COMPARED, samples // 8)], reference_tolerance=1e-6))


@torch.no_grad()
def timed(sampler: str, setting: float, samples: int, wanted: Tensor) -> Timed:
    """One run, after the network has been run once."""
    problem = problem_of("digits", "vp", samples)
    run, network = prepared(sampler, problem, setting), solvers.Counted(problem.network)
    problem.network(problem.z, torch.full((samples,), 500.0))
    start = time.perf_counter()
    x = run(network)
    seconds = time.perf_counter() - start
    rms = root_mean_square(x[: len(wanted)] - wanted).square().mean().sqrt().item()
    return Timed(sampler, setting, samples, network.calls, seconds, rms)
