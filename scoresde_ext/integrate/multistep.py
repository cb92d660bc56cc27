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
from .._C import host
from ..checks import finite
from .drift import Drift, Time
from .results import Status
from .run import Run, column, padded
from .runge_kutta import nan_alone
from .stepping import OnGrid, Stepping

MULTISTEP = ("unipc", "dpmpp_2m")


class Flow(Drift, Protocol):
    """What is asked of the probability flow of an affine SDE."""

    sde: Any
    score_fn: Any

    def network(self, x: Tensor, t: Time) -> Tensor: ...

    def given(self, x: Tensor, labels: Tensor) -> Tensor: ...

    def marginal(self, t: Any) -> tuple[Any, Any, Any]: ...


@runtime_checkable
class CalibratedGrid(Protocol):
    """Times, and the matrices of the steps between them, with whether these take the state before (see
    :class:`FixedGrid`)."""

    @property
    def times(self) -> tuple[float, ...]: ...

    def tables(self, flow: Flow) -> tuple[Tensor, bool]: ...


# ---- coefficients ----


NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
NODES, WEIGHTS = 0.5 * (NODES[:, None] + 1.0), 0.5 * WEIGHTS[:, None]
"""Of the quadrature on [0, 1], ``(32, 1)``: exact to rounding for every h that occurs."""


@functools.cache
def quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """:data:`NODES` and :data:`WEIGHTS`, moved to a device once."""
    return torch.from_numpy(NODES).to(device), torch.from_numpy(WEIGHTS).to(device)


@np.errstate(divide="ignore", invalid="ignore")  # nodes that coincide give NaN, which the states then show
def integral_weights(l0: Any, l1: Any, new: Any, nodes: Any, valid: Any) -> tuple[Any, Any, Any]:
    """What a step from log-SNR ``l0`` to ``l1`` multiplies values of D by: float64 numpy arrays or tensors.

    The predictor's polynomial P goes through the values D_j at the angles ``nodes`` ``(K, R)``, those that are
    ``valid``; the corrector's also through D_new at the angle ``new`` ``(R,)``. With ``I(D) = exp(-l1) int_l0^l1
    exp(l) D(l) dl``,

        I(P) = sum_j w_j D_j,    P(new) = sum_j v_j D_j,    I(corrector's) = I(P) + g (D_new - P(new)).

    Returns:
        ``w`` ``(K, R)``, ``v`` ``(K, R)``, ``g`` ``(R,)``.
    """
    xp: Any = torch if isinstance(l0, Tensor) else np
    h, k = l1 - l0, len(nodes)
    u, weight = quadrature(l0.device) if xp is torch else (NODES, WEIGHTS)
    # The integral's points and the new one, with what each counts.
    ratio = xp.exp(-(l0 + u * h))  # s / m
    angles = xp.concatenate([xp.arctan(2.0 * ratio), new[None]])
    shares = xp.concatenate([weight * (h * xp.exp(-l1)) / ratio, xp.ones_like(new)[None]])
    near = list(xp.where(valid[:, None], angles - nodes[:, None], 1.0))
    products = [math.prod(near[:j] + near[j + 1 :], start=shares) for j in range(k)]
    terms = xp.stack([*products, products[0] * near[0]])
    sums, at_new = _total(terms[:, :-1]), terms[:, -1]
    others = valid[:, None] & valid
    for j in range(k):
        others[j, j] = False
    gaps = math.prod(xp.where(others, nodes - nodes[:, None], 1.0))
    return xp.where(valid, sums[:k] / gaps, 0.0), xp.where(valid, at_new[:k] / gaps, 0.0), sums[k] / at_new[k]


def _total(v: Any) -> Any:
    """The sum along axis 1, whose length is a power of two. Halves of tensors are added onto halves: how torch sums
    depends on where in memory a column lies."""
    if not isinstance(v, Tensor):
        return v.sum(1)
    while v.shape[1] > 1:
        half = v.shape[1] // 2
        v = v[:, :half] + v[:, half:]
    return v[:, 0]


