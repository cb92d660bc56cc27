"""Sampling along the reverse-time SDE in a few dozen evaluations (Song et al. 2021, eq. 6).

With ``D`` the network's prediction of the data and the log-SNR ``l = log(m / s)`` as time, the reverse SDE of every
affine SDE is (Lu et al. 2022, arXiv 2211.01095, appendix on SDE-DPM-Solver++)

    x(l1) = (s1 / s0) exp(-h) x(l0) + 2 s1 int_l0^l1 exp(2 l - l1) D(l) dl + s1 sqrt(1 - exp(-2 h)) z,    h = l1 - l0,

so that only D has to be approximated: with a constant D the step is the exact Gaussian transition. For ``v = (m / s^2)
x`` and the clock ``tau = (m / s)^2 = exp(2 l)`` it reads ``dv = D dtau + dW(tau)``: a drift, and a plain Brownian
motion, whose increments are the noise of a step of any length.

So one :class:`BrownianTree` serves every method. With the same seed, T and eps, each sample follows one path W, in any
number of steps: more steps bring it nearer to the exact solution on that path, not to another picture. A step size that
is tried and rejected does not disturb the path either.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise, repeat
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import noise, ops
from .callers import say_no_gradient, untraced
from .checks import (
    check_choice,
    check_device,
    check_eps,
    check_flags,
    check_latent,
    check_scaler,
    check_shape,
    check_times,
    check_tolerances,
    whole,
)
from .flow import ProbabilityFlow
from .foreign import recognised
from .integrate import Solution, SolverError, Status, Stream
from .integrate.run import Run, column, padded
from .integrate.runge_kutta import nan_alone
from .models.program import score_function
from .ode import InverseScaler
from .reference import Draw
from .sde_lib import SDE, AffineSDE, is_affine

FIXED = ("dpmpp_2m_sde", "unipc_sde")
METHODS = (*FIXED, "adaptive")


def get_sde_sampler(
    sde: SDE,
    shape: Sequence[int],
    inverse_scaler: InverseScaler | None,
    *,
    method: str = "unipc_sde",
    steps: int | None = None,
    grid: Sequence[float] | Tensor | None = None,
    order: int = 2,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    max_steps: int = 10_000,
    eps: float = 1e-3,
    denoise: bool = True,
    seeds: noise.Seeds = None,
    device: torch.device | str = "cuda",
    on_failure: str = "raise",
    progress: bool = False,
) -> SdeSampler:
    """``sampler(model, z=None, draw=None)`` -> ``(samples, nfe)``: samples of the reverse-time SDE from T to eps.
    ``sampler.solve(model, z=None, draw=None)`` -> the :class:`integrate.Solution`, ``y`` being the samples.

    Methods, with one evaluation a step:

    * ``dpmpp_2m_sde``: SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): D is continued from its last two
      values;
    * ``unipc_sde``: the same, and when D is known at the new point, the step is repeated with it (the evaluation is
      not), as in UniPC (Zhao et al. 2023, arXiv 2302.04867). With 20 to 50 steps, its samples' law is off by about a
      third as much;
    * ``adaptive``: ``unipc_sde`` with a step size for each sample, from the gap between its two results. A rejected
      step is tried again on the same Brownian path; drawing new noise would favour paths that are easy to follow.

    All follow the same Brownian path for the same seed, T and eps, where ``z`` is given to all or to none: twice the
    steps halve a sample's distance from the exact solution, and the adaptive method converges to the same sample.

    Args:
        sde: the forward SDE, an AffineSDE.
        shape: ``(B, *)``.
        inverse_scaler: maps the network's data range to the samples' range; None leaves the samples as they are.
        method: see above.
        steps: number of steps, equal in log-SNR; 50 without a ``grid``. Not for ``adaptive``.
        grid: the times of the steps, from T to eps, in place of ``steps``.
        order: 2, or 1 to continue D as a constant.
        rtol, atol: tolerances of ``adaptive``: the root mean square of a step's gap over ``atol + rtol |x|`` stays
            below 1.
        max_steps: attempted steps of ``adaptive`` after which a sample is given up.
        eps: last time.
        denoise: end with the prediction of the data at eps, which takes ``steps`` one evaluation more.
        seeds: a seed, of which sample b is stream b, or ``(seed, ids)``, with stream ``ids[b]``: the same samples every
            time, in any batch; ``draw=k`` gives call k noise of its own. None: the source of noise in force, by default
            torch's generator.
        device: where to sample.
        on_failure: ``raise`` a :class:`SolverError`, or return NaN in the samples that failed.
        progress: a progress bar on a terminal.

    ``z`` is the state at T, ``(B, *)``, float32 or float64 and kept so; None draws it from the prior.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: samples could not be finished; ``.solution`` has the others, NaN where one failed.
    """
    process = recognised(sde)
    shape, device, inverse_scaler = check_shape(shape), check_device(device), check_scaler(inverse_scaler)
    eps = check_eps(eps, sde.T)
    rtol, atol = check_tolerances(rtol, atol)
    noise.seeded(seeds, shape[0])  # wrong seeds are refused now
    check_choice("method", method, METHODS)
    check_choice("on_failure", on_failure, ("raise", "status"))
    check_flags(denoise=denoise, progress=progress)
    order, max_steps = whole("order", order, 1, 2), whole("max_steps", max_steps, 1, expected="a number of steps")
    if not is_affine(process):
        raise ValueError(f"sde: expected an AffineSDE, which says what its transitions are, got {type(sde).__name__}.")
    times = _times(process, eps, method, steps, grid)  # wrong ones are refused now
    grid = times if grid is not None else None

    make_run = functools.partial(
        _make_run, method, steps, grid, order, rtol, atol, denoise, (float(sde.T), float(eps)), max_steps, progress
    )
    return SdeSampler(sde, shape, inverse_scaler, make_run, seeds, device, on_failure)


def _make_run(
    method: str,
    steps: int | None,
    grid: Any,
    order: int,
    rtol: float,
    atol: float,
    denoise: bool,
    span: tuple[float, float],
    max_steps: int,
    progress: bool,
    flow: ProbabilityFlow,
    x: Tensor,
) -> Run:
    problem = (span, (x,), False, max_steps, None, progress)
    times = _times(flow.sde, span[1], method, steps, grid)  # type: ignore[arg-type]
    if times is None:
        check_tolerances(rtol, atol, x)
        return Adaptive(order, rtol, atol, denoise, flow, *problem)
    return FixedSteps(times, order, method == "unipc_sde", denoise, flow, *problem)


def _times(sde: AffineSDE, eps: float, method: str, steps: int | None, grid: Any) -> list[float] | None:
    """The times of fixed steps, from T to eps; None for the adaptive method."""
    if method == "adaptive":
        if steps is not None or grid is not None:
            raise ValueError("steps, grid: method 'adaptive' chooses its own steps. Leave both out.")
        return None
    if grid is not None:
        if steps is not None:
            raise ValueError("steps, grid: expected one of them, got both.")
        return check_times("grid", grid, sde.T, eps)
    steps = 50 if steps is None else whole("steps", steps, 1, expected="a number of steps")
    log_snr = torch.linspace(sde.log_snr(float(sde.T)), sde.log_snr(eps), steps + 1, dtype=torch.float64)
    return [float(sde.T), *sde.time_at(log_snr[1:-1]).tolist(), float(eps)]


class SdeSampler:
    """What :func:`get_sde_sampler` returns."""

    def __init__(
        self,
        sde: SDE,
        shape: tuple[int, ...],
        inverse_scaler: InverseScaler,
        make_run: Callable[[ProbabilityFlow, Tensor], Run],
        seeds: noise.Seeds,
        device: torch.device,
        on_failure: str,
    ) -> None:
        self.sde, self.shape, self.inverse_scaler, self.make_run = sde, shape, inverse_scaler, make_run
        self.seeds, self.device, self.on_failure, self.draws = seeds, device, on_failure, noise.Draws(seeds)

    @untraced
    def __call__(self, model: Any, z: Tensor | None = None, *, draw: int | None = None) -> tuple[Tensor, int]:
        solution = self.solve(model, z, draw=draw)
        return solution.y, solution.nfe

    @untraced
    def solve(self, model: Any, z: Tensor | None = None, *, draw: int | None = None) -> Solution:
        """The samples with what they took."""
        flow = ProbabilityFlow(self.sde, score_function(self.sde, model, False, True))
        flow.require_affine("get_sde_sampler")
        if z is not None:
            check_latent(z, self.shape, self.device)
            say_no_gradient("z", z)
        with torch.no_grad(), self.draws(self.shape[0], draw):
            x = noise.prior(self.sde, self.shape, self.device) if z is None else z.detach().contiguous()
            run = self.make_run(flow, x)
            with noise.run(x.device):
                solution = run.solve("status")
            solution = replace(solution, y=self.inverse_scaler(solution.y))
        if self.on_failure == "raise" and not solution.success:
            raise SolverError(solution.message, solution) from run.error
        return solution

    @untraced
    def stream(self, model: Any, slots: int, *, draw: int = 0) -> Stream:
        """The samples of ``adaptive`` one by one, ``slots`` at a time, as :meth:`solve` would give them under
        ``seeds``; the slot of a finished sample goes to the next. One that fails is NaN and has its status; nothing is
        raised for it. See :func:`scoresde_ext.integrate.stream`."""
        flow = ProbabilityFlow(self.sde, score_function(self.sde, model, False, True))
        flow.require_affine("get_sde_sampler")

        def begin(first: int, stop: int) -> tuple[Run, None]:
            with noise.seeded(noise.part(self.seeds, first, stop), stop - first, draw):
                x = noise.prior(self.sde, (stop - first, *self.shape[1:]), self.device)
                run = self.make_run(flow, x)
                if not isinstance(run, Adaptive):
                    raise ValueError("method: a stream expects 'adaptive'; fixed steps have no slots to refill.")
                with noise.run(x.device):
                    run.begin()
            return run, None

        return Stream(begin, self.shape[0], slots, lambda group: group._replace(y=self.inverse_scaler(group.y)))


# ---- one step ----


class Point(NamedTuple):
    """What a step needs to know of one end, ``(R,)``, float64: log-SNR, m, s, and D = a x + b out."""

    log_snr: Tensor
    m: Tensor
    s: Tensor
    a: Tensor
    b: Tensor

    @staticmethod
    def of(log_snr: Tensor, m: Tensor, s: Tensor, k: Tensor) -> Point:
        return Point(log_snr, m, s, 1.0 / m, s * s * k / m)


class Step(NamedTuple):
    """The numbers of a step: ``(R,)``, float64."""

    scale: Tensor  # of x: (s1 / s0) exp(-h)
    gain: Tensor  # of D: m1 (1 - exp(-2 h))
    ratio: Tensor  # of this step's length to that of the step before; 0 where D is taken as constant
    noise: Tensor  # of the increment of W over the step, s1^2 / m1

    def continued(self) -> tuple[Tensor, Tensor]:
        """What D at the start and D one step before are multiplied by: D is continued through both."""
        slope = 0.5 * self.gain * self.ratio
        return self.gain + slope, -slope


def step_between(here: Point, there: Point, ratio: Tensor) -> Step:
    """The step from one point to another. The slope of D counts with (1 - exp(-2 h)) / 2, as in DPM-Solver++(2M): with
    the exact integral, h-dependent, the law of the samples is further off."""

    def exponentials(h: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(-h), -torch.expm1(-2.0 * h)

    decay, renewed = padded(exponentials, there.log_snr - here.log_snr)
    return Step(there.s / here.s * decay, there.m * renewed, ratio, there.s * there.s / there.m)


# ---- fixed steps ----


class FixedSteps(Run):
    """Steps to the times of a grid, with one kernel for what is linear in the network's output and one for the
    noise."""

    def __init__(
        self, grid: Sequence[float], order: int, corrected: bool, denoise: bool, flow: ProbabilityFlow, *args: Any
    ) -> None:
        super().__init__(flow, *args)
        self.flow, self.grid, self.denoise = flow, grid, denoise
        m, s, k = flow.marginal(torch.tensor(grid, dtype=torch.float64))
        self.points = Point.of(torch.log(m / s), m, s, k)
        self.tables = self.coefficients(order, corrected)

    def coefficients(self, order: int, corrected: bool) -> Tensor:
        """``(N, 2, 6)``: one matrix a step for the arrays ``[p_i, out_i, D_{i-1}, D_{i-2}, W_i, W_{i+1}]``, giving
        ``[D_i, p_{i+1}]``, where p_i is the predicted state at time i. A step starts from the corrected state, p_i and
        half the gain of the step before times ``D_i - D_{i-1} - r (D_{i-1} - D_{i-2})``, with the ratio r of that
        step."""
        here, there = Point(*(v[:-1] for v in self.points)), Point(*(v[1:] for v in self.points))
        h = there.log_snr - here.log_snr
        ratio, correction, ratio_before = torch.zeros((3, len(h)), dtype=torch.float64)
        if order == 2:
            ratio[1:] = h[1:] / h[:-1]
        step = step_between(here, there, ratio)
        now, past = step.continued()
        if corrected:
            correction[1:], ratio_before[1:] = 0.5 * step.scale[1:] * step.gain[:-1], ratio[:-1]
        zero = torch.zeros_like(h)
        value = torch.stack([here.a, here.b, zero, zero, zero, zero], 1)
        past, before = past - correction * (1.0 + ratio_before), correction * ratio_before
        following = torch.stack([step.scale, zero, past, before, -step.noise, step.noise], 1)
        return torch.stack([value, (now + correction)[:, None] * value + following], 1)

    def path(self, like: Tensor) -> Iterator[Tensor]:
        """W at the times of the grid after the first."""
        log_snr = self.points.log_snr.tolist()
        if noise.streams_in_force(like.device) is not None:
            yield from BrownianTree(like, log_snr[0], log_snr[-1]).along(log_snr[1:-1])
            return
        w = torch.zeros_like(like)  # recorded noise is that of the steps
        for here, there in pairwise(log_snr):
            w = ops.perturb(w, 1.0, math.exp(here) * math.sqrt(math.expm1(2 * (there - here))), noise.normal(w))
            yield w

    def integrate(self) -> None:
        (p,) = self.ys
        tables = self.tables.to(p.device)
        self.first_step = abs(self.grid[1] - self.grid[0])
        last, second_last, w = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
        for i, (table, w_next) in enumerate(zip(tables, self.path(p), strict=True)):
            t, t_next = self.grid[i], self.grid[i + 1]
            out = self.call(self.flow.network, p, t)
            value, p = ops.combine([p, out, last, second_last, w, w_next], table)
            last, second_last, w = value, last, w_next
            self.times.append(t_next)
            self.step_sizes.append(abs(t_next - t))
            self.reach(p, t_next)
            self.n_accepted += self.running
        if self.denoise:
            a, b = self.points.a[-1].item(), self.points.b[-1].item()  # D = a x + b out
            p = ops.affine(p, self.call(self.flow.network, p, self.end), a, b)
            self.reach(p, self.end)
        self.ys = (p,)
        self.end_as(self.running, Status.SUCCESS)

    def reach(self, x: Tensor, t: float) -> None:
        """Samples with NaN or Inf after the evaluation that led to ``t`` stay behind."""
        self.evaluations += self.running
        self.end_as(self.lost((x,)), Status.NOT_FINITE)
        self.reached = torch.where(self.running, t, self.reached)
        self.show(abs(t - self.start) / abs(self.end - self.start))


# ---- the Brownian path ----


class BrownianTree:
    """A Brownian motion W for each sample, at ``2^LEVELS + 1`` points at equal distances in log-SNR, in the clock
    ``exp(2 l)``: a pure function of the seed, the sample's stream, and the point.

    W is known at both ends; in the middle of an interval it is normal about the value interpolated between the
    interval's ends (Levy's construction), and so on down to the point that is asked for. Each middle has a stream of
    its own: its number, counted from a random 64-bit number of the sample's.
    """

    LEVELS = 30
    END = 2**LEVELS
    ROWS: ClassVar[dict[str, int]] = {"like": 0, "base": 0, "at_end": 0}

    def __init__(self, like: Tensor, start: float, end: float) -> None:
        self.like, self.start, self.spacing = like, start, (end - start) / self.END
        self.key, ids = noise.streams(like)
        high, low = ops.noise_integers(self.key, ids, 0, (len(ids), 2), 2**32).unbind(1)
        self.base = (high << 32) | low
        whole = math.exp(start) * math.sqrt(math.expm1(2 * (end - start)))
        self.at_end = ops.perturb(torch.zeros_like(like), 0.0, whole, self.draw(0))

    def log_snr(self, j: Tensor) -> Tensor:
        return self.start + self.spacing * j.double()

    def draw(self, points: Tensor | int) -> Draw:
        return Draw(key=self.key, ids=self.base + points)

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Per level, ``(LEVELS, 1)``: the width of an interval, the weight of its right end in the middle, and the
        standard deviation there over exp(l_left)."""
        widths = [2 ** (self.LEVELS - level) for level in range(self.LEVELS)]
        bridges = [bridge(self.spacing * width / 2, self.spacing * width / 2) for width in widths]
        device = self.like.device
        weights, stds = torch.tensor(bridges, dtype=torch.float64, device=device).T[..., None]
        return torch.tensor(widths, device=device)[:, None], weights, stds

    def __call__(self, j: Tensor) -> Tensor:
        """W at one point of each sample, whatever was asked before: ``j`` is int64 ``(B,)``, 0 ... END; ``(B, *)``, 0
        at the start."""
        depth = self.depth(j)
        width, weight, std = (v[:depth] for v in self.levels)
        start = j // width * width  # (depth, B): of the interval around j at each level
        middle = start + width // 2
        right = (j >= middle).double()  # whether the point lies in the right half
        (scale,) = padded(lambda log_snr: (torch.exp(log_snr),), self.log_snr(start).flatten())
        std = std * scale.reshape(start.shape)
        # W at the left end of the interval, and its increment over the interval; the same over the half taken
        left, increment = torch.zeros_like(self.like), self.at_end
        step, part = (right * weight, right * std), (weight + right * (1.0 - 2.0 * weight), (1.0 - 2.0 * right) * std)
        for level in range(depth):
            draw = self.draw(middle[level])
            _, left = ops.affine_noise(left, increment, 1.0, step[0][level], step[1][level], draw)
            increment = ops.perturb(increment, part[0][level], part[1][level], draw)
        return torch.where(column(j == self.END, left), self.at_end, left)

    def depth(self, j: Tensor) -> int:
        """Levels after which every point is a middle that has been passed."""
        inside = j[(j > 0) & (j < self.END)]
        lowest = torch.log2((inside & -inside).double()).round()
        return self.LEVELS - int(lowest.min()) if len(inside) else 0

    def along(self, log_snr: Sequence[float]) -> Iterator[Tensor]:
        """W at the same points of every sample, one after the other, and at the end: ``(B, *)`` each.

        Args:
            log_snr: rising, between the ends. The points of the tree next to these are meant.
        """
        points = [min(max(round((at - self.start) / self.spacing), 1), self.END - 1) for at in log_snr]
        yield from self._between((0, torch.zeros_like(self.like)), (self.END, self.at_end), points, False)
        yield self.at_end

    def _between(
        self, left: tuple[int, Tensor], right: tuple[int, Tensor], points: Sequence[int], alone: bool
    ) -> Iterator[Tensor]:
        """W at points inside an interval whose ends ``(j, W)`` are known. A middle is drawn once for all points. A
        point that was ``alone`` in the interval twice as long is drawn at once, without the middles that lead to it in
        the tree. The law is the same, and W differs from the tree's by little beside its steps between the points."""
        if not points:
            return
        (j_left, w_left), (j_right, w_right) = left, right
        j = points[0] if alone else (j_left + j_right) // 2
        weight, std = bridge(self.spacing * (j - j_left), self.spacing * (j_right - j))
        std *= math.exp(self.start + self.spacing * j_left)
        middle = j, ops.affine_next(w_left, w_right, 1.0 - weight, weight, std, self.draw(j))
        first, stop = bisect_left(points, j), bisect_right(points, j)
        yield from self._between(left, middle, points[:first], len(points) == 1)
        yield from repeat(middle[1], stop - first)
        yield from self._between(middle, right, points[stop:], len(points) == 1)


