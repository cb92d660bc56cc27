"""Runge-Kutta steps: of fixed size, with one step size for the batch, or with one for each sample.

One kernel an evaluation makes the slope ``f x + q out`` and, in the same pass, the next stage; the last but one also
begins the sums that end the step, so that the slopes before it are not read again. The step control is that of scipy's
``solve_ivp``: RMS norm, its initial step, safety 0.9, factors 0.2 to 10, no growth after a rejection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import graphs, ops
from .._C import control_step, host
from ..checks import traced
from ..reference import rows
from .drift import Terms, Time
from .results import Status
from .run import Run, State, column, padded
from .stepping import OnGrid, Stepping
from .tableaus import Tableau


class Part:
    """A part of the state within a step: ``y``, the slopes ``ks`` so far, ``x`` where the next evaluation is, and once
    the step is made, ``new``. ``begun`` are the sums that end the step, without the last slopes: the new state and the
    error estimates."""

    def __init__(self, y: Tensor, first: Tensor) -> None:
        self.y, self.ks = y, [first]
        self.begun: list[Tensor] = []
        self.x = self.new = y

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """All in which there may be something that is not finite."""
        return self.new, *self.ks, *self.begun


class RungeKutta(Run):
    """Stages and norms. ``t`` and ``h`` are floats, or float64 ``(B,)`` under per-sample control."""

    rtol = atol = 0.0

    def __init__(self, tableau: Tableau, *args: Any) -> None:
        super().__init__(*args)
        self.tableau = tableau
        self.lines = [*tableau.a[1:], tableau.b]  # number i: of the slopes that evaluation i completes
        # What is rounded to two bytes when it is stored must be neither a sum begun nor a point computed again.
        exact = self.ys[0].dtype in (torch.float32, torch.float64)
        self.splits = exact and len(tableau.b) > 2  # whether sums are begun before the last stage
        # A point is less to read for a CPU than to compute again, and more for a GPU.
        self.reads_points = not exact or graphs.backend_of(self.ys[0].device) is None

    def slopes(self, t: Time, ys: State) -> State:
        """The derivative itself, in memory of our own: ``f`` may return the same buffer every time."""
        return tuple(
            term.out.clone() if term.plain else ops.affine(y, term.out, term.f, term.q)
            for y, term in zip(ys, self.evaluate(t, ys), strict=True)
        )

    def stages(self, t: Time, t_new: Time, first: State) -> tuple[list[Part], Time]:
        """One step from ``t`` to ``t_new``, and its size as the kernels take it."""
        tableau, h = self.tableau, t_new - t
        lines, last = self.lines, len(tableau.b) - 1
        step = ops.number(h, self.ys[0])
        parts = [Part(y, k) for y, k in zip(self.ys, first, strict=True)]
        for part in parts:
            part.x = ops.rk_stage(part.y, part.ks, lines[0][:1], step)
        for i in range(1, last + 1):
            c = tableau.c[i]
            at, points = t_new if c == 1.0 else t + c * h, tuple(part.x for part in parts)
            terms = self.evaluate(at, points, i in tableau.passing)
            for part, term in zip(parts, terms, strict=True):
                self.advance(part, term, i, lines, step)
        for part in parts:
            part.new = part.x
        return parts, step

    def advance(self, part: Part, term: Terms, i: int, lines: Sequence[Sequence[float]], h: Time) -> None:
        """Takes in evaluation ``i`` of a step."""
        x: Any = part.x if self.reads_points else lines[i - 1]
        out, f, q = term.out, term.factor, term.q
        if self.splits and i == len(lines) - 1:
            k, part.x = ops.rk_drift_stage(part.begun[0], (), lines[i][-1:], h, part.x, out, f, q)
            part.ks.append(k)
        elif self.splits and i == len(lines) - 2:
            ends = [lines[i], *(line[: i + 1] for line in (lines[-1], *self.tableau.errors))]
            keep = self.dense is not None  # to interpolate takes all slopes
            made = ops.rk_last_stage(part.y, part.ks, ends, h, x, out, f, q, keep)
            part.ks.extend(made[:keep])
            part.x, *part.begun = made[keep:]
        else:
            k, part.x = ops.rk_drift_stage(part.y, part.ks, lines[i], h, x, out, f, q)
            part.ks.append(k)

    def attempt(self, t: Time, t_new: Time, slopes: State) -> tuple[list[Part], list[Tensor]]:
        """A step of an adaptive method, with the slopes there; and of each error estimate the :meth:`squares`."""
        parts, step = self.stages(t, t_new, slopes)
        squares: list[list[Tensor]] = [[] for _ in self.tableau.errors]
        for part, term in zip(parts, self.evaluate(t_new, tuple(part.new for part in parts)), strict=True):
            slope: list[Tensor] = []
            for i, e in enumerate(self.tableau.errors):
                ks, weights = ([part.begun[1 + i], part.ks[-1]], (1.0, *e[-2:])) if self.splits else (part.ks, e)
                if slope:
                    sums = ops.rk_error(part.y, part.new, [*ks, *slope], weights, step, self.rtol, self.atol)
                else:
                    sums, k = ops.rk_drift_error(
                        part.y, part.new, ks, weights, step, term.out, term.factor, term.q, self.rtol, self.atol
                    )
                    slope = [k]
                squares[i].append(sums)
            part.ks += slope
        return parts, [_sum(of_parts) for of_parts in squares]

    # -- norms

    def squares(self, new: State, ks: Sequence[Sequence[Tensor]], e: Sequence[float], h: Time) -> Tensor:
        """``(B,)``: each sample's sum of ``(h sum_j e_j k_j / (atol + rtol max(|y|, |y_new|)))^2``."""
        sums = [ops.rk_error(y, y1, k, e, h, self.rtol, self.atol) for y, y1, k in zip(self.ys, new, ks, strict=True)]
        return _sum(sums)

    def interpolate(self, theta: Time, h: Time, part: Part) -> Tensor:
        """The state at ``t + theta h``: the method's own continuous extension, or the cubic through both ends and
        their slopes (Hairer, Norsett, Wanner, section II.6)."""
        y, new, ks = part.y, part.new, part.ks
        if self.tableau.dense:
            weights = [h * _polynomial(row, theta) for row in self.tableau.dense]
            return y + sum(rows(w, y) * k_j for w, k_j in zip(weights, ks, strict=True))
        at_start, at_end = (1 + 2 * theta) * (1 - theta) ** 2, theta**2 * (3 - 2 * theta)
        slope_start, slope_end = h * theta * (1 - theta) ** 2, h * theta**2 * (theta - 1)
        return (
            rows(at_start, y) * y + rows(slope_start, y) * ks[0] + rows(at_end, y) * new + rows(slope_end, y) * ks[-1]
        )

    def error_norm(self, sums: Sequence[Any], n: Any) -> Any:
        """From the sums of squares of the method's estimates over ``n`` elements, at least one."""
        if len(sums) == 1:
            return (sums[0] / n) ** 0.5
        # Two estimates: err5^2 / sqrt((err5^2 + err3^2 / 100) n) (Hairer, Norsett, Wanner, eq. II.10.19)
        err5, err3 = sums
        return err5 / (((err5 + 0.01 * err3) * n) ** 0.5 + 1e-300)