class Point:
    """What a step needs to know of one end: the log-SNR l, the angle, m, s, and D = a x + b out; tensors ``(R,)``, or
    numbers, or numpy arrays."""

    ROWS: ClassVar[dict[str, int]] = dict.fromkeys(("l", "angle", "m", "s", "a", "b"), 0)

    def __init__(self, m: Any, s: Any, k: Any) -> None:
        xp: Any = torch if isinstance(m, Tensor) else np

        def places(ratio: Any) -> tuple[Any, Any]:
            return -xp.log(ratio), xp.arctan(2.0 * ratio)

        found: tuple[Any, ...] = padded(places, s / m) if xp is torch else places(s / m)
        self.l, self.angle = found
        self.m, self.s = m, s
        self.a, self.b = 1.0 / m, s * s * k / m

    def where(self, chosen: Tensor, other: Point) -> Point:
        """``other`` in the chosen rows."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            setattr(new, name, torch.where(chosen, getattr(other, name), value))
        return new


def grid_points(flow: Flow, times: Sequence[float]) -> Point:
    """The points at all ``times``, in numpy arrays."""
    return Point(*(v.numpy() for v in flow.marginal(torch.tensor(times, dtype=torch.float64))))


def grid_tables(flow: Flow, times: Sequence[float], order: int, method: str) -> Tensor:
    """``(N, 2, 2 + K)``: one matrix a step for the arrays ``[p_i, out_i, D_{i-1}, ..., D_{i-K}]``, giving ``[D_i,
    p_{i+1}]``, where p_i is the predicted state at time i, and K the ``order`` of unipc, 1 for dpmpp_2m.

    UniPC predicts from the corrected state ``x_i = p_i + m_i g (D_i - P(angle_i))``, see :func:`integral_weights`,
    which never becomes an array. The last step is not corrected, so that N steps are N evaluations.
    """
    points = grid_points(flow, times)
    weights = _unipc(points, order) if method == "unipc" else _midpoint(points)
    step = points.s[1:] / points.s[:-1]
    rows = np.zeros((len(step), 1 + len(weights)))
    rows[:, 0] = step + weights[0] * points.a[:-1]
    rows[:, 1] = weights[0] * points.b[:-1]
    rows[:, 2:] = weights[1:].T
    return with_values(points, rows)


def with_values(points: Point, rows: np.ndarray) -> Tensor:
    """The matrices of steps from ``rows`` ``(N, n)`` that give the next state, of which the first two columns are those
    of p_i and out_i: with D_i as another result."""
    tables = np.zeros((len(rows), 2, rows.shape[1]))
    tables[:, 0, 0], tables[:, 0, 1], tables[:, 1] = points.a[:-1], points.b[:-1], rows
    return torch.from_numpy(tables)


def _unipc(points: Point, order: int) -> np.ndarray:
    """``(1 + order, N)``: of D_i, ..., D_{i-order} in the predicted states, which start from p_i."""
    log_snr, m, s, angle = points.l, points.m, points.s, points.angle
    before = np.arange(len(m) - 1) - np.arange(order)[:, None]
    w, v, g = integral_weights(log_snr[:-1], log_snr[1:], angle[1:], angle[before.clip(0)], before >= 0)
    weights = np.zeros((1 + order, len(m) - 1))
    weights[:-1] = m[1:] * w
    onward = s[2:] / s[1:-1] * m[1:-1] * g[:-1]  # of the correction of the state that a step starts from
    weights[0, 1:] += onward
    weights[1:, 1:] -= onward * v[:, :-1]
    return weights


def _midpoint(points: Point) -> np.ndarray:
    """``(2, N)``: of D_i and D_{i-1} in DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    h = np.diff(points.l)
    slope = np.concatenate([[0.0], h[1:] / (2.0 * h[:-1])])  # over the step before
    return -np.expm1(-h) * points.m[1:] * np.stack([1.0 + slope, -slope])


# ---- fixed grid ----


