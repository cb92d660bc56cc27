"""Runge-Kutta integration of batches, with the state on its device and in its dtype.

A method is data: a :class:`Tableau`. :func:`solve` runs it in fixed steps or with scipy's step control, whose decisions
it reproduces. One kernel an evaluation forms the next stage, and, where the right-hand side is a :class:`Drift`, folds
``f x + q out`` into the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from . import ops
from .checks import bad_rows, check_state, check_tolerances, name_rows

__all__ = ["METHODS", "Drift", "Solution", "SolverError", "Tableau", "solve"]


# ---- methods ----


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i is ``y + h sum_j a[i][j] k_j`` at ``t + c[i] h``; the step is ``y + h
    sum_j b[j] k_j``.

    Adaptive methods evaluate once more at the new point, which is the first slope of the next step; ``errors`` are
    coefficients of the error estimates over all slopes, that one included (one row, or two that are
    combined as DOP853's), and ``error_order`` is the order of the estimate.

    Raises:
        ValueError: the parts do not fit together.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    errors: tuple[tuple[float, ...], ...] = ()
    error_order: int = 0

    def __post_init__(self) -> None:
        n = len(self.b)
        if n < 1 or len(self.c) != n or [len(row) for row in self.a] != list(range(n)):
            raise ValueError(f"a, b, c: expected rows of 0 to {n - 1} numbers in a, and {n} in b and c each.")
        if len(self.errors) > 2 or any(len(row) != n + 1 for row in self.errors):
            raise ValueError(f"errors: expected at most two rows of {n + 1} numbers, one a slope.")


EULER = Tableau(a=((),), b=(1.0,), c=(0.0,), order=1)
MIDPOINT = Tableau(a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2), order=2)
HEUN = Tableau(a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0), order=2)
RK4 = Tableau(
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), c=(0.0, 1 / 2, 1 / 2, 1.0), order=4
)
# Bogacki and Shampine 1989
RK23 = Tableau(
    a=((), (1 / 2,), (0.0, 3 / 4)),
    b=(2 / 9, 1 / 3, 4 / 9),
    c=(0.0, 1 / 2, 3 / 4),
    order=3,
    errors=((5 / 72, -1 / 12, -1 / 9, 1 / 8),),
    error_order=2,
)
# Dormand and Prince 1980
RK45 = Tableau(
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    order=5,
    errors=((-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40),),
    error_order=4,
)


def _dop853() -> Tableau:
    """Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section II.10; the numbers are scipy's."""
    from scipy.integrate import DOP853  # imported here: it takes longer than the rest of the package

    return Tableau(
        a=tuple(tuple(DOP853.A[i, :i].tolist()) for i in range(DOP853.n_stages)),
        b=tuple(DOP853.B.tolist()),
        c=tuple(DOP853.C[: DOP853.n_stages].tolist()),
        order=8,
        errors=(tuple(DOP853.E5.tolist()), tuple(DOP853.E3.tolist())),
        error_order=7,
    )


METHODS: dict[str, Tableau | Callable[[], Tableau]] = {
    "euler": EULER,
    "midpoint": MIDPOINT,
    "heun": HEUN,
    "rk4": RK4,
    "RK23": RK23,
    "RK45": RK45,
    "DOP853": _dop853,
}
ADAPTIVE = ("RK23", "RK45", "DOP853")


# ---- right-hand sides ----


class Terms(NamedTuple):
    """A derivative ``f y + q out``; ``f`` and ``q`` are numbers or ``(B,)``. ``f = 0, q = 1``: ``out`` is the
    derivative itself."""

    out: Tensor
    f: Tensor | float = 0.0
    q: Tensor | float = 1.0

    @property
    def plain(self) -> bool:
        return isinstance(self.f, float) and isinstance(self.q, float) and self.f == 0.0 and self.q == 1.0


class Drift(Protocol):
    """A right-hand side that leaves its products to the kernels: for the state's parts ``ys`` at time ``t`` the terms
    of each part's derivative."""

    def terms(self, t: float, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]: ...