def _sum(of_parts: Sequence[Tensor]) -> Tensor:
    return of_parts[0] if len(of_parts) == 1 else torch.stack(list(of_parts)).sum(0)


def _polynomial(coefficients: Sequence[float], theta: Time) -> Time:
    """``sum_m c_m theta^(m + 1)``"""
    value: Time = 0.0
    for c in reversed(coefficients):
        value = (value + c) * theta
    return value


def initial_guess(d0: float, d1: float, interval: float) -> float:
    """The Euler step that scipy's rule looks ahead with (Hairer, Norsett, Wanner, section II.4)."""
    return min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, interval)


def initial_step(h0: float, d1: float, d2: float, order: int, interval: float) -> float:
    """The first step size, from the slope's norm and that of its change over ``h0``."""
    h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / (order + 1))
    return min(100 * h0, h1, interval)


class FixedSteps(OnGrid, RungeKutta):
    """Steps to the times of ``grid``."""

    def __init__(self, tableau: Tableau, grid: Sequence[float], *args: Any) -> None:
        super().__init__(grid, tableau, *args)
        self.evaluations_a_step = len(tableau.b)

    def integrate(self) -> None:
        self.drive()

    def step(self) -> None:
        """All steps."""
        for t, t_new in zip(self.grid, self.grid[1:], strict=False):
            self.ys = tuple(part.new for part in self.stages(t, t_new, self.slopes(t, self.ys))[0])
            self.end_step(t, t_new, self.ys)


