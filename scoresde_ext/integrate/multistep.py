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
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .drift import Drift, Time
from .results import Status
from .run import Run, column, padded
from .runge_kutta import nan_alone

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

_NODES, _WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(32))
_NODES, _WEIGHTS = 0.5 * (_NODES + 1.0), 0.5 * _WEIGHTS  # on [0, 1]; exact to rounding for every h that occurs


def angle_at(log_snr: Tensor) -> Tensor:
    """The variable of the polynomials."""
    return torch.atan(2.0 * torch.exp(-log_snr))


def integral_weights(l0: Tensor, l1: Tensor, nodes: Tensor, valid: Tensor | None = None) -> Tensor:
    """``(K, R)``: the weights w with ``exp(-l1) int_l0^l1 exp(l) D dl = sum_j w_j D_j`` for the polynomial D in the
    angle through the values D_j at ``nodes`` ``(K, R)``, those that are ``valid``; ``l0`` and ``l1`` are log-SNR
    ``(R,)``. All float64."""
    h = l1 - l0
    u, weight = _NODES.to(h.device)[:, None], _WEIGHTS.to(h.device)[:, None]
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


class FixedGrid(Run):
    """Steps to the times of ``grid`` with a matrix each: those of theory, or others."""

    def __init__(self, grid: Sequence[float], tables: Tensor, flow: Flow, *args: Any) -> None:
        super().__init__(flow, *args)
        self.flow, self.grid, self.tables = flow, grid, tables

    def integrate(self) -> None:
        (x,) = self.ys
        tables = self.tables.to(x.device, ops.compute_dtype(x))
        self.first_step = abs(self.grid[1] - self.grid[0])
        predicted, values = x, [torch.zeros_like(x)] * (tables.shape[2] - 3)
        for i, table in enumerate(tables):
            t, t_next = self.grid[i], self.grid[i + 1]
            out = self.call(self.flow.network, predicted, t)
            value, x, predicted = ops.combine([x, predicted, out, *values], table)
            values = [value, *values[:-1]]
            self.times.append(t_next)
            self.step_sizes.append(abs(t_next - t))
            self.end_as(self.lost((predicted,)), Status.NOT_FINITE)
            running = self.running
            self.reached = torch.where(running, t_next, self.reached)
            self.n_accepted += running
            self.evaluations += running
            self.show(abs(t_next - self.start) / abs(self.end - self.start))
        self.ys = (predicted,)
        self.end_as(self.running, Status.SUCCESS)


# ---- adaptive ----


# Steps are in log-SNR. Both numbers, and those of the controller, are measured: docs/performance.md.
FIRST_STEP = 0.5
LARGEST_GROWTH = 2.5


