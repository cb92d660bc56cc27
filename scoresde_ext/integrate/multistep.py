"""Exponential multistep methods for the probability flow of an affine SDE: one evaluation a step.

In the log-SNR ``l = log(m / s)`` the flow is (Lu et al. 2022, arXiv 2211.01095, proposition 4.1)

    x(l1) = (s1 / s0) x(l0) + s1 int_l0^l1 exp(l) D(l) dl,

with ``D`` the network's prediction of the data. UniPC (Zhao et al. 2023, arXiv 2302.04867) puts for D the polynomial
through its last values (the predictor), evaluates once at the state that gives, and repeats the step with that value
among them (the corrector, of one order more). Here the polynomial is one in the angle atan(2 s / m), not in the
log-SNR: D is smooth in s / m at both ends, where the log-SNR runs to infinity (on mixtures 0.75 to 0.85 times the
evaluations at equal error). The integral is exact for any spacing of the values. Either update, and D itself, is a
linear combination of arrays: a step is one kernel and a matrix.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .drift import Drift, Time
from .results import Status
from .run import column, padded
from .runge_kutta import nan_alone
from .stepping import OnGrid, Stepping

MULTISTEP = ("unipc", "dpmpp_2m")


class Flow(Drift, Protocol):
    """What is asked of the probability flow of an affine SDE."""

    sde: Any

    def network(self, x: Tensor, t: Time) -> Tensor: ...

    def marginal(self, t: Any) -> tuple[Any, Any, Any]: ...


@runtime_checkable
class CalibratedGrid(Protocol):
    """Times, and the matrices of the steps between them (see :func:`grid_tables`)."""

    @property
    def times(self) -> tuple[float, ...]: ...

    def tables(self, flow: Flow) -> Tensor: ...


# ---- coefficients ----


@functools.cache
def quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1], ``(32, 1)``: exact to rounding for every h that occurs. Moved to a device once."""
    nodes, weights = (torch.from_numpy(v)[:, None] for v in np.polynomial.legendre.leggauss(32))
    return (0.5 * (nodes + 1.0)).to(device), (0.5 * weights).to(device)


def angle_at(log_snr: Tensor) -> Tensor:
    """The variable of the polynomials."""
    return torch.atan(2.0 * torch.exp(-log_snr))


def integral_weights(l0: Tensor, l1: Tensor, nodes: Tensor, valid: Tensor | None = None) -> Tensor:
    """``(K, R)``: the weights w with ``exp(-l1) int_l0^l1 exp(l) D dl = sum_j w_j D_j`` for the polynomial D in the
    angle through the values D_j at ``nodes`` ``(K, R)``, those that are ``valid``; ``l0`` and ``l1`` are log-SNR
    ``(R,)``. All float64."""
    h = l1 - l0
    u, weight = quadrature(h.device)
    angle = angle_at(l0 + u * h)
    damped = weight * torch.exp((u - 1.0) * h) * h
    result = []
    for j in range(len(nodes)):
        basis = damped
        for i in range(len(nodes)):
            if i != j:
                factor = (angle - nodes[i]) / (nodes[j] - nodes[i])
                basis = basis * (factor if valid is None else torch.where(valid[i], factor, 1.0))
        total = basis[0]
        for term in basis[1:]:  # in order: how torch sums depends on where in memory a column lies
            total = total + term
        result.append(total if valid is None else torch.where(valid[j], total, 0.0))
    return torch.stack(result)


def midpoint_weights(l0: Tensor, l1: Tensor, nodes: Tensor) -> Tensor:
    """The weights of DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    h = l1 - l0
    whole = -torch.expm1(-h)
    if len(nodes) == 1:
        return whole[None]
    slope = h / (2.0 * torch.log(torch.tan(nodes[1]) / torch.tan(nodes[0])))  # over the step before
    return torch.stack([whole * (1.0 + slope), -whole * slope])


class Point:
    """What a step needs to know of one end: the log-SNR l, the angle, m, s, and D = a x + b out; each ``(R,)``."""

    ROWS: ClassVar[dict[str, int]] = dict.fromkeys(("l", "angle", "m", "s", "a", "b"), 0)

    def __init__(self, m: Tensor, s: Tensor, k: Tensor) -> None:
        self.l, self.angle = padded(lambda ratio: (-torch.log(ratio), torch.atan(2.0 * ratio)), s / m)
        self.m, self.s = m, s
        self.a, self.b = 1.0 / m, s * s * k / m

    def where(self, chosen: Tensor, other: Point) -> Point:
        """``other`` in the chosen rows."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            setattr(new, name, torch.where(chosen, getattr(other, name), value))
        return new


