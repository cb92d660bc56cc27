"""Runs as loops that a device can make by itself: adaptive ones, of which one attempted step is a function of tensors,
and those on a grid of times, whose steps are known beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import graphs, ops
from ..checks import finite
from .results import Status
from .run import Run, State, column


class OnGrid(Run):
    """A run over the times of ``grid``. Its ``step`` makes all its steps: as a :class:`graphs.Loop` it is one graph."""

    STATE: tuple[str, ...] = ("ys", "status", "reached", "evaluations", "n_accepted")

    evaluations_a_step = 1
    t: float
    going: Tensor  # not used: the number of steps is known

    def __init__(self, grid: Sequence[float], *args: Any) -> None:
        super().__init__(*args)
        self.grid = grid
        self.first_step = abs(grid[1] - grid[0])
        self.on_host = graphs.backend_of(self.reached.device) is None
        self.unnoted = 0

    def step(self) -> None:
        raise NotImplementedError

    def drive(self) -> None:
        try:
            self.plan.run(self, self.reached.device, (type(self).__name__, tuple(self.grid)), steps=range(1))
        finally:
            self.note()
        if self.plan.choice.mode != "off":
            self.nfe = self.evaluations_a_step * (len(self.grid) - 1)
            self.times, self.step_sizes = list(self.grid), [abs(b - a) for a, b in itertools.pairwise(self.grid)]
        self.end_as(self.running, Status.SUCCESS)

    def end_step(self, t: float, t_next: float, ys: State) -> None:
        """What is noted after a step from ``t`` to ``t_next``. On the CPU, as long as no sample is lost, the steps are
        counted alone."""
        if not (self.on_host and finite(*ys)):
            self.note()
            self.end_as(self.lost(ys), Status.NOT_FINITE)
        self.unnoted, self.t = self.unnoted + 1, t_next
        if not self.on_host:
            self.note()
        self.times.append(t_next)
        self.step_sizes.append(abs(t_next - t))
        self.show(abs(t_next - self.start) / abs(self.end - self.start))

    def note(self) -> None:
        """The steps made since the last time, up to ``t``, for the samples that run."""
        if self.unnoted:
            running = self.running
            self.reached = torch.where(running, self.t, self.reached)
            self.n_accepted += running * self.unnoted
            self.evaluations += running * (self.unnoted * self.evaluations_a_step)
            self.unnoted = 0


class Stepping(Run):
    """A run with ``R`` rows of numbers: one a sample, or one for the batch.

    ``step`` is one attempted step of every row that is on its way: a :class:`graphs.Loop`. On the CPU, where to look at
    a value costs nothing, it looks where that saves work, and what goes wrong is dealt with at once. On a device
    nothing in it waits: it does what may be needed (:meth:`maybe`), and where the host has to decide something it
    clears ``going``; the host then decides between two steps (:meth:`attend`).
    """

    STATE: tuple[str, ...] = (
        "ys", "dense", "status", "reached", "evaluations", "n_accepted", "n_rejected",
        "t", "h", "rejected", "overflow", "attempts", "going", "look", "stop", "steps_made", "logged", "count",
    )  # fmt: skip
    ROWS = Run.ROWS | dict.fromkeys(("t", "h", "rejected", "overflow", "attempts", "target"), 0) | {"logged": 2}
    LOG = 256  # steps that a device notes down before the host takes them

    per_sample = True
    evaluations_a_step = 1
    h: Tensor  # (R,) float64: the step to try next

    def start_stepping(self, t: Tensor) -> None:
        """The state that all these runs have, with rows at times ``t``, float64 ``(R,)``."""
        self.t = t
        self.on_host = graphs.backend_of(t.device) is None
        self.rejected, self.overflow = torch.zeros((2, len(t)), dtype=torch.bool, device=t.device)
        self.attempts = torch.zeros(len(t), dtype=torch.int64, device=t.device)
        self.going = torch.ones(1, dtype=torch.int32, device=t.device)
        # Whether the host has to look for NaN, and whether the batch cannot go on as it is.
        self.look, self.stop = torch.zeros((2, 1), dtype=torch.bool, device=t.device)
        # Of the steps that a device made: sizes, error norms and times. The last line is for what is no step.
        self.steps_made, self.count = torch.zeros((2, 1), dtype=torch.int64, device=t.device)
        self.logged = None if self.on_host else t.new_zeros((3, self.LOG + 1, len(t)))

    # -- rows and samples

    def of_batch(self, v: Tensor) -> Tensor:
        """A number a sample from a number a row."""
        return v if self.per_sample else v.expand(len(self.status))

    def on_their_way(self) -> Tensor:
        """``(R,)``: rows that have neither arrived nor failed."""
        if self.per_sample:
            return self.running
        return (self.t != self.end) & self.running.any() & ~self.stop

    def active(self) -> Tensor:
        """``(R,)``: rows that this step moves. Steps that a device makes after the last one move none."""
        return self.on_their_way() if self.on_host else self.on_their_way() & self.going.bool()

    def maybe(self, which: Tensor) -> bool:
        """Whether to do what only some rows need: on a device always, for to look would be to wait."""
        return not self.on_host or bool(which.any())

    def chosen(self, rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
        """``new`` in the samples of these rows, ``old`` in the others; on a device in the memory of ``old``."""
        if self.on_host:
            return torch.where(column(self.of_batch(rows), old), new, old)
        ops.put(old, new, rows)
        return old

    # -- the loop

    def step(self) -> None:
        raise NotImplementedError

    def drive(self) -> None:
        """Steps until no row is on its way."""
        begun = self.nfe
        self.go_on()
        while bool(self.going):
            self.plan.run(self, self.t.device, self.kind())
            self.between_steps()
        if not self.on_host:
            self.nfe = begun + self.evaluations_a_step * int(self.steps_made)

    def between_steps(self) -> None:
        self.take_log()
        if bool(self.look):
            self.attend()
            self.look = torch.zeros_like(self.look)
        self.go_on()

    def kind(self) -> tuple[object, ...]:
        """What captured steps of one sampler may differ in, beside shapes."""
        return type(self).__name__, self.start, self.end

    def go_on(self) -> None:
        """Whether there is another step to make."""
        going = self.on_their_way().any()[None]
        self.going = going if self.on_host else (going & ~self.look & (self.count < self.LOG)).int()

    def attend(self) -> None:
        """Decides, after a step of a device that overflowed, which samples have NaN."""
        raise NotImplementedError

    # -- what was done

    def note(self, h: Tensor, norm: Tensor, t: Tensor, active: Tensor, accepted: Tensor) -> None:
        """Writes a step down; ``t`` is the time after it. All ``(R,)``."""
        moving = self.of_batch(active) & self.running
        self.evaluations += moving * self.evaluations_a_step
        self.n_accepted += moving & self.of_batch(accepted)
        self.n_rejected += moving & ~self.of_batch(accepted)
        self.attempts = self.attempts + active
        if self.logged is not None:
            line = torch.stack([h, norm, t])[:, None]
            self.logged.index_copy_(1, torch.where(self.going > 0, self.count, self.LOG), line)
            self.count = self.count + self.going
            self.steps_made = self.steps_made + self.going
        else:
            self.step_sizes.append(h)
            self.error_norms.append(norm)
            self.times.append(t)

    def take_log(self) -> None:
        """What a device noted down."""
        if self.logged is None:
            return
        sizes, norms, times = self.logged[:, : int(self.count)].clone()
        if self.per_sample:
            self.step_sizes.extend(sizes)
            self.error_norms.extend(norms)
            self.times.extend(times)
        else:
            self.step_sizes.extend(sizes[:, 0].tolist())
            self.error_norms.extend(norms[:, 0].tolist())
            self.times.extend(times[norms < 1.0].tolist())
        self.count = torch.zeros_like(self.count)
        self.show_progress()

    def show_progress(self) -> None:
        if self.per_sample:
            self.show(1.0 - float(self.running.double().mean()))
        else:
            self.show(abs(self.t.item() - self.start) / abs(self.end - self.start))