class _Failed(Exception):
    """Samples that cannot go on."""

    def __init__(self, which: Tensor, status: Status) -> None:
        self.which, self.status = which, status


class OneNorm(RungeKutta):
    """One norm for the batch: of the samples that run, as if there were no others."""

    def count_elements(self) -> bool:
        """Of the samples that run; whether there are any."""
        n = int(self.running.sum())
        self.whole = n == len(self.status)
        self.elements = n * sum(math.prod(y.shape[1:]) for y in self.ys)
        return n > 0

    def norm(self, sums: Tensor) -> float:
        sums = sums if self.whole else sums[self.running]
        return host.total(sums) if sums.is_cpu and not traced() else float(sums.sum())

    def rms(self, ks: Sequence[Sequence[Tensor]], e: Sequence[float]) -> float:
        return math.sqrt(self.norm(self.squares(self.ys, ks, e, 1.0)) / max(self.elements, 1))

    def first_step_of_all(self, t: Time, slopes: State) -> float:
        """scipy's rule; one evaluation."""
        interval = abs(self.end - self.start)
        d0, d1 = self.rms([[y] for y in self.ys], (1.0,)), self.rms([[k] for k in slopes], (1.0,))
        self.check(d0 + d1, slopes)
        h0 = initial_guess(d0, d1, interval)
        ahead = tuple(ops.rk_stage(y, [k], (1.0,), h0 * self.direction) for y, k in zip(self.ys, slopes, strict=True))
        other = self.slopes(t + h0 * self.direction, ahead)
        d2 = self.rms([[k, k1] for k, k1 in zip(slopes, other, strict=True)], (-1.0, 1.0)) / h0
        self.check(d2, (*slopes, *other))
        return initial_step(h0, d1, d2, self.tableau.error_order, interval)

    def check(self, norm: float, arrays: Sequence[Tensor]) -> None:
        if not math.isfinite(norm):
            which = self.lost(tuple(arrays)) & self.running
            raise _Failed(which if bool(which.any()) else self.running, Status.NOT_FINITE)


class Joint(OneNorm):
    """One step size for the batch, and scipy's decisions.

    Where samples fail, the others are integrated again from the start, with the failed ones left out of every norm: as
    if they had not been there.
    """

    def __init__(
        self, tableau: Tableau, rtol: float, atol: float, first_step: float | None, pi: bool, *args: Any
    ) -> None:
        super().__init__(tableau, *args)
        self.rtol, self.atol, self.given_step, self.pi = rtol, atol, first_step, pi
        self.exponent = -1.0 / (tableau.error_order + 1)

    def integrate(self) -> None:
        while self.count_elements():
            before = self.nfe
            self.t, self.ys, self.times, self.step_sizes, self.error_norms = self.start, self.y0, [self.start], [], []
            status = Status.SUCCESS
            try:
                self.to_the_end()
                which = self.running
            except _Failed as failed:
                which, status = failed.which & self.running, failed.status
            finally:
                running = self.running
                self.reached = torch.where(running, self.t, self.reached)
                for counts, value in (
                    (self.evaluations, self.nfe - before),
                    (self.n_accepted, len(self.times) - 1),
                    (self.n_rejected, len(self.step_sizes) - len(self.times) + 1),
                ):
                    counts.masked_fill_(running, value)
            self.end_as(which, status)

    def to_the_end(self) -> None:
        self.previous_norm = 1.0
        slopes = self.slopes(self.t, self.ys)
        h = self.first_step_of_all(self.t, slopes) if self.given_step is None else float(self.given_step)
        self.first_step = h
        self.recorded = 0
        while self.t != self.end:
            slopes, h = self.step(slopes, h)

    def step(self, slopes: State, h: float) -> tuple[State, float]:
        """Attempts with smaller and smaller h until one is accepted: the slopes at the new point, and the next h."""
        smallest = 10 * abs(math.nextafter(self.t, self.direction * math.inf) - self.t)
        h, rejected = max(h, smallest), False
        arrays: tuple[Tensor, ...] = ()
        while True:
            if h < smallest or len(self.step_sizes) >= self.max_steps:
                if arrays and bool((lost := self.lost(arrays) & self.running).any()):
                    raise _Failed(lost, Status.NOT_FINITE)
                raise _Failed(self.running, Status.STEP_SIZE if h < smallest else Status.MAX_STEPS)
            t_new = self.t + h * self.direction
            if self.direction * (t_new - self.end) > 0:
                t_new = self.end
            h = abs(t_new - self.t)
            parts, squares = self.attempt(self.t, t_new, slopes)
            norm = self.error_norm([self.norm(sums) for sums in squares], max(self.elements, 1))
            self.step_sizes.append(h)
            self.error_norms.append(norm)
            arrays = ()
            if not math.isfinite(norm):
                # Overflow: the step was too large, a smaller one may do. NaN alone comes from the network: none will.
                arrays = arrays_of(parts)
                only_nan = self.nan_alone(arrays)
                if bool(only_nan.any()):
                    raise _Failed(only_nan, Status.NOT_FINITE)
            accepted, h = self.control(norm, h, rejected)
            if accepted:
                self.accept(t_new, parts)
                return tuple(part.ks[-1] for part in parts), h
            rejected = True

    def nan_alone(self, arrays: Sequence[Tensor]) -> Tensor:
        """``(B,)``: running samples with NaN and without Inf."""
        return nan_alone(arrays) & self.running

    def control(self, norm: float, h: float, rejected: bool) -> tuple[bool, float]:
        accepted, h_next = control_step(norm, h, rejected, 0.7 * self.exponent if self.pi else self.exponent)
        if accepted and self.pi:  # Hairer, Norsett, Wanner, section IV.2: the norm before counts, with the other sign
            growth = min(h_next / h * self.previous_norm ** (-0.4 * self.exponent), 10.0)
            h_next = h * (min(growth, 1.0) if rejected else growth)
            self.previous_norm = max(norm, 1e-4)
        return accepted, h_next

    def accept(self, t_new: float, parts: Sequence[Part]) -> None:
        h = t_new - self.t
        while self.recorded < len(self.t_eval) and self.direction * (self.t_eval[self.recorded] - t_new) <= 0:
            t = self.t_eval[self.recorded]
            for kept, part in zip(self.dense or (), parts, strict=True):
                kept[self.recorded] = part.new if t == t_new else self.interpolate((t - self.t) / h, h, part)
            self.recorded += 1
        self.t, self.ys = t_new, tuple(part.new for part in parts)
        self.times.append(t_new)
        self.show(abs(t_new - self.start) / abs(self.end - self.start))