def grid_tables(flow: Flow, times: Sequence[float], order: int, method: str) -> Tensor:
    """``(N, 3, 3 + order)``: one matrix a step for the states ``[x_{i-1}, p_i, out_i, D_{i-1}, ..., D_{i-order}]``,
    giving ``[D_i, x_i, p_{i+1}]``, where p_i is the predicted and x_i the corrected state. The last step is not
    corrected, so that N steps are N evaluations."""
    t = torch.tensor(times, dtype=torch.float64)
    m, s, k = flow.marginal(t)
    points = [Point(*v) for v in zip(m[:, None], s[:, None], k[:, None], strict=True)]
    unit = torch.eye(3 + order, dtype=torch.float64)
    tables = []
    for i in range(len(times) - 1):
        here, known = points[i], min(order, i)
        history = list(unit[3 : 3 + known])
        value = here.a * unit[1] + here.b * unit[2]
        corrected = unit[1]
        if method == "unipc" and i > 0:
            before = points[i - 1]
            nodes = torch.stack([points[i - j].angle for j in range(known + 1)])
            corrected = _update(before, here, unit[0], [value, *history], integral_weights(before.l, here.l, nodes))
        used = min(order, i + 1)
        nodes = torch.stack([points[i - j].angle for j in range(used)])
        weights = integral_weights if method == "unipc" else midpoint_weights
        predicted = _update(
            here, points[i + 1], corrected, [value, *history][:used], weights(here.l, points[i + 1].l, nodes)
        )
        tables.append(torch.stack([value, corrected, predicted]))
    return torch.stack(tables)


def _update(before: Point, after: Point, x: Tensor, values: list[Tensor], weights: Tensor) -> Tensor:
    """``x(l1)`` as a row of coefficients, from those of x(l0) and of the values of D."""
    row = (after.s / before.s) * x
    for w, value in zip(weights, values, strict=True):
        row = row + after.m * w * value
    return row


# ---- fixed grid ----


class FixedGrid(OnGrid):
    """Steps to the times of ``grid`` with a matrix each: those of theory, or others."""

    def __init__(self, grid: Sequence[float], tables: Tensor, flow: Flow, *args: Any) -> None:
        super().__init__(grid, flow, *args)
        self.flow, self.tables = flow, tables

    def integrate(self) -> None:
        (x,) = self.ys
        self.tables = self.tables.to(x.device, ops.compute_dtype(x))
        self.drive()

    def step(self) -> None:
        """All steps."""
        (x,) = self.ys
        predicted, values = x, [torch.zeros_like(x)] * (self.tables.shape[2] - 3)
        for i, table in enumerate(self.tables):
            t, t_next = self.grid[i], self.grid[i + 1]
            out = self.call(self.flow.network, predicted, t)
            value, x, predicted = ops.combine([x, predicted, out, *values], table)
            values = [value, *values[:-1]]
            self.end_step(t, t_next, (predicted,))
        self.ys = (predicted,)


# ---- adaptive ----


# Steps are in log-SNR. Both numbers, and those of the controller, are measured: docs/performance.md.
FIRST_STEP = 0.5
LARGEST_GROWTH = 2.5


