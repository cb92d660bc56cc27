"""What ``python -m benchmarks`` measures: every case with its sizes and its competitors.

A competitor is a function that prepares one size of a case and returns a :data:`Run`. All runs of a case compute the
same thing, which is checked before anything is timed.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde_ext import integrate, likelihood, losses, noise, sampling
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.models import utils as mutils
from scoresde_ext.sde_lib import VPSDE

from . import baselines
from .problems import digits_network

Shape = tuple[int, ...]
Draws = Sequence[Tensor] | None  # random numbers to take, in upstream's order; None: draw them
EAGER = "eager torch"  # the baseline: upstream's formulas
OURS = "scoresde_ext"
BY_SIZE = "loss step by size"  # the case that is drawn and not listed
COMPILED = "torch.compile"


class Result(NamedTuple):
    """What a run computed, the units of work that its time is divided by, and seconds that do not count."""

    values: Tensor
    units: int = 1
    aside: float = 0.0


Run = Callable[[Draws], Result]


@dataclass(frozen=True)
class Measured:
    """Seconds of one unit of work of a competitor."""

    case: str
    shape: Shape
    threads: int
    competitor: str
    unit: str
    best: float
    q10: float
    median: float
    q90: float
    runs: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Case:
    """``draws(shape)``: the random numbers of a check. ``tolerance``: of its comparison, relative to the largest
    value."""

    name: str
    unit: str
    baseline: str
    competitors: dict[str, Callable[[Shape], Run]]
    draws: Callable[[Shape], list[Tensor]]
    tolerance: float
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]


def replayed(draws: Draws) -> AbstractContextManager[None]:
    return nullcontext() if draws is None else noise.replay(draws)


def normal(shape: Shape, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- loss step: perturbation, loss, gradient with respect to the network's output ----


def loss_draws(shape: Shape) -> list[Tensor]:
    # Times of at least 0.05, where upstream's 1 - exp is not the only thing that is compared.
    return [0.05 + 0.95 * torch.rand(shape[0]), normal(shape, 2)]


def loss_of_baseline(shape: Shape, compiled: bool = False) -> Run:
    sde, x0, out = baselines.VP(), normal(shape), normal(shape, 1).requires_grad_()

    def loss(u: Tensor, z: Tensor) -> Tensor:
        return baselines.score_matching_loss(sde, lambda x, labels: out, x0, u, z)

    function = torch.compile(loss, dynamic=False) if compiled else loss

    def run(draws: Draws) -> Result:
        out.grad = None
        u, z = draws or (torch.rand(shape[0]), torch.randn_like(x0))
        function(u, z).backward()
        assert out.grad is not None
        return Result(out.grad)

    return run


def loss_of_ours(shape: Shape) -> Run:
    x0, out = normal(shape), normal(shape, 1).requires_grad_()
    loss_fn = losses.get_sde_loss_fn(VPSDE(), train=True, likelihood_weighting=False)

    def run(draws: Draws) -> Result:
        out.grad = None
        with replayed(draws):
            loss_fn(lambda x, labels: out, x0).backward()
        assert out.grad is not None
        return Result(out.grad)

    return run


# ---- a step of the predictor, a step of the corrector ----

STEPS = 5  # a run, from the same state


def step_of_baseline(step: Callable[..., tuple[Tensor, Tensor]], shape: Shape, compiled: bool = False) -> Run:
    sde, x, out, t = baselines.VP(), normal(shape), normal(shape, 1), torch.full(shape[:1], 0.5)

    def one_step(z: Tensor) -> Tensor:
        return step(sde, lambda x, labels: out, x, t, z)[0]

    function = torch.compile(one_step, dynamic=False) if compiled else one_step

    @torch.no_grad()
    def run(draws: Draws) -> Result:
        if draws:
            return Result(function(draws[0]))
        for _ in range(STEPS):
            state = function(torch.randn_like(x))
        return Result(state, STEPS)

    return run


def step_of_ours(kind: str, shape: Shape) -> Run:
    sde, x, out, t = VPSDE(), normal(shape), normal(shape, 1), torch.full(shape[:1], 0.5)
    score_fn = mutils.get_score_fn(sde, lambda x, labels: out, continuous=True)
    if kind == "predictor":
        update = sampling.EulerMaruyamaPredictor(sde, score_fn).update_fn
    else:
        update = sampling.LangevinCorrector(sde, score_fn, 0.16, 1).update_fn

    @torch.no_grad()
    def run(draws: Draws) -> Result:
        if draws:
            with noise.replay(draws):
                return Result(update(x, t)[0])
        with noise.run(x.device):  # as the samplers do: one key for many steps
            for _ in range(STEPS):
                state = update(x, t)[0]
        return Result(state, STEPS)

    return run


# ---- solvers: the time of an evaluation outside the network ----

TOLERANCE = 1e-4
TIGHT = 1e-7  # of the check, in float64: solvers differ in what they make of a tolerance


class Linear:
    """The exact network for data N(0, 1/4) under VP. It counts its calls and the seconds they take."""

    sde = VPSDE()

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        start = time.perf_counter()
        m, s = self.sde.marginal_coefficients(labels / 999)
        out = (s / (0.25 * m * m + s * s)).reshape(-1, *[1] * (x.dim() - 1)) * x
        self.calls += 1
        self.seconds += time.perf_counter() - start
        return out


def solve_of_baseline(solve: Callable[..., Tensor], shape: Shape) -> Run:
    sde, z = baselines.VP(), normal(shape)

    @torch.no_grad()
    def run(draws: Draws) -> Result:
        network = Linear()

        def derivative(x: Tensor, t: Tensor) -> Tensor:
            return baselines.flow_drift(sde, sde.score(network, x, t), x, t)

        start, tolerance = (z, TOLERANCE) if draws is None else (z.double(), TIGHT)
        x = solve(derivative, (1.0, 1e-3), start, tolerance, tolerance)
        return Result(x, network.calls, network.seconds)

    return run


def solve_of_ours(shape: Shape) -> Run:
    z = normal(shape)

    def sampler(tolerance: float) -> Any:
        return sampling.get_ode_sampler(VPSDE(), shape, lambda x: x, rtol=tolerance, atol=tolerance, device="cpu")

    timed, checked = sampler(TOLERANCE), sampler(TIGHT)

    def run(draws: Draws) -> Result:
        network = Linear()
        x, _ = timed(network, z) if draws is None else checked(network, z.double())
        return Result(x, network.calls, network.seconds)

    return run


# ---- fixed steps: DPM-Solver++(2M) ----

SIGMAS = [80.0 * (0.02 / 80.0) ** (i / 40) for i in range(41)]


def karras_of_baseline(shape: Shape) -> Run:
    sde, z = baselines.VP(), normal(shape)

    @torch.no_grad()
    def run(draws: Draws) -> Result:
        network = Linear()
        x = baselines.dpmpp_2m(baselines.vp_denoiser(sde, network), z * math.hypot(1.0, SIGMAS[0]), SIGMAS)
        return Result(x / math.hypot(1.0, SIGMAS[-1]), network.calls, network.seconds)

    return run


def karras_of_ours(shape: Shape) -> Run:
    sde, z = VPSDE(), normal(shape)
    times = [sde.time_at(-math.log(sigma)) for sigma in SIGMAS]

    @torch.no_grad()
    def run(draws: Draws) -> Result:
        network = Linear()
        score_fn = mutils.get_score_fn(sde, network, continuous=True)
        span = (times[0], times[-1])
        solution = integrate.solve(ProbabilityFlow(sde, score_fn), span, z, "dpmpp_2m", grid=times)
        return Result(solution.y, network.calls, network.seconds)

    return run


# ---- likelihood of digits: upstream runs the network twice an evaluation ----


def likelihood_of_baseline(shape: Shape) -> Run:
    network, sde, x = digits_network("vp"), baselines.VP(), normal(shape).clamp(-1, 1)

    def run(draws: Draws) -> Result:
        signs = draws[0] if draws else torch.randint(2, shape)
        bpd, _, nfe = baselines.likelihood(sde, network, x, signs.float() * 2 - 1, 1e-4, 1e-4)
        return Result(bpd, nfe)

    return run


def likelihood_of_ours(shape: Shape) -> Run:
    network, x = digits_network("vp"), normal(shape).clamp(-1, 1)
    likelihood_fn = likelihood.get_likelihood_fn(VPSDE(), lambda x: x * 0, rtol=1e-4, atol=1e-4)

    def run(draws: Draws) -> Result:
        signs = draws[0] if draws else torch.randint(2, shape)
        with noise.replay([signs]):
            bpd, _, nfe = likelihood_fn(network, x)
        return Result(bpd, nfe)

    return run


# ---- what memory allows ----


def copy_of(shape: Shape) -> Run:
    """As many bytes as perturbation and loss have to move: two arrays read, two written."""
    source, target = normal(shape), torch.empty(shape)

    def run(draws: Draws) -> Result:
        target.copy_(source)
        target.copy_(source)
        return Result(source)

    return run


def none(shape: Shape) -> list[Tensor]:
    return []


IMAGES: tuple[Shape, ...] = ((64, 3, 32, 32), (16, 3, 256, 256))
SOLVER_SHAPES: tuple[Shape, ...] = ((64, 3, 32, 32), (4096, 2), (64, 2))
LOSS: dict[str, Callable[[Shape], Run]] = {
    EAGER: loss_of_baseline,
    COMPILED: functools.partial(loss_of_baseline, compiled=True),
    OURS: loss_of_ours,
}


def step_competitors(kind: str, step: Callable[..., Any]) -> dict[str, Callable[[Shape], Run]]:
    return {
        EAGER: functools.partial(step_of_baseline, step),
        COMPILED: functools.partial(step_of_baseline, step, compiled=True),
        OURS: functools.partial(step_of_ours, kind),
    }


CASES = {
    case.name: case
    for case in (
        Case(
            "loss step", "step", EAGER, LOSS, loss_draws, 1e-5,
            ((16, 3, 256, 256), (128, 3, 32, 32), (4096, 2)), ((128, 3, 32, 32), (4096, 2)),
        ),
        Case(
            "predictor", "step", EAGER, step_competitors("predictor", baselines.euler_maruyama),
            lambda shape: [normal(shape, 2)], 1e-5, IMAGES, IMAGES[:1],
        ),
        Case(
            "corrector", "step", EAGER, step_competitors("corrector", baselines.langevin),
            lambda shape: [normal(shape, 2)], 1e-5, IMAGES, IMAGES[:1],
        ),
        Case(
            "ODE solver", "evaluation", "scipy RK45",
            {
                "scipy RK45": functools.partial(solve_of_baseline, baselines.scipy_rk45),
                "torchdiffeq dopri5": functools.partial(solve_of_baseline, baselines.torchdiffeq_dopri5),
                "torchode dopri5": functools.partial(solve_of_baseline, baselines.torchode_dopri5),
                OURS: solve_of_ours,
            },
            none, 1e-5, SOLVER_SHAPES, SOLVER_SHAPES[:2],
        ),
        Case(
            "multistep solver", "evaluation", "k-diffusion loop",
            {"k-diffusion loop": karras_of_baseline, OURS: karras_of_ours},
            none, 1e-4, SOLVER_SHAPES, SOLVER_SHAPES[:2],
        ),
        Case(
            "likelihood", "evaluation", "scipy, two network runs",
            {"scipy, two network runs": likelihood_of_baseline, OURS: likelihood_of_ours},
            lambda shape: [(normal(shape, 2) > 0).long()], 1e-3, ((64, 1, 8, 8),), ((16, 1, 8, 8),),
        ),
        Case(
            BY_SIZE, "element", EAGER, {EAGER: loss_of_baseline, OURS: loss_of_ours}, loss_draws, 1e-5,
            tuple((16, 2**i) for i in (6, 9, 12, 15, 18, 21, 23)), tuple((16, 2**i) for i in (6, 11, 15)),
        ),
    )
}  # fmt: skip
COPY = "copy"  # the limit that is drawn into the picture of a case by size