class FixedGrid(OnGrid):
    """Steps to the times of ``grid`` with a matrix each, for the arrays ``[p_i, out_i, D_{i-1}, ...]``, of which there
    are as many as the matrices have columns: those of theory, or others. The last array of ``with_state`` matrices is
    p_{i-1}."""

    def __init__(self, grid: Sequence[float], tables: Tensor, with_state: bool, flow: Flow, *args: Any) -> None:
        super().__init__(grid, flow, *args)
        self.flow, self.tables, self.with_state = flow, tables, with_state

    def integrate(self) -> None:
        (x,) = self.ys
        dtype = ops.compute_dtype(x)
        self.tables = self.tables.to(x.device, dtype)
        labels = self.flow.score_fn.labels(torch.tensor(self.grid[:-1], dtype=dtype))
        self.labels, self.label_dtype = labels.tolist(), labels.dtype
        self.drive()

    def step(self) -> None:
        """All steps."""
        (x,) = self.ys
        before = [x] if self.with_state else []
        values = [torch.zeros_like(x)] * (self.tables.shape[2] - 2 - len(before))
        for i, (table, label) in enumerate(zip(self.tables, self.labels, strict=True)):
            out = self.call(self.flow.given, x, self.labels_of(label, x))
            value, after = ops.combine([x, out, *values, *before], table)
            if before:
                before = [x]
            x, values = after, [value, *values[:-1]]
            self.end_step(self.grid[i], self.grid[i + 1], (x,))
        self.ys = (x,)

    def labels_of(self, label: float, x: Tensor) -> Tensor:
        if x.is_cpu and self.label_dtype.is_floating_point:
            return host.filled(len(x), label, self.label_dtype == torch.float64)
        return x.new_full((len(x),), label, dtype=self.label_dtype)


# ---- adaptive ----


# Steps are in log-SNR. Both numbers, and those of the controller, are measured: docs/performance.md.
FIRST_STEP = 0.5
LARGEST_GROWTH = 2.5


def step_factors(norm: Any, before: Any, order: int) -> tuple[Any, Any]:
    """What h is multiplied by after a step with this error norm, if it is accepted and if it is not, before limits.

    Proportional-integral control (Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations II", section IV.2):
    a rejected step costs what an accepted one does and brings nothing, and this halves them."""
    k = order + 1
    return 0.9 * norm ** (-0.9 / k) * before ** (0.5 / k), 0.9 * norm ** (-1.0 / k)


class UniPC(Run):
    """UniPC with step sizes from the gap between predictor and corrector, which takes no evaluation more.

    ``t``, and what there is at :class:`Point`, are floats or rows of numbers, float64 ``(R,)``.
    """

    t: Any
    here: Point
    x: Tensor
    values: list[Tensor]  # the last ones of D

    def __init__(self, order: int, rtol: float, atol: float, first_step: float | None, flow: Flow, *args: Any) -> None:
        super().__init__(flow, *args)
        self.flow, self.order, self.rtol, self.atol = flow, order, rtol, atol
        self.first_step = FIRST_STEP if first_step is None else first_step

    def combine(self, arrays: Sequence[Tensor], *matrix: Sequence[Any]) -> tuple[Tensor, ...]:
        """One result for each line of the matrix, whose entries are numbers of one array or of some."""
        raise NotImplementedError

    def weights(self, l1: Any, new: Any) -> tuple[Any, Any, Any]:
        """:func:`integral_weights` of the values of D, from here to the log-SNR ``l1``, the next value at ``new``."""
        raise NotImplementedError

    def point(self, t: Any) -> Point:
        return Point(*self.flow.marginal(t))

    def attempt(self, t_new: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Point]:
        """A step to ``t_new``: the state, D, the predicted state, the network's output there, and the point."""
        here, there = self.here, self.point(t_new)
        w, v, g = self.weights(there.l, there.angle)
        (predicted,) = self.combine([self.x, *self.values], [there.s / here.s, there.m * w])
        out = self.call(self.flow.network, predicted, t_new)
        gain = there.m * g
        new, value = self.combine(
            [predicted, out, *self.values],
            [1.0 + gain * there.a, gain * there.b, -gain * v],
            [there.a, there.b, 0.0 * v],
        )
        return new, value, predicted, out, there

    def between(self, at: Any, there: Point, value: Tensor) -> Tensor:
        """The state at the time ``at`` within the step to ``there``, where D is ``value``: the step's own formula, as
        far as that time."""
        here, point = self.here, self.point(at)
        w, v, g = self.weights(point.l, there.angle)
        (state,) = self.combine([self.x, value, *self.values], [point.s / here.s, point.m * g, point.m * (w - g * v)])
        return state

    def gap(self, new: Tensor, predicted: Tensor) -> Tensor:
        """``(B,)``: each sample's sum of squares of the gap over its tolerance."""
        return ops.rk_error(self.x, new, [new, predicted], (1.0, -1.0), 1.0, self.rtol, self.atol)