def arrays_of(parts: Sequence[Part]) -> tuple[Tensor, ...]:
    return tuple(array for part in parts for array in part.arrays)


def nan_alone(arrays: Sequence[Tensor]) -> Tensor:
    """``(B,)``: samples with NaN and without Inf."""
    flat = [v.reshape(len(v), math.prod(v.shape[1:])) for v in arrays]
    nan = torch.stack([v.isnan().any(1) for v in flat]).any(0)
    return nan & ~torch.stack([v.isinf().any(1) for v in flat]).any(0)


class PerSample(Stepping, RungeKutta):
    """Every sample has its own time, step size, norm and decisions: what comes out for it does not depend on the rest
    of the batch."""

    STATE = (*Stepping.STATE, "slope", "target", "previous_norm")
    ROWS = Stepping.ROWS | dict.fromkeys(("slope", "previous_norm"), 0)

    def __init__(
        self, tableau: Tableau, rtol: float, atol: float, first_step: float | None, pi: bool, *args: Any
    ) -> None:
        super().__init__(tableau, *args)
        self.rtol, self.atol, self.given_step, self.pi = rtol, atol, first_step, pi
        self.exponent = -1.0 / (tableau.error_order + 1)
        self.evaluations_a_step = len(tableau.b)
        self.size = sum(math.prod(y.shape[1:]) for y in self.ys)

    def integrate(self) -> None:
        self.begin()
        self.drive()

    def begin(self) -> None:
        self.start_stepping(self.reached if self.per_sample else self.reached.new_full((1,), self.start))
        self.ys = self.y0 if self.on_host else tuple(y.clone() for y in self.y0)
        self.slope = self.slopes(self.t, self.ys)
        self.evaluations += self.running
        given = self.given_step
        self.h = torch.full_like(self.t, given) if given is not None else self.choose_first_step(self.t, self.slope)
        self.first_step = float(self.h.min()) if len(self.h) else 0.0
        self.target, self.previous_norm = self.t, torch.ones_like(self.t)
        self.give_up(self.on_their_way())

    def smallest(self) -> Tensor:
        """Steps below this are lost in the spacing of the times."""
        return 10 * (torch.nextafter(self.t, torch.full_like(self.t, self.direction * math.inf)) - self.t).abs()

    def give_up(self, which: Tensor) -> None:
        """Rows of ``which`` that cannot go on end. Steps begin no smaller than :meth:`smallest`."""
        smallest = self.smallest()
        self.h = torch.where(self.rejected, self.h, torch.maximum(self.h, smallest))
        self.end_rows(which & (self.h < smallest), which & (self.attempts >= self.max_steps))

    def end_rows(self, tiny: Tensor, spent: Tensor) -> None:
        self.end_as(self.overflow & tiny, Status.NOT_FINITE)
        self.end_as(tiny, Status.STEP_SIZE)
        self.end_as(spent, Status.MAX_STEPS)

    def error_norms_of(self, squares: Sequence[Tensor]) -> Tensor:
        """``(R,)``, error over tolerance."""
        return self.error_norm(squares, max(self.size, 1))

    def step(self) -> None:
        """One attempted step of every row."""
        active, t, ys = self.active(), self.t, self.ys
        t_new = t + self.direction * self.h
        t_new = torch.where(self.direction * (t_new - self.end) > 0, self.end, t_new)
        t_new = torch.where(active, t_new, t)  # a row that is done stays where it is
        h = torch.where(active, (t_new - t).abs(), self.h)
        parts, squares = self.attempt(t, t_new, self.slope)
        norm = self.error_norms_of(squares)
        exponent = 0.7 * self.exponent if self.pi else self.exponent
        decision = ops.rk_control(norm, h, self.rejected, exponent)
        accepted = (decision[0] > 0) & active
        t_after = torch.where(accepted, t_new, t)
        self.note(torch.where(active, h, math.nan), torch.where(active, norm, math.nan), t_after, active, accepted)
        overflow = ~norm.isfinite() & active
        if not self.on_host:
            self.look = self.look | overflow.any()
            self.target = torch.where(active, t_new, self.target)
        elif bool(overflow.any()):
            self.end_as(overflow & nan_alone(arrays_of(parts)), Status.NOT_FINITE)
        if self.dense is not None:
            self.record(t, t_new, accepted, parts)
        h_next = decision[1]
        if self.pi:
            (damping,) = padded(lambda norm: (norm ** (-0.4 * self.exponent),), self.previous_norm)
            growth = (h_next / h * damping).clamp(max=10.0)
            h_next = torch.where(accepted, h * torch.where(self.rejected, growth.clamp(max=1.0), growth), h_next)
            self.previous_norm = torch.where(accepted, norm.clamp(min=1e-4), self.previous_norm)
        self.ys = tuple(self.chosen(accepted, part.new, y) for y, part in zip(ys, parts, strict=True))
        self.slope = tuple(self.chosen(accepted, part.ks[-1], k) for k, part in zip(self.slope, parts, strict=True))
        self.t = t_after
        self.h = torch.where(active, h_next, h)
        self.rejected = torch.where(active, ~accepted, self.rejected)
        self.overflow = torch.where(active, overflow, self.overflow)
        self.reached = torch.where(self.of_batch(active) & self.running, self.of_batch(self.t), self.reached)
        self.arrive()
        self.give_up(active if self.on_host else active & ~overflow)
        self.go_on()

    def arrive(self) -> None:
        self.end_as(self.t == self.end, Status.SUCCESS)
        if self.on_host:
            self.show_progress()

    def attend(self) -> None:
        """The attempt that overflowed is made again to see what it gave, from the state that it left as it was."""
        before, t_new = self.nfe, torch.where(self.overflow, self.target, self.t)
        parts, _ = self.attempt(self.t, t_new, self.slope)
        self.nfe = before
        self.end_as(self.of_batch(self.overflow) & nan_alone(arrays_of(parts)), Status.NOT_FINITE)
        self.give_up(self.on_their_way())

    def choose_first_step(self, t: Tensor, slopes: State) -> Tensor:
        """scipy's rule for every sample; one evaluation. Python's floats: the few numbers are taken one by one, so that
        they do not depend on their neighbours in a vector register."""
        interval, one = abs(self.end - self.start), (1.0,)

        def rms(sums: Tensor) -> Tensor:
            return (sums / max(self.size, 1)) ** 0.5

        d0 = rms(self.squares(self.ys, [[y] for y in self.ys], one, 1.0)).tolist()
        d1 = rms(self.squares(self.ys, [[k] for k in slopes], one, 1.0)).tolist()
        finite = [math.isfinite(a + b) for a, b in zip(d0, d1, strict=True)]
        guesses = [initial_guess(a, b, interval) if ok else interval for a, b, ok in zip(d0, d1, finite, strict=True)]
        h0 = t.new_tensor(guesses) * self.direction
        ahead = tuple(ops.rk_stage(y, [k], one, h0) for y, k in zip(self.ys, slopes, strict=True))
        other = self.slopes(t + h0, ahead)
        self.evaluations += 1
        change = [[k, k1] for k, k1 in zip(slopes, other, strict=True)]
        d2 = (rms(self.squares(self.ys, change, (-1.0, 1.0), 1.0)) / h0.abs()).tolist()
        finite = [ok and math.isfinite(d) for ok, d in zip(finite, d2, strict=True)]
        self.end_as(~torch.tensor(finite, dtype=torch.bool, device=t.device), Status.NOT_FINITE)
        order = self.tableau.error_order
        steps = [
            initial_step(g, a, b, order, interval) if ok else interval
            for g, a, b, ok in zip(guesses, d1, d2, finite, strict=True)
        ]
        return t.new_tensor(steps)

    def record(self, t: Tensor, t_new: Tensor, accepted: Tensor, parts: Sequence[Part]) -> None:
        """The states at those times of ``t_eval`` that lie in the steps just accepted."""
        h = t_new - t
        for i, at in enumerate(self.t_eval):
            inside = accepted & (self.direction * (at - t) > 0) & (self.direction * (at - t_new) <= 0)
            if self.maybe(inside):
                theta = torch.where(inside, (at - t) / h, 0.0)
                for kept, part in zip(self.dense or (), parts, strict=True):
                    y = self.interpolate(theta, h, part)
                    value = torch.where(column(t_new == at, y), part.new, y)
                    kept[i] = torch.where(column(inside, y), value, kept[i])