def bridge(before: float, after: float) -> tuple[float, float]:
    """W at a log-SNR between two points where it is known, ``before`` after the one and ``after`` before the other: the
    weight of the right one's in the mean, and the standard deviation over exp(l_left)."""
    whole, left, right = (math.expm1(2.0 * h) for h in (before + after, before, after))
    return left / whole, math.exp(before) * math.sqrt(left * right / whole)


# ---- adaptive steps ----

FIRST_STEP = 0.1  # in log-SNR
LARGEST_STEP = 0.5  # a longer one can pass over all that happens to D, and see no gap
LARGEST_GROWTH = 2.0  # of a step over the one before: D is continued by that much
ROUGHNESS = 1.5  # the gap of a step of length h is of order h times the change of D, which follows the path: sqrt(h)


class Adaptive(Run):
    """Every sample has its own step sizes, on a Brownian path of its own."""

    ROWS = Run.ROWS | dict.fromkeys(
        ("path", "j", "here", "x", "w", "last", "value", "h", "h_before", "rejected", "overflow"), 0
    )

    def __init__(self, order: int, rtol: float, atol: float, denoise: bool, flow: ProbabilityFlow, *args: Any) -> None:
        super().__init__(flow, *args)
        self.flow, self.order, self.rtol, self.atol, self.denoise = flow, order, rtol, atol, denoise

    def integrate(self) -> None:
        self.begin()
        while self.step():
            pass

    def begin(self) -> None:
        (x,) = self.ys
        sde: Any = self.flow.sde
        self.path = BrownianTree(x, sde.log_snr(self.start), sde.log_snr(self.end))
        self.j = torch.zeros((len(x),), dtype=torch.int64, device=x.device)
        self.here = self.point(self.j)
        out = self.call(self.flow.network, x, self.time(self.j))
        self.evaluations += 1
        self.x, self.w, self.last = x, torch.zeros_like(x), torch.zeros_like(x)
        self.value = ops.affine(x, out, self.here.a, self.here.b)
        self.h = torch.full_like(self.here.m, FIRST_STEP)
        self.h_before = torch.zeros_like(self.h)
        self.rejected = self.overflow = torch.zeros_like(self.h, dtype=torch.bool)
        self.first_step = FIRST_STEP

    def time(self, j: Tensor) -> Tensor:
        """The times of points of the path: exact at both ends."""
        sde: Any = self.flow.sde
        (t,) = padded(lambda log_snr: (sde.time_at(log_snr),), self.path.log_snr(j))
        t = torch.where(j == 0, self.start, torch.where(j == self.path.END, self.end, t))
        return t.clamp(self.end, self.start)

    def point(self, j: Tensor) -> Point:
        m, s, k = self.flow.marginal(self.time(j))
        return Point.of(self.path.log_snr(j), m, s, k)

    def target(self) -> Tensor:
        """The point to step to: h away, rounded down to a multiple of a power of two of h / 16 to h / 8. The path is
        then known after few levels."""
        points = (self.h / self.path.spacing).clamp(1.0, float(self.path.END))
        unit = torch.ones_like(self.j) << (torch.frexp(points).exponent.long() - 4).clamp(min=0)
        ahead = (self.j + points.long()) // unit * unit
        return torch.where(self.running, ahead.clamp(max=self.path.END), self.j)

    def can_go_on(self) -> bool:
        """Whether any sample can."""
        too_small = self.h < self.path.spacing
        self.end_as(self.overflow & too_small, Status.NOT_FINITE)
        self.end_as(too_small, Status.STEP_SIZE)
        self.end_as(self.n_accepted + self.n_rejected >= self.max_steps, Status.MAX_STEPS)
        return bool(self.running.any())

    def combine(self, arrays: Sequence[Tensor], *matrix: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return ops.combine(arrays, torch.stack([torch.stack(list(line)) for line in matrix]))

    def step(self) -> bool:
        """One attempted step of every sample that still runs; False where none can."""
        if not self.can_go_on():
            return False
        x, here = self.x, self.here
        j = self.target()
        there, t, w = self.point(j), self.time(j), self.path(j)
        h = torch.where(self.running, there.log_snr - here.log_snr, 1.0)
        first = (self.h_before == 0) | (self.order == 1)
        step = step_between(here, there, torch.where(first, 0.0, h / self.h_before.clamp(min=1e-300)))
        (predicted,) = self.combine(
            [x, self.value, self.last, self.w, w], [step.scale, *step.continued(), -step.noise, step.noise]
        )
        out = self.call(self.flow.network, predicted, t)
        half, one, zero = 0.5 * step.gain, torch.ones_like(h), torch.zeros_like(h)
        value, new = self.combine(
            [predicted, out, self.value, self.last],
            [there.a, there.b, zero, zero],
            [one + half * there.a, half * there.b, -half * (1.0 + step.ratio), half * step.ratio],
        )
        size = math.prod(x.shape[1:])
        norm = (ops.rk_error(x, new, [new, predicted], (1.0, -1.0), 1.0, self.rtol, self.atol) / max(size, 1)) ** 0.5
        self.overflow = ~norm.isfinite() & self.running
        if bool(self.overflow.any()):
            self.end_as(self.overflow & nan_alone([new, predicted, out]), Status.NOT_FINITE)
        self.keep(self.decide(norm, h), j, t, there, h, (new, value, self.value, w))
        return True

    def decide(self, norm: Tensor, h: Tensor) -> Tensor:
        """Which samples accept their step; sets the next step sizes."""
        running = self.running | self.overflow  # also those that have just failed made an attempt
        decision = ops.rk_control(norm, h, self.rejected, -1.0 / ROUGHNESS)
        accepted = (decision[0] > 0) & running
        self.h = torch.where(running, torch.minimum(decision[1], LARGEST_GROWTH * h).clamp(max=LARGEST_STEP), self.h)
        self.rejected = running & ~accepted
        self.evaluations += running
        self.n_accepted += accepted
        self.n_rejected += self.rejected
        self.step_sizes.append(torch.where(running, h, math.nan))
        self.error_norms.append(torch.where(running, norm, math.nan))
        return accepted

    def keep(self, accepted: Tensor, j: Tensor, t: Tensor, there: Point, h: Tensor, arrays: Sequence[Tensor]) -> None:
        """The step in the samples that accepted it."""
        before = (self.x, self.value, self.last, self.w)
        self.x, self.value, self.last, self.w = (
            torch.where(column(accepted, new), new, old) for new, old in zip(arrays, before, strict=True)
        )
        self.j = torch.where(accepted, j, self.j)
        self.here = Point(*(torch.where(accepted, new, old) for new, old in zip(there, self.here, strict=True)))
        self.ys = (self.value if self.denoise else self.x,)
        self.h_before = torch.where(accepted, h, self.h_before)
        self.reached = torch.where(accepted, t, self.reached)
        self.times.append(self.reached)
        self.end_as(self.j == self.path.END, Status.SUCCESS)
        self.show(1.0 - float(self.running.double().mean()))