class AdaptiveOnHost(UniPC):
    """One step size for the batch, on the CPU: its numbers are Python's, many times as fast as tensors of one element.

    Where samples fail, the others are integrated again from the start without them.
    """

    def combine(self, arrays: Sequence[Tensor], *matrix: Sequence[Any]) -> tuple[Tensor, ...]:
        table = np.stack([np.concatenate([v if isinstance(v, np.ndarray) else [v] for v in line]) for line in matrix])
        return ops.combine(arrays, torch.from_numpy(table).to(arrays[0].device))

    def weights(self, l1: float, new: float) -> tuple[Any, Any, Any]:
        (start, end, ahead), nodes = np.array([[self.here.l], [l1], [new]]), np.array(self.nodes)[:, None]
        w, v, g = integral_weights(start, end, ahead, nodes, np.ones(nodes.shape, dtype=bool))
        return w[:, 0], v[:, 0], g[0]

    def integrate(self) -> None:
        while bool(self.running.any()):
            self.whole = bool(self.running.all())
            self.t, self.stop = self.start, False
            (self.x,) = self.y0
            self.times, self.step_sizes, self.error_norms = [self.start], [], []
            self.made = 0  # evaluations
            try:
                self.begin()
                while self.t != self.end and not self.stop:
                    self.step()
            finally:
                self.count()
                self.ys = (self.x,)
            if self.t == self.end:
                self.end_as(self.running, Status.SUCCESS)

    def count(self) -> None:
        """What the samples that run have needed since they began."""
        running, attempts, accepted = self.running, len(self.step_sizes), len(self.times) - 1
        self.reached = torch.where(running, self.t, self.reached)
        for counts, n in (
            (self.evaluations, self.made),
            (self.n_accepted, accepted),
            (self.n_rejected, attempts - accepted),
        ):
            counts[running] = n

    def begin(self) -> None:
        self.here, self.last = self.point(self.start), self.point(self.end)
        out = self.call(self.flow.network, self.x, self.start)
        self.made = 1
        (value,) = self.combine([self.x, out], [self.here.a, self.here.b])
        if not finite(value):
            self.count()
            self.end_as(self.lost((value,)), Status.NOT_FINITE)
            self.whole, self.stop = False, not bool(self.running.any())
        self.values, self.nodes = [value], [self.here.angle]
        self.h, self.norm_before, self.rejected = self.first_step, 1.0, False

    def step(self) -> None:
        """One attempted step."""
        here, left = self.here, abs(self.last.l - self.here.l)
        h = min(self.h, left)
        t_new = self.end
        if self.h < left * (1.0 - 1e-12):
            early, late = sorted((self.start, self.end))
            ahead = self.flow.sde.time_at(here.l + math.copysign(h, self.last.l - here.l))
            t_new = min(max(ahead, early), late)
        new, value, predicted, out, there = self.attempt(t_new)
        self.made += 1
        sums = self.gap(new, predicted)
        norm = self.norm(sums, math.prod(new.shape[1:]))
        accepted, self.h = self.control(norm, h)
        self.step_sizes.append(h)
        self.error_norms.append(norm)
        if accepted:
            self.record(t_new, there, value, new)
            self.x, self.t, self.here = new, t_new, there
            self.values, self.nodes = [value, *self.values][: self.order], [there.angle, *self.nodes][: self.order]
            self.times.append(t_new)
            self.show(abs(t_new - self.start) / abs(self.end - self.start))
        self.rejected = not accepted
        spoilt = None if math.isfinite(norm) else self.lost((new, predicted, out)) | ~sums.isfinite()
        if spoilt is not None:
            # Overflow: the step was too large, a smaller one may do. NaN alone comes from the network: none will.
            self.fail(nan_alone([new, predicted, out]), Status.NOT_FINITE)
        if self.t != self.end and not self.stop:
            self.give_up(spoilt)

    def norm(self, sums: Tensor, n: int) -> float:
        healthy = sums if self.whole else sums[self.running]
        return math.sqrt(float(healthy.sum()) / max(n * len(healthy), 1))

    def control(self, norm: float, h: float) -> tuple[bool, float]:
        """Whether the step is accepted, and the next one's size."""
        if not norm < 1.0:
            _, factor = step_factors(norm, self.norm_before, self.order)
            return False, h * (max(factor, 0.2) if math.isfinite(norm) else 0.2)
        onward, _ = step_factors(max(norm, 1e-12), self.norm_before, self.order)  # both may agree
        # A gap that vanishes by chance must not make the step after it look bad.
        self.norm_before = max(norm, 1e-3)
        return True, h * min(max(onward, 0.2), 1.0 if self.rejected else LARGEST_GROWTH)

    def fail(self, which: Tensor, status: Status) -> None:
        """Those of ``which`` that run end, and the others start again."""
        which = which & self.running
        if bool(which.any()):
            self.count()
            self.end_as(which, status)
            self.stop = True

    def give_up(self, spoilt: Tensor | None) -> None:
        """Ends where the batch cannot go on: the samples that are ``spoilt`` by the last step, if it overflowed, or
        all."""
        tiny, spent = self.h < 1e-13 * (1.0 + abs(self.here.l)), len(self.step_sizes) >= self.max_steps
        if tiny or spent:
            if spoilt is not None:
                self.fail(spoilt, Status.NOT_FINITE)
            else:
                self.fail(self.running, Status.STEP_SIZE if tiny else Status.MAX_STEPS)

    def record(self, t_new: float, there: Point, value: Tensor, new: Tensor) -> None:
        """The states at those times of ``t_eval`` that lie in the step just accepted."""
        for i, at in enumerate(self.t_eval):
            if self.dense is not None and (at - self.t) * (at - t_new) <= 0:
                self.dense[0][i] = new if at == t_new else self.between(at, there, value)


