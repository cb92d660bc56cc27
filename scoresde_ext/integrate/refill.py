"""Continuous batching: under per-sample control the slot of a finished sample goes to the next one at once.

A sample that moves to another slot takes along everything that belongs to it (``ROWS`` of its run), so it ends with the
bits it would have had anywhere else. New samples are begun a whole batch at a time, and wait beside for a slot: their
first evaluations are full batches too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..callers import untraced
from ..checks import whole
from .results import RUNNING
from .run import Raised, column


class Finished(NamedTuple):
    """Samples that ended together.

    Args:
        rows: ``(n,)``, int64, on the CPU: which samples.
        y: ``(n, *)``: their states, NaN where one failed; a tuple where the initial states are.
        t: ``(n,)``, float64: the time each reached.
        status: ``(n,)``, int8: a :class:`Status` for each.
        evaluations: ``(n,)``, int64: how many each needed.
    """

    rows: Tensor
    y: Any
    t: Tensor
    status: Tensor
    evaluations: Tensor


class Stream:
    """What :func:`scoresde_ext.integrate.stream` returns; to be iterated over once.

    ``after`` is what is still to be done with finished samples. It is given as many at a time as there are slots.

    Attributes:
        computed: rows that the network was given so far.
        needed: how many of them were samples still on their way. ``needed / computed`` is the slot occupancy.
        nfe: evaluations, each for all slots there were.
    """

    def __init__(
        self,
        begin: Callable[[int, int], tuple[Any, Any]],
        count: int,
        slots: int,
        after: Callable[[Finished], Finished] | None = None,
    ) -> None:
        self.count, self.slots = whole("count", count, 0), whole("slots", slots, 1)
        self.begin_run, self.after = begin, after
        self.ended: list[Finished] = []  # those that wait for ``after``
        self.computed = self.needed = self.nfe = 0
        self.waiting: Any = None  # begun samples without a slot,
        self.taken = self.begun = 0  # of which those before ``taken`` have got one

    def __iter__(self) -> Iterator[Finished]:
        for group in self.finished():
            if self.after is None:
                yield group
                continue
            self.ended.append(group)
            while sum(len(g.rows) for g in self.ended) >= self.slots:
                yield self.after(self.joined())
        if self.ended:
            assert self.after is not None
            yield self.after(self.joined())

    def joined(self) -> Finished:
        """The first ``slots`` samples that wait, or all."""
        groups = zip(*self.ended, strict=True)
        whole = Finished(*(torch.cat(values) for values in groups))
        self.ended = [Finished(*(v[self.slots :] for v in whole))] if len(whole.rows) > self.slots else []
        return Finished(*(v[: self.slots] for v in whole))

    def finished(self) -> Iterator[Finished]:
        if self.count == 0:
            return
        run, angle = self.begin()
        rows = torch.arange(self.begun)  # the sample in each slot, -1 in an empty one
        self.taken, self.waiting = self.begun, None
        while True:
            self.step(run)
            ended = (run.status != RUNNING).cpu() & (rows >= 0)
            while bool(ended.any()):
                yield self.collect(run, angle, ended.nonzero().flatten(), rows)
                ended = self.refill(run, ended.nonzero().flatten(), rows)
            left = (rows >= 0).nonzero().flatten()
            if len(left) == 0:
                return
            if 2 * len(left) <= len(rows):
                select(run, left.to(run.status.device))
                rows = rows[left]

    @untraced
    def begin(self) -> tuple[Any, Any]:
        """The next samples, as many as there are slots, at their start; with the flow in the angle."""
        first, self.begun = self.begun, min(self.begun + self.slots, self.count)
        with _handing_on(), torch.no_grad():
            run, angle = self.begin_run(first, self.begun)
        self.account(run, run.nfe)
        return run, angle

    @untraced
    def step(self, run: Any) -> None:
        before = run.nfe
        with _handing_on(), torch.no_grad():
            run.between_steps()
            run.step()
        self.account(run, run.nfe - before)
        run.times, run.step_sizes, run.error_norms = [], [], []  # the logs of a solve: a stream has no end

    def account(self, run: Any, evaluations: int) -> None:
        self.nfe += evaluations
        self.computed += evaluations * len(run.status)

    @untraced
    def collect(self, run: Any, angle: Any, slots: Tensor, rows: Tensor) -> Finished:
        """Those in ``slots``, which are empty then."""
        at = slots.to(run.status.device)
        status, reached, ys = run.status[at], run.reached[at], tuple(y[at] for y in run.ys)
        if angle is not None:
            ys, reached = (angle.leave(ys[0], run.end),), angle.times(reached)
        failed = status > 0
        if bool(failed.any()):
            with torch.no_grad():
                run.look_where_stuck()
            ys = tuple(y.masked_fill(column(failed, y), torch.nan) for y in ys)
        ended, evaluations = rows[slots], run.evaluations[at]
        rows[slots] = -1
        self.needed += int(evaluations.sum())
        return Finished(ended, ys if run.packed else ys[0], reached, status, evaluations)

    @untraced
    def refill(self, run: Any, empty: Tensor, rows: Tensor) -> Tensor:
        """Puts waiting samples into the ``empty`` slots, as far as there are any. Returns which slots hold a sample
        that failed as it began."""
        while len(empty) and self.taken < self.count:
            if self.waiting is None:
                self.waiting, _ = self.begin()
            of_waiting = self.taken - (self.begun - len(self.waiting.status))
            n = min(len(empty), self.begun - self.taken)
            device = run.status.device
            put(run, empty[:n].to(device), self.waiting, torch.arange(of_waiting, of_waiting + n, device=device))
            rows[empty[:n]] = torch.arange(self.taken, self.taken + n)
            self.taken, empty = self.taken + n, empty[n:]
            if self.taken == self.begun:
                self.waiting = None
        return (run.status != RUNNING).cpu() & (rows >= 0)


@contextmanager
def _handing_on() -> Iterator[None]:
    """What the right-hand side raised, as it is."""
    try:
        yield
    except Raised as raised:
        raise raised.__cause__ or raised from None


# ---- rows of a run ----


def select(run: Any, rows: Tensor) -> None:
    """Leaves these rows of the run alone."""
    for name, axis in run.ROWS.items():
        setattr(run, name, each(lambda v, axis: v.index_select(axis, rows), axis, getattr(run, name)))


def put(run: Any, rows: Tensor, other: Any, other_rows: Tensor) -> None:
    """Rows of another run in place of those of ``run``."""

    def replaced(into: Tensor, axis: int, source: Tensor) -> Tensor:
        return into.index_copy(axis, rows, source.index_select(axis, other_rows))

    for name, axis in run.ROWS.items():
        setattr(run, name, each(replaced, axis, getattr(run, name), getattr(other, name)))


def each(function: Callable[..., Tensor], axis: int, value: Any, *others: Any) -> Any:
    """``function(tensor, axis, *tensors)`` for the tensors in a tuple, a list, or an object with ``ROWS``."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return function(value, axis, *others)
    if isinstance(value, (tuple, list)):
        parts = [each(function, axis, *vs) for vs in zip(value, *others, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    new = copy.copy(value)
    for name, its_axis in value.ROWS.items():
        setattr(new, name, each(function, its_axis, *(getattr(v, name) for v in (value, *others))))
    return new
