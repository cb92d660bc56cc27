"""The bookkeeping that every kind of integration shares: evaluations, which samples still run, which failed and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from .. import graphs, ops
from ..callers import warn
from ..checks import finite
from .drift import Drift, Terms, Time
from .results import NOISY, RUNNING, Solution, SolverError, Status, describe

State = tuple[Tensor, ...]


class Raised(Exception):
    """The right-hand side raised what is in ``__cause__``."""


LOOK = 64  # evaluations between two looks for noise
IN_A_ROW, MANY = 8, 256  # rejected one after another, or a quarter of many steps: that is seldom without noise


class Run:
    """One call of :func:`solve`. A sample runs until it has reached the end or failed; a failed one keeps its slot,
    which is computed and not looked at."""

    # What a sample takes along when it moves to another slot, with the axis of the samples: see refill.py.
    ROWS: ClassVar[dict[str, int]] = dict.fromkeys(
        ("status", "reached", "evaluations", "n_accepted", "n_rejected", "ys"), 0
    )
    plan = graphs.Plan()

    def __init__(
        self,
        drift: Drift,
        span: tuple[float, float],
        ys: State,
        packed: bool,
        max_steps: int,
        t_eval: Sequence[float] | None,
        progress: bool,
    ) -> None:
        self.drift, self.packed, self.max_steps = drift, packed, max_steps
        self.start, self.end = span
        self.direction = math.copysign(1.0, self.end - self.start)
        self.y0, self.ys = ys, ys
        batch, device = len(ys[0]), ys[0].device
        self.status = torch.full((batch,), RUNNING, dtype=torch.int8, device=device)
        self.reached = torch.full((batch,), self.start, dtype=torch.float64, device=device)
        self.evaluations, self.n_accepted, self.n_rejected = torch.zeros((3, batch), dtype=torch.int64, device=device)
        self.nfe = 0
        self.next_look, self.looked, self.noisy = LOOK, False, False
        self.error: BaseException | None = None
        self.times: list[Time] = [self.start]
        self.step_sizes: list[Time] = []
        self.error_norms: list[Time] = []
        self.first_step = 0.0
        self.t_eval = () if t_eval is None else tuple(t_eval)
        self.dense = None if t_eval is None else tuple(y.new_full((len(t_eval), *y.shape), math.nan) for y in ys)
        for i, t in enumerate(self.t_eval):
            if t == self.start:
                for kept, y in zip(self.dense or (), ys, strict=True):
                    kept[i] = y
        # disable=None: only on a terminal
        bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=1.0, disable=None, bar_format=bar_format) if progress else None

    # -- evaluations

    def evaluate(self, t: Time, ys: State, passing: bool = False) -> tuple[Terms, ...]:
        """``passing``: see :class:`Drift`."""
        terms = getattr(self.drift, "passing_terms", self.drift.terms) if passing else self.drift.terms
        return self.call(terms, t, ys)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """One evaluation."""
        self.nfe += 1
        try:
            if self.nfe == self.next_look:
                self.next_look += LOOK
                # A device is not waited for.
                if graphs.backend_of(self.status.device) is None and self.struggles(self.error_norms[-2 * LOOK :]):
                    self.look_for_noise(function, args)
            return function(*args)
        except Exception as error:
            if self.nfe == 1:  # nothing has been reached: the caller sees the error itself
                raise
            raise Raised from error

    def look_for_noise(self, function: Callable[..., Any], args: Any) -> None:
        """A warning where two evaluations of the same differ. They are made once, and not counted."""
        self.looked = True
        try:
            first, second = ([v.double().clone() for v in _outputs(function(*args))] for _ in range(2))
        except Exception:  # that is said where it matters
            return
        change = max(_size(b - a) / (_size(a) + 1e-300) for a, b in zip(first, second, strict=True))
        if change > 0.01 * max(getattr(self, "rtol", 0.0), getattr(self, "atol", 0.0)):
            self.noisy = True
            warn(
                f"Two evaluations of the same state and time differ by {change:.1g} of their size. {NOISY} "
                f"({self.nfe} evaluations so far)"
            )

    def look_where_stuck(self, struggled: bool = False) -> None:
        """The same where samples could not go on."""
        stuck = bool(((self.status == Status.MAX_STEPS) | (self.status == Status.STEP_SIZE)).any())
        if not self.looked and (stuck or struggled):
            self.look_for_noise(self.drift.terms, (self.start, self.y0))

    def struggles(self, norms: Sequence[Any]) -> bool:
        """Whether steps are rejected again and again. One that is tried again mostly succeeds, as its error falls with
        a power of its size; noise falls with the size alone."""
        if len(norms) < IN_A_ROW or self.looked:
            return False
        rejected = torch.stack([torch.as_tensor(norm).reshape(-1) for norm in norms]) >= 1.0
        many = len(self.error_norms) >= MANY and bool((rejected.double().mean(0) > 0.25).any())
        return many or bool(rejected.unfold(0, IN_A_ROW, 1).all(-1).any())

    def between_steps(self) -> None:
        """What the host has to do between two steps that a device makes."""

    # -- which samples

    @property
    def running(self) -> Tensor:
        return self.status == RUNNING

    def end_as(self, which: Tensor, status: Status) -> None:
        """Those of ``which`` that still run end so."""
        self.status = torch.where(which & self.running, int(status), self.status).to(torch.int8)

    def lost(self, ys: State) -> Tensor:
        """``(B,)``: whether a sample has NaN or Inf, found in one reading pass; on the CPU mostly in a quicker one."""
        if graphs.backend_of(ys[0].device) is None and finite(*ys):
            return torch.zeros_like(self.running)
        return ~sum(ops.rk_error(y, y, [y], (0.0,), 1.0, 1.0, 1.0) for y in ys).isfinite()  # type: ignore[union-attr]

    # -- the end

    def show(self, fraction: float) -> None:
        if self.bar is None:
            return
        self.bar.set_postfix(nfe=self.nfe, refresh=False)
        self.bar.update(min(fraction, 1.0) - self.bar.n)

    def finish(self, angle: Any) -> Solution:
        failed, ys, dense = self.status > 0, self.ys, self.dense
        for i, t in enumerate(self.t_eval):
            unreached = failed & (self.direction * (t - self.reached) > 0)
            for y in dense or ():
                y[i].masked_fill_(column(unreached, y[i]), math.nan)
        reached, times, span = self.reached, _log(self.times, self.reached), (self.start, self.end)
        if angle is not None:  # back to t and x
            ys = (angle.leave(ys[0], self.end),)
            for y, at in zip(dense[0] if dense else (), self.t_eval, strict=True):
                y.copy_(angle.leave(y, at))
            reached, times, span = angle.times(reached), angle.times(times), angle.span
        message = describe(self.status.cpu(), reached.cpu(), span, self.nfe, self.max_steps, self.error, self.noisy)
        if bool(failed.any()):
            ys = tuple(y.masked_fill(column(failed, y), math.nan) for y in ys)
        return Solution(
            y=ys if self.packed else ys[0],
            t=reached,
            status=self.status,
            message=message,
            nfe=self.nfe,
            evaluations=self.evaluations,
            n_accepted=self.n_accepted,
            n_rejected=self.n_rejected,
            times=times,
            step_sizes=_log(self.step_sizes, self.reached),
            error_norms=_log(self.error_norms, self.reached),
            first_step=self.first_step,
            ys=None if dense is None else (dense if self.packed else dense[0]),
            graph=self.plan.choice,
        )

    def solve(self, on_failure: str, angle: Any = None) -> Solution:
        with torch.no_grad(), self.bar or nullcontext():
            try:
                self.integrate()
                on_device = graphs.backend_of(self.status.device) is not None
                self.look_where_stuck(on_device and self.struggles(self.error_norms))
            except Raised as raised:
                self.error = raised.__cause__
                self.end_as(self.running, Status.RAISED)
        solution = self.finish(angle)
        if on_failure == "raise" and not solution.success:
            raise SolverError(solution.message, solution) from self.error
        return solution

    def integrate(self) -> None:
        raise NotImplementedError


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(term.out for term in result)


def _size(v: Tensor) -> float:
    return math.sqrt(float(v.nan_to_num(0.0, 0.0, 0.0).square().sum()))


def _log(values: list[Any], like: Tensor) -> Tensor:
    if any(isinstance(v, Tensor) for v in values):
        return torch.stack([v if isinstance(v, Tensor) else torch.full_like(like, v) for v in values]).cpu()
    return torch.tensor(values, dtype=torch.float64)


def column(choice: Tensor, like: Tensor) -> Tensor:
    """``(B,)`` as ``(B, 1, ..., 1)``, to choose samples of ``like`` by."""
    return choice.reshape(-1, *[1] * (like.dim() - 1))


def padded(function: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> tuple[Tensor, ...]:
    """The results of a function that treats the columns of its arguments ``(..., R)`` one by one, with the same bits
    for a column at any place. Vectorised functions treat what is left over at the end of an array another way: the
    arrays are made a multiple of every vector's length."""
    n = values[0].shape[-1]
    spare = -n % 64
    filled = [torch.cat([v, v[..., -1:].expand(*v.shape[:-1], spare)], -1) if n and spare else v for v in values]
    return tuple(result.expand(*result.shape[:-1], n + spare)[..., :n] for result in function(*filled))