class JointOnDevice(OneNorm, PerSample):
    """What :class:`Joint` does, on a device: one row of numbers for the batch."""

    STATE = (*PerSample.STATE, "spoilt")

    per_sample = False

    def integrate(self) -> None:
        while self.count_elements():
            self.times, self.step_sizes, self.error_norms = [self.start], [], []
            for counts in (self.evaluations, self.n_accepted, self.n_rejected):
                counts.masked_fill_(self.running, 0)
            self.reached = torch.where(self.running, self.start, self.reached)
            self.ys, self.without = self.y0, False
            try:
                self.begin()
                self.drive()
            except _Failed as failed:
                self.end_as(failed.which, failed.status)
            else:
                self.settle()

    def begin(self) -> None:
        self.spoilt = torch.zeros_like(self.running)  # samples that were not finite in the last step
        super().begin()

    def choose_first_step(self, t: Tensor, slopes: State) -> Tensor:
        h = self.first_step_of_all(t, slopes)
        self.evaluations += self.running
        return torch.full_like(t, h)

    def error_norms_of(self, squares: Sequence[Tensor]) -> Tensor:
        running, spoilt = self.running, ~torch.stack(list(squares)).isfinite().all(0)
        self.spoilt = torch.where(self.active(), spoilt, self.spoilt)
        sums = [torch.where(running, v, 0.0).sum()[None] for v in squares]
        return self.error_norm(sums, (running.sum() * self.size).clamp(min=1))

    def end_rows(self, tiny: Tensor, spent: Tensor) -> None:
        self.stop = self.stop | tiny | spent

    def arrive(self) -> None:
        """Samples end when the batch has."""

    def attend(self) -> None:
        running = self.running
        super().attend()
        self.without = not torch.equal(running, self.running)
        self.stop = self.stop | self.without

    def settle(self) -> None:
        """The end of the batch: samples that were lost end, and the others start again; or all end."""
        if self.without:
            return
        lost = self.spoilt & self.running if bool(self.overflow) else torch.zeros_like(self.running)
        if bool(self.t == self.end):
            self.end_as(self.running, Status.SUCCESS)
        elif bool(lost.any()):
            self.end_as(lost, Status.NOT_FINITE)
        else:
            self.end_as(self.running, Status.STEP_SIZE if bool(self.h < self.smallest()) else Status.MAX_STEPS)