class Adaptive(UniPC, Stepping):
    """Rows of numbers: one a sample, or, on a device, one for the batch. Each keeps its last ``order`` values of D in
    slots, in no order: the weights of a polynomial through nodes do not ask for one.

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

    def __init__(self, per_sample: bool, *args: Any) -> None:
        super().__init__(*args)
        self.per_sample = per_sample

    # -- rows and samples

    def combine(self, arrays: Sequence[Tensor], *matrix: Sequence[Any]) -> tuple[Tensor, ...]:
        lines = [torch.cat([v if v.dim() == 2 else v[None] for v in line]) for line in matrix]
        table = torch.stack(lines)
        return ops.combine(arrays, table if self.per_sample else table[..., 0])

    def weights(self, l1: Tensor, new: Tensor) -> Any:
        return padded(integral_weights, self.here.l, l1, new, self.nodes, self.slots < self.taken)

    def norm(self, sums: Tensor, n: int) -> Tensor:
        if self.per_sample:
            return (sums / max(n, 1)) ** 0.5
        running = self.running
        return (torch.where(running, sums, 0.0).sum() / (n * running.sum()).clamp(min=1)).sqrt()[None]

    def time_at(self, log_snr: Tensor) -> Tensor:
        early, late = sorted((self.start, self.end))
        (t,) = padded(lambda v: (self.flow.sde.time_at(v),), log_snr)
        return t.clamp(early, late)

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
        out = self.call(self.flow.network, x, self.t)
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
        t, here, active = self.t, self.here, self.active()
        left = (self.last.l - here.l).abs()
        ends = self.h >= left * (1.0 - 1e-12)
        h = torch.where(active, torch.minimum(self.h, left), 1.0)  # a row that is done has any step: it stays
        t_new = self.time_at(torch.where(active, here.l + self.sign * h, here.l))
        t_new = torch.where(active, torch.where(ends, self.end, t_new), t)
        new, value, predicted, out, there = self.attempt(t_new)
        sums = self.gap(new, predicted)
        norm = self.norm(sums, math.prod(new.shape[1:]))
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
        """Which steps are accepted, and the sizes of the next."""
        accepted, positive = (norm < 1.0) & active, norm.clamp(min=1e-12)  # predictor and corrector may agree
        onward, again = padded(lambda norm, before: step_factors(norm, before, self.order), positive, self.norm_before)
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
        if self.on_host:
            self.show_progress()

    def record(self, t: Tensor, t_new: Tensor, accepted: Tensor, there: Point, value: Tensor, new: Tensor) -> None:
        """The states at those times of ``t_eval`` that lie in the steps just accepted."""
        assert self.dense is not None
        (dense,) = self.dense
        for i, at in enumerate(self.t_eval):
            inside = accepted & ((at - t) * (at - t_new) <= 0)
            if self.maybe(inside):
                state = self.between(torch.full_like(t, at), there, value)
                state = torch.where(column(self.of_batch(t_new == at), new), new, state)
                dense[i] = torch.where(column(self.of_batch(inside), state), state, dense[i])