class Adaptive(Run):
    """UniPC with step sizes from the gap between predictor and corrector, which takes no evaluation more.

    ``R`` rows of numbers: one for the batch, or one a sample. Each keeps its last ``order`` values of D in slots, in no
    order: the weights of a polynomial through nodes do not ask for one.
    """

    ROWS = Run.ROWS | dict.fromkeys(
        ("x", "t", "here", "last", "sign", "values", "taken", "h", "rejected", "overflow", "spoilt", "attempts"), 0
    ) | {"nodes": 1, "norm_before": 0}  # fmt: skip

    def __init__(
        self, order: int, rtol: float, atol: float, first_step: float | None, per_sample: bool, flow: Flow, *args: Any
    ) -> None:
        super().__init__(flow, *args)
        self.flow, self.order, self.rtol, self.atol, self.per_sample = flow, order, rtol, atol, per_sample
        self.first_step = FIRST_STEP if first_step is None else first_step

    # -- rows and samples

    def of_batch(self, v: Tensor) -> Tensor:
        """A number a sample from a number a row."""
        return v if self.per_sample else v.expand(len(self.status))

    def active(self, t: Tensor) -> Tensor:
        """``(R,)``: rows still on their way."""
        return (t != self.end) & (self.running if self.per_sample else self.running.any())

    def combine(self, arrays: Sequence[Tensor], *matrix: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One result for each line of the matrix, whose entries are ``(R,)`` or ``(n, R)``."""
        lines = [torch.cat([v if v.dim() == 2 else v[None] for v in line]) for line in matrix]
        table = torch.stack(lines)
        return ops.combine(arrays, table if self.per_sample else table[..., 0])

    def norm(self, sums: Tensor, n: int) -> Tensor:
        if self.per_sample:
            return (sums / max(n, 1)) ** 0.5
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
        return self.call(self.flow.network, x, t if self.per_sample else t.item())

    # -- the loop

    def integrate(self) -> None:
        if len(self.status) == 0:
            return
        while bool(self.running.any()):
            # Under joint control, where samples fail the others are integrated again without them.
            self.times, self.step_sizes, self.error_norms = [self.start], [], []
            for counts in (self.evaluations, self.n_accepted, self.n_rejected):
                counts[self.running] = 0
            self.begin()
            while bool(self.active(self.t).any()) and self.step():
                pass
            if not self.per_sample and not bool(self.active(self.t).any()):
                self.end_as(self.running, Status.SUCCESS)

    def begin(self) -> None:
        (self.x,) = (x,) = self.y0
        rows = len(x) if self.per_sample else 1
        self.t = t = torch.full((rows,), self.start, dtype=torch.float64, device=x.device)
        self.here, self.last = self.point(t), self.point(torch.full_like(t, self.end))
        self.sign = (self.last.l - self.here.l).sign()
        out = self.network(x, t)
        self.evaluations += self.running
        value = self.combine([x, out], [self.here.a, self.here.b])[0]
        self.end_as(self.lost((value,)), Status.NOT_FINITE)
        self.values = [value, *(torch.zeros_like(x) for _ in range(self.order - 1))]
        self.nodes = torch.zeros((self.order, rows), dtype=torch.float64, device=x.device)
        self.nodes[0] = self.here.angle
        self.taken = torch.ones((rows,), dtype=torch.int64, device=x.device)
        self.slots = torch.arange(self.order, device=x.device)[:, None]
        self.h = torch.full_like(t, self.first_step)
        self.rejected = self.overflow = torch.zeros_like(t, dtype=torch.bool)
        self.spoilt = torch.zeros_like(self.running)  # samples that made the last step overflow
        self.attempts = torch.zeros_like(self.taken)
        self.norm_before = torch.ones_like(t)

    def give_up(self, active: Tensor) -> Tensor:
        """``(R,)``: rows that cannot go on. Where an overflow is the reason, the samples it came from end, and the
        others of the row start again."""
        tiny, spent = self.h < 1e-13 * (1.0 + self.here.l.abs()), self.attempts >= self.max_steps
        stuck = active & (tiny | spent)
        if bool(stuck.any()):
            self.end_as(self.of_batch(stuck & self.overflow) & self.spoilt, Status.NOT_FINITE)
            rest = self.of_batch(stuck & ~self.overflow)
            self.end_as(rest & self.of_batch(tiny), Status.STEP_SIZE)
            self.end_as(rest, Status.MAX_STEPS)
        return stuck

    def step(self) -> bool:
        """One attempted step of every active row; False where the others have to start again without some samples."""
        t, x, here = self.t, self.x, self.here
        stuck = self.give_up(self.active(t))
        active = self.active(t)
        if bool(stuck.any()) and not (self.per_sample and bool(active.any())):
            return False
        left = (self.last.l - here.l).abs()
        ends = self.h >= left * (1.0 - 1e-12)
        h = torch.where(active, torch.minimum(self.h, left), 1.0)  # a row that is done has any step: it stays
        t_new = self.time_at(torch.where(active, here.l + self.sign * h, here.l))
        t_new = torch.where(active, torch.where(ends, self.end, t_new), t)
        there = self.point(t_new)
        scale = there.s / here.s
        (predicted,) = self.combine([x, *self.values], [scale, there.m * self.weights(there, there.l, False)])
        out = self.network(predicted, t_new)
        corrector = there.m * self.weights(there, there.l, True)
        first, past, zero = corrector[0], corrector[1:], torch.zeros_like(t)
        new, value = self.combine(
            [x, predicted, out, *self.values],
            [scale, first * there.a, first * there.b, past],
            [zero, there.a, there.b, torch.zeros_like(past)],
        )
        sums = ops.rk_error(x, new, [new, predicted], (1.0, -1.0), 1.0, self.rtol, self.atol)
        norm = self.norm(sums, math.prod(x.shape[1:]))
        accepted, h_next = self.control(norm, h, active)
        self.overflow = ~norm.isfinite() & active
        self.log(h, norm, active, accepted)
        if bool(self.overflow.any()):
            self.spoilt = self.lost((new, predicted, out)) | ~sums.isfinite()
            bad = nan_alone([new, predicted, out]) & self.running
            self.end_as(bad, Status.NOT_FINITE)
            if not self.per_sample and bool(bad.any()):
                return False
        if self.dense is not None:
            self.record(t, t_new, accepted, there, value, new)
        self.h = torch.where(active, h_next, self.h)
        self.rejected = active & ~accepted
        self.keep(accepted, t_new, there, new, value)
        return True

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

    def keep(self, accepted: Tensor, t_new: Tensor, there: Point, new: Tensor, value: Tensor) -> None:
        """The step in the rows that accepted it."""
        write = accepted & (self.slots == self.taken % self.order)
        self.values = [
            torch.where(column(self.of_batch(w), v), value, v) for w, v in zip(write, self.values, strict=True)
        ]
        self.nodes = torch.where(write, there.angle, self.nodes)
        self.x = torch.where(column(self.of_batch(accepted), self.x), new, self.x)
        self.here = self.here.where(accepted, there)
        self.t, self.taken = torch.where(accepted, t_new, self.t), self.taken + accepted
        self.ys, self.reached = (self.x,), torch.where(self.running, self.of_batch(self.t), self.reached)
        if self.per_sample:
            self.times.append(self.t)
            self.end_as(self.t == self.end, Status.SUCCESS)
            self.show(1.0 - float(self.running.double().mean()))
        elif bool(accepted):
            self.times.append(self.t.item())
            self.show(abs(self.t.item() - self.start) / abs(self.end - self.start))

    def log(self, h: Tensor, norm: Tensor, active: Tensor, accepted: Tensor) -> None:
        self.attempts = self.attempts + active
        moving = self.of_batch(active) & self.running
        self.evaluations += moving
        self.n_accepted += moving & self.of_batch(accepted)
        self.n_rejected += moving & ~self.of_batch(accepted)
        if self.per_sample:
            self.step_sizes.append(torch.where(active, h, math.nan))
            self.error_norms.append(torch.where(active, norm, math.nan))
        else:
            self.step_sizes.append(h.item())
            self.error_norms.append(norm.item())

    def record(self, t: Tensor, t_new: Tensor, accepted: Tensor, there: Point, value: Tensor, new: Tensor) -> None:
        """The states at those times of ``t_eval`` that lie in the steps just accepted: the step's own formula, as far
        as that time."""
        assert self.dense is not None
        (dense,) = self.dense
        for i, at in enumerate(self.t_eval):
            inside = accepted & ((at - t) * (at - t_new) <= 0)
            if bool(inside.any()):
                point = self.point(torch.full_like(t, at))
                weights = point.m * self.weights(there, point.l, True)
                (state,) = self.combine([self.x, value, *self.values], [point.s / self.here.s, weights])
                state = torch.where(column(self.of_batch(t_new == at), new), new, state)
                dense[i] = torch.where(column(self.of_batch(inside), state), state, dense[i])