class _Function:
    """A plain ``f(t, y)``; ``t`` is handed over as a tensor ``(B,)``."""

    def __init__(self, f: Callable[..., Any], packed: bool) -> None:
        self.f, self.packed = f, packed

    def terms(self, t: float, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        times = time_vector(t, ys[0])
        slopes = self.f(times, ys) if self.packed else (self.f(times, ys[0]),)
        if not isinstance(slopes, (tuple, list)) or len(slopes) != len(ys):
            raise ValueError(
                f"f: expected {len(ys)} derivatives, one for each part of y0, got {type(slopes).__name__}."
            )
        for slope, y in zip(slopes, ys, strict=True):
            if (
                not isinstance(slope, Tensor)
                or slope.shape != y.shape
                or slope.dtype != y.dtype
                or slope.device != y.device
            ):
                got = (
                    f"{slope.dtype} {tuple(slope.shape)} on {slope.device}"
                    if isinstance(slope, Tensor)
                    else type(slope).__name__
                )
                raise ValueError(
                    f"f: expected a derivative like y, {y.dtype} {tuple(y.shape)} on {y.device}, got {got}."
                )
        return tuple(Terms(slope) for slope in slopes)


def time_vector(t: float, like: Tensor) -> Tensor:
    """``t`` once for each sample: float64 where the state is, else float32."""
    return torch.full((len(like),), t, dtype=ops.compute_dtype(like), device=like.device)


# ---- results ----


@dataclass(frozen=True)
class Solution:
    """What :func:`solve` reached.

    Attributes:
        y: state at ``t``, as ``y0`` was given.
        t: time reached: the end of the interval where ``success``.
        nfe: evaluations of the right-hand side.
        n_accepted, n_rejected: steps.
        success: whether the end was reached; False only in ``SolverError.solution``.
        message: how it ended.
        times: times of the accepted steps, the start included.
        step_sizes, error_norms: of every attempted step; accepted iff the norm is below 1.
        first_step: the first step size tried.
    """

    y: Any
    t: float
    nfe: int
    n_accepted: int
    n_rejected: int
    success: bool
    message: str
    times: tuple[float, ...]
    step_sizes: tuple[float, ...]
    error_norms: tuple[float, ...]
    first_step: float


class SolverError(RuntimeError):
    """The integration could not be finished. ``solution`` holds what was reached."""

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


# ---- the solver ----


def solve(
    f: Callable[..., Any] | Drift,
    t_span: tuple[float, float],
    y0: Tensor | tuple[Tensor, ...],
    method: str | Tableau = "RK45",
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int | None = None,
    first_step: float | None = None,
    max_steps: int = 10_000,
    progress: bool = False,
) -> Solution:
    """Integrates ``dy/dt = f(t, y)`` from ``t_span[0]`` to ``t_span[1]``, in either direction, to exactly the end
    point.

    Adaptive methods take one step size for the whole batch and make scipy's ``solve_ivp`` decisions: RMS norm over all
    elements, its initial step, safety 0.9, factors 0.2 to 10, no growth after a rejection. No evaluation lies outside
    ``t_span``.

    Args:
        f: ``f(t, y)`` with ``t`` of shape ``(B,)`` (float32, or float64 for a float64 state) returning the derivative,
            shape and dtype of ``y``; or a :class:`Drift`.
        t_span: start and end.
        y0: ``(B, *)``, or a tuple of such arrays with one B that form the state together (``f`` then takes and returns
            tuples). float32 or float64 is kept; no gradient is recorded.
        method: ``RK23 RK45 DOP853`` (adaptive), ``euler midpoint heun rk4`` (fixed steps), or a :class:`Tableau`.
        rtol, atol: tolerances of the adaptive methods: an error of ``atol + rtol max(|y|, |y_new|)`` an element is
            allowed.
        steps: number of equal steps; required by a fixed-step method. With an adaptive one, its formula is run in fixed
            steps, and the tolerances are not used.
        first_step: first step size of an adaptive method; chosen by scipy's rule if None.
        max_steps: attempted steps of an adaptive method after which it gives up.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError, TypeError: an argument is wrong; before any evaluation.
        SolverError: a value is not finite (the samples are named), the step size underflows, or ``max_steps`` is
            reached.
    """
    packed = isinstance(y0, tuple)
    ys = y0 if isinstance(y0, tuple) else (y0,)
    tableau = _tableau(method)
    adaptive = bool(tableau.errors) and steps is None
    _check(f, t_span, ys, rtol, atol, steps, first_step, max_steps, adaptive, method)
    drift: Drift = f if hasattr(f, "terms") else _Function(f, packed)
    start, end = float(t_span[0]), float(t_span[1])
    solver = _Solver(drift, tableau, start, end, tuple(y.detach().contiguous() for y in ys), packed, progress)
    with torch.no_grad(), solver.bar:
        if adaptive:
            return solver.adaptive(rtol, atol, first_step, max_steps)
        assert steps is not None
        return solver.fixed(steps)


def _tableau(method: str | Tableau) -> Tableau:
    if isinstance(method, Tableau):
        return method
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    found = METHODS[method]
    return found if isinstance(found, Tableau) else found()


def _check(
    f: Any,
    t_span: tuple[float, float],
    ys: tuple[Tensor, ...],
    rtol: float,
    atol: float,
    steps: int | None,
    first_step: float | None,
    max_steps: int,
    adaptive: bool,
    method: str | Tableau,
) -> None:
    if not callable(f) and not hasattr(f, "terms"):
        raise TypeError(f"f: expected a function f(t, y) or a Drift, got {type(f).__name__}.")
    try:
        start, end = (float(t) for t in t_span)
    except (TypeError, ValueError):
        raise ValueError(f"t_span: expected a start and an end time, got {t_span!r}.") from None
    if not (math.isfinite(start) and math.isfinite(end)) or start == end:
        raise ValueError(f"t_span: expected two different finite times, got {t_span}.")
    if not ys:
        raise ValueError("y0: expected at least one array, got an empty tuple.")
    for y in ys:
        check_state("y0", y)
        if len(y) != len(ys[0]) or y.device != ys[0].device or y.dtype != ys[0].dtype:
            raise ValueError("y0: expected parts of one batch size, dtype and device.")
    if not adaptive and (not isinstance(steps, int) or steps < 1):
        raise ValueError(
            f"steps: expected a positive number of steps for the fixed-step method {method!r}, got {steps!r}."
        )
    if adaptive:
        check_tolerances(rtol, atol)
        if first_step is not None and not (isinstance(first_step, (int, float)) and 0 < first_step <= abs(end - start)):
            raise ValueError(f"first_step: expected a step within the interval, got {first_step!r}.")
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps: expected a number of steps from 1 on, got {max_steps!r}.")


class _Solver:
    """The state of one call of :func:`solve`."""

    def __init__(
        self,
        drift: Drift,
        tableau: Tableau,
        start: float,
        end: float,
        ys: tuple[Tensor, ...],
        packed: bool,
        progress: bool,
    ) -> None:
        self.drift, self.tableau, self.packed = drift, tableau, packed
        self.start, self.end, self.direction = start, end, math.copysign(1.0, end - start)
        self.t, self.ys = start, ys
        self.nfe = 0
        self.times: list[float] = [start]
        self.step_sizes: list[float] = []
        self.error_norms: list[float] = []
        self.first_step = 0.0
        self.size = sum(y.numel() for y in ys)
        # disable=None: only on a terminal
        self.bar = tqdm(
            total=1.0, disable=None if progress else True, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        )

    # -- evaluations

    def evaluate(self, t: float, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        self.nfe += 1
        return self.drift.terms(t, ys)

    def slopes(self, t: float, ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The derivative itself, in memory of our own: ``f`` may return the same buffer every time."""
        return tuple(
            term.out.clone() if term.plain else ops.affine(y, term.out, term.f, term.q)
            for y, term in zip(ys, self.evaluate(t, ys), strict=True)
        )

    def stages(self, t_new: float, first: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], list[list[Tensor]]]:
        """One step to ``t_new``: the new state, and every part's slopes so far."""
        tableau, t, ys = self.tableau, self.t, self.ys
        h = t_new - t
        ks = [[k] for k in first]
        targets = [*tableau.a[1:], tableau.b]
        points = tuple(ops.rk_stage(y, k, targets[0][:1], h) for y, k in zip(ys, ks, strict=True))
        for a, c in zip(targets[1:], tableau.c[1:], strict=True):
            terms = self.evaluate(t_new if c == 1.0 else t + c * h, points)
            following = []
            for y, k, x, term in zip(ys, ks, points, terms, strict=True):
                if term.plain:
                    k.append(term.out.clone())
                    following.append(ops.rk_stage(y, k, a, h))
                else:
                    slope, y_next = ops.rk_drift_stage(y, k, a, h, x, term.out, term.f, term.q)
                    k.append(slope)
                    following.append(y_next)
            points = tuple(following)
        return points, ks

    # -- norms

    def norm(
        self, ys: tuple[Tensor, ...], new: tuple[Tensor, ...], ks: list[list[Tensor]], e: Sequence[float], h: float
    ) -> float:
        """Sum over all elements of ``(h sum_j e_j k_j / (atol + rtol max(|y|, |y_new|)))^2``."""
        return sum(
            float(ops.rk_error(y, y1, k, e, h, self.rtol, self.atol).sum())
            for y, y1, k in zip(ys, new, ks, strict=True)
        )

    def rms(self, ks: list[list[Tensor]], e: Sequence[float]) -> float:
        return math.sqrt(self.norm(self.ys, self.ys, ks, e, 1.0) / max(self.size, 1))

    def error_norm(self, new: tuple[Tensor, ...], ks: list[list[Tensor]], h: float) -> float:
        sums = [self.norm(self.ys, new, ks, e, h) for e in self.tableau.errors]
        n = max(self.size, 1)
        if len(sums) == 1:
            return math.sqrt(sums[0] / n)
        # Two estimates: err5^2 / sqrt((err5^2 + err3^2 / 100) n) (Hairer, Norsett, Wanner, eq. II.10.19)
        err5, err3 = sums
        return 0.0 if err5 == 0 and err3 == 0 else err5 / math.sqrt((err5 + 0.01 * err3) * n)

    def initial_step(self, slopes: tuple[Tensor, ...]) -> float:
        """Hairer, Norsett, Wanner, section II.4, as scipy has it; one evaluation."""
        interval = abs(self.end - self.start)
        d0 = self.rms([[y] for y in self.ys], (1.0,))
        d1 = self.rms([[k] for k in slopes], (1.0,))
        if not math.isfinite(d0 + d1):
            self.fail_not_finite(self.t, [*self.ys, *slopes])
        h0 = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, interval)
        ahead = tuple(ops.rk_stage(y, [k], (1.0,), h0 * self.direction) for y, k in zip(self.ys, slopes, strict=True))
        other = self.slopes(self.t + h0 * self.direction, ahead)
        d2 = self.rms([[k, k1] for k, k1 in zip(slopes, other, strict=True)], (-1.0, 1.0)) / h0
        if not math.isfinite(d2):
            self.fail_not_finite(self.t + h0 * self.direction, [*slopes, *other])
        order = self.tableau.error_order
        h1 = max(1e-6, h0 * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / (order + 1))
        return min(100 * h0, h1, interval)

    # -- loops

    def adaptive(self, rtol: float, atol: float, first_step: float | None, max_steps: int) -> Solution:
        self.rtol, self.atol = rtol, atol
        exponent = -1.0 / (self.tableau.error_order + 1)
        slopes = self.slopes(self.t, self.ys)
        h = self.initial_step(slopes) if first_step is None else float(first_step)
        self.first_step = h
        while self.t != self.end:
            slopes, h = self.step(slopes, h, exponent, max_steps)
        return self.solution(True, "reached the end of the interval")

    def step(
        self, slopes: tuple[Tensor, ...], h: float, exponent: float, max_steps: int
    ) -> tuple[tuple[Tensor, ...], float]:
        """Attempts with smaller and smaller h until one is accepted: the slopes at the new point, and the next h."""
        smallest = 10 * abs(math.nextafter(self.t, self.direction * math.inf) - self.t)
        h, rejected, overflow = max(h, smallest), False, ""
        while True:
            if h < smallest:
                self.fail(f"the step size fell below {smallest:.1e}, the spacing of the numbers{overflow}")
            if len(self.step_sizes) >= max_steps:
                self.fail(f"max_steps = {max_steps} attempted steps did not reach the end{overflow}")
            t_new = self.t + h * self.direction
            if self.direction * (t_new - self.end) > 0:
                t_new = self.end
            h = abs(t_new - self.t)
            new, ks = self.stages(t_new, slopes)
            new_slopes = self.slopes(t_new, new)
            for k, slope in zip(ks, new_slopes, strict=True):
                k.append(slope)
            norm = self.error_norm(new, ks, t_new - self.t)
            self.step_sizes.append(h)
            self.error_norms.append(norm)
            if not math.isfinite(norm):
                # Overflow: the step was too large, a smaller one may do. NaN alone comes from the network: none will.
                arrays = [*new, *(slope for k in ks for slope in k)]
                if any(bool(v.isnan().any()) for v in arrays) and not any(bool(v.isinf().any()) for v in arrays):
                    self.fail_not_finite(t_new, arrays)
                overflow = f", after {_not_finite(arrays)}"
            accepted, h = _control(norm, h, rejected, exponent)
            if accepted:
                self.accept(t_new, new)
                return new_slopes, h
            rejected = True

    def fixed(self, steps: int) -> Solution:
        h = (self.end - self.start) / steps
        self.first_step = abs(h)
        for i in range(steps):
            t_new = self.end if i == steps - 1 else self.start + (i + 1) * h
            new, _ = self.stages(t_new, self.slopes(self.t, self.ys))
            self.step_sizes.append(abs(t_new - self.t))
            self.accept(t_new, new)
        if not all(bool(y.isfinite().all()) for y in self.ys):
            self.fail_not_finite(self.t, list(self.ys))
        return self.solution(True, "reached the end of the interval")

    # -- bookkeeping

    def accept(self, t: float, ys: tuple[Tensor, ...]) -> None:
        self.bar.set_postfix(nfe=self.nfe, refresh=False)
        self.bar.update(min(abs(t - self.start) / abs(self.end - self.start), 1.0) - self.bar.n)
        self.t, self.ys = t, ys
        self.times.append(t)

    def solution(self, success: bool, message: str) -> Solution:
        accepted = len(self.times) - 1
        return Solution(
            y=self.ys if self.packed else self.ys[0],
            t=self.t,
            nfe=self.nfe,
            n_accepted=accepted,
            n_rejected=len(self.step_sizes) - accepted,
            success=success,
            message=message,
            times=tuple(self.times),
            step_sizes=tuple(self.step_sizes),
            error_norms=tuple(self.error_norms),
            first_step=self.first_step,
        )

    def fail(self, why: str) -> NoReturn:
        message = (
            f"The integration from t = {self.start:g} to {self.end:g} stopped at t = {self.t:.6g} after {self.nfe} "
            f"evaluations: {why}."
        )
        raise SolverError(message, self.solution(False, message))

    def fail_not_finite(self, t: float, arrays: list[Tensor]) -> NoReturn:
        self.fail(
            f"{_not_finite(arrays)} between there and t = {t:.6g}; the network or the data are at fault, or the state "
            "is too large"
        )


def _not_finite(arrays: list[Tensor]) -> str:
    rows = bad_rows(*arrays)
    return f"NaN or Inf in {name_rows(rows)}" if rows else "an error estimate that overflowed"


def _control(norm: float, h: float, rejected: bool, exponent: float) -> tuple[bool, float]:
    number = torch.tensor([norm, h], dtype=torch.float64)
    accepted, h_next = ops.rk_control(number[:1], number[1:], torch.tensor([rejected]), exponent).flatten().tolist()
    return bool(accepted), h_next