class Adaptive(Stepping):
    """UniPC with step sizes from the gap between predictor and corrector, which takes no evaluation more.

    ``R`` rows of numbers: one for the batch, or one a sample. Each keeps its last ``order`` values of D in slots, in no
    order: the weights of a polynomial through nodes do not ask for one.

    Where samples fail under joint control, the others are integrated again from the start without them.
    """

    ROWS = (
        Stepping.ROWS
        | dict.fromkeys(("x", "here", "last", "sign", "values", "taken", "spoilt", "norm_before"), 0)
        | {"nodes": 1}
    )
    STATE = (
        *(name for name in Stepping.STATE if name != "ys"),
        "x", "values", "nodes", "taken", "here", "spoilt", "norm_before", "target",
    )  # fmt: skip

    def __init__(
        self, order: int, rtol: float, atol: float, first_step: float | None, per_sample: bool, flow: Flow, *args: Any
    ) -> None:
        super().__init__(flow, *args)
        self.flow, self.order, self.rtol, self.atol, self.per_sample = flow, order, rtol, atol, per_sample
        self.first_step = FIRST_STEP if first_step is None else first_step

    # -- rows and samples

    def combine(self, arrays: Sequence[Tensor], *matrix: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One result for each line of the matrix, whose entries are ``(R,)`` or ``(n, R)``."""
        lines = [torch.cat([v if v.dim() == 2 else v[None] for v in line]) for line in matrix]
        table = torch.stack(lines)
        return ops.combine(arrays, table if self.per_sample else table[..., 0])

    def norm(self, sums: Tensor, n: int) -> Tensor:
        if self.per_sample:
            return (sums / max(n, 1)) ** 0.5
        if not self.on_host:
            running = self.running
            return (torch.where(running, sums, 0.0).sum() / (n * running.sum()).clamp(min=1)).sqrt()[None]
        healthy = sums[self.running]
        return (healthy.sum() / max(n * len(healthy), 1)).sqrt()[None]

    # -- the flow

    def point(self, t: Tensor) -> Point:
        return Point(*self.flow.marginal(t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        early, late = sorted((self.start, self.end))
        (t,) = padded(lambda v: (self.flow.sde.time_at(v),), log_snr)
        return t.clamp(early, late)

    def weights(self, there: Point, l1: Tensor, with_new: bool) -> Tensor:
        """``(slots, R)``: of the values of D in the slots, before them of the one at ``there`` where that is known."""
        nodes, valid = self.nodes, self.slots < self.taken
        if with_new:
            nodes = torch.cat([there.angle[None], nodes])
            valid = torch.cat([torch.ones_like(valid[:1]), valid])
        (weights,) = padded(lambda *v: (integral_weights(*v),), self.here.l, l1, nodes, valid)
        return weights

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(self.flow.network, x, t.item() if self.on_host and not self.per_sample else t)

    # -- the loop

    def integrate(self) -> None:
        if len(self.status) == 0:
            return
        while bool(self.running.any()):
            self.times, self.step_sizes, self.error_norms = [self.start], [], []
            for counts in (self.evaluations, self.n_accepted, self.n_rejected):
                counts[self.running] = 0
            self.begin()
            self.drive()
            self.ys = (self.x,)
            if not self.per_sample and bool(self.t == self.end):
                self.end_as(self.running, Status.SUCCESS)

    def begin(self) -> None:
        (x,) = self.y0
        rows = len(x) if self.per_sample else 1
        self.start_stepping(torch.full((rows,), self.start, dtype=torch.float64, device=x.device))
        self.x = x if self.on_host else x.clone()
        self.here, self.last = self.point(self.t), self.point(torch.full_like(self.t, self.end))
        self.sign = (self.last.l - self.here.l).sign()
        out = self.network(x, self.t)
        self.evaluations += self.running
        value = self.combine([x, out], [self.here.a, self.here.b])[0]
        self.end_as(self.lost((value,)), Status.NOT_FINITE)
        self.values = [value, *(torch.zeros_like(x) for _ in range(self.order - 1))]
        self.nodes = torch.zeros((self.order, rows), dtype=torch.float64, device=x.device)
        self.nodes[0] = self.here.angle
        self.taken = torch.ones((rows,), dtype=torch.int64, device=x.device)
        self.slots = torch.arange(self.order, device=x.device)[:, None]
        self.h = torch.full_like(self.t, self.first_step)
        self.spoilt = torch.zeros_like(self.running)  # samples that made the last step overflow
        self.norm_before, self.target = torch.ones_like(self.t), self.t

    def give_up(self) -> None:
        """Rows that cannot go on end. Where an overflow is the reason, the samples it came from end, and the others of
        the row start again."""
        active = self.on_their_way()
        tiny, spent = self.h < 1e-13 * (1.0 + self.here.l.abs()), self.attempts >= self.max_steps
        stuck = active & (tiny | spent)
        if self.maybe(stuck):
            self.end_as(self.of_batch(stuck & self.overflow) & self.spoilt, Status.NOT_FINITE)
            rest = self.of_batch(stuck & ~self.overflow)
            self.end_as(rest & self.of_batch(tiny), Status.STEP_SIZE)
            self.end_as(rest, Status.MAX_STEPS)
            if not self.per_sample:
                self.stop = self.stop | stuck

    def step(self) -> None:
        """One attempted step of every active row."""
        t, x, here, active = self.t, self.x, self.here, self.active()
        left = (self.last.l - here.l).abs()
        ends = self.h >= left * (1.0 - 1e-12)
        h = torch.where(active, torch.minimum(self.h, left), 1.0)  # a row that is done has any step: it stays
        t_new = self.time_at(torch.where(active, here.l + self.sign * h, here.l))
        t_new = torch.where(active, torch.where(ends, self.end, t_new), t)
        new, value, predicted, out, there = self.attempt(t_new)
        sums = ops.rk_error(x, new, [new, predicted], (1.0, -1.0), 1.0, self.rtol, self.atol)
        norm = self.norm(sums, math.prod(x.shape[1:]))
        accepted, h_next = self.control(norm, h, active)
        t_after = torch.where(accepted, t_new, t)
        self.note(torch.where(active, h, math.nan), torch.where(active, norm, math.nan), t_after, active, accepted)
        overflow = ~norm.isfinite() & active
        if not self.on_host:
            self.look = self.look | overflow.any()
            self.spoilt = torch.where(self.of_batch(active), ~sums.isfinite(), self.spoilt)
            self.target = torch.where(active, t_new, self.target)
        elif bool(overflow.any()):
            self.spoilt = self.lost((new, predicted, out)) | ~sums.isfinite()
            self.end_bad(nan_alone([new, predicted, out]))
        if self.dense is not None:
            self.record(t, t_new, accepted, there, value, new)
        self.h = torch.where(active, h_next, self.h)
        self.rejected = torch.where(active, ~accepted, self.rejected)
        self.overflow = torch.where(active, overflow, self.overflow)
        self.keep(accepted, t_after, there, new, value)
        self.give_up()
        self.go_on()

    def attempt(self, t_new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Point]:
        """A step to ``t_new``: the state, D, the predicted state, the network's output there, and the point."""
        x, here, there = self.x, self.here, self.point(t_new)
        scale = there.s / here.s
        (predicted,) = self.combine([x, *self.values], [scale, there.m * self.weights(there, there.l, False)])
        out = self.network(predicted, t_new)
        corrector = there.m * self.weights(there, there.l, True)
        first, past, zero = corrector[0], corrector[1:], torch.zeros_like(self.t)
        new, value = self.combine(
            [x, predicted, out, *self.values],
            [scale, first * there.a, first * there.b, past],
            [zero, there.a, there.b, torch.zeros_like(past)],
        )
        return new, value, predicted, out, there

    def end_bad(self, nan: Tensor) -> None:
        """Samples with NaN end; under joint control the others start again."""
        bad = nan & self.running
        self.end_as(bad, Status.NOT_FINITE)
        if not self.per_sample:
            self.stop = self.stop | bad.any()

    def attend(self) -> None:
        """The attempt that overflowed is made again to see what it gave, from the state that it left as it was."""
        before = self.nfe
        new, _, predicted, out, _ = self.attempt(torch.where(self.overflow, self.target, self.t))
        self.nfe = before
        self.end_bad(self.of_batch(self.overflow) & nan_alone([new, predicted, out]))
        self.give_up()

    def control(self, norm: Tensor, h: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Proportional-integral control (Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations II", section
        IV.2): a rejected step costs what an accepted one does and brings nothing, and this halves them."""
        k, accepted = self.order + 1, (norm < 1.0) & active
        positive = norm.clamp(min=1e-12)  # predictor and corrector may agree
        onward, again = padded(
            lambda norm, before: (0.9 * norm ** (-0.9 / k) * before ** (0.5 / k), 0.9 * norm ** (-1.0 / k)),
            positive,
            self.norm_before,
        )
        onward = onward.clamp(0.2, LARGEST_GROWTH)
        onward = torch.where(self.rejected, onward.clamp(max=1.0), onward)
        again = torch.where(norm.isfinite(), again.clamp(min=0.2), 0.2)
        # A gap that vanishes by chance must not make the step after it look bad.
        self.norm_before = torch.where(accepted, norm.clamp(min=1e-3), self.norm_before)
        return accepted, h * torch.where(accepted, onward, again)

    def keep(self, accepted: Tensor, t_after: Tensor, there: Point, new: Tensor, value: Tensor) -> None:
        """The step in the rows that accepted it."""
        write = accepted & (self.slots == self.taken % self.order)
        self.values = [self.chosen(w, value, v) for w, v in zip(write, self.values, strict=True)]
        self.nodes = torch.where(write, there.angle, self.nodes)
        self.x = self.chosen(accepted, new, self.x)
        self.here = self.here.where(accepted, there)
        self.t, self.taken = t_after, self.taken + accepted
        self.ys, self.reached = (self.x,), torch.where(self.running, self.of_batch(self.t), self.reached)
        if self.per_sample:
            self.end_as(self.t == self.end, Status.SUCCESS)
        if self.on_host and (self.per_sample or bool(accepted)):
            self.show_progress()

    def record(self, t: Tensor, t_new: Tensor, accepted: Tensor, there: Point, value: Tensor, new: Tensor) -> None:
        """The states at those times of ``t_eval`` that lie in the steps just accepted: the step's own formula, as far
        as that time."""
        assert self.dense is not None
        (dense,) = self.dense
        for i, at in enumerate(self.t_eval):
            inside = accepted & ((at - t) * (at - t_new) <= 0)
            if self.maybe(inside):
                point = self.point(torch.full_like(t, at))
                weights = point.m * self.weights(there, point.l, True)
                (state,) = self.combine([self.x, value, *self.values], [point.s / self.here.s, weights])
                state = torch.where(column(self.of_batch(t_new == at), new), new, state)
                dense[i] = torch.where(column(self.of_batch(inside), state), state, dense[i])
