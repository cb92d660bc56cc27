"""Computes the samples of a shard.

Fixed steps run in batches that are cut at multiples of the batch size, counted by id, and are always full: at the end
of a shard that is not, the samples beside it are computed too and left out. So a sample has the same mates, and the
same bits, whatever was asked for before. Adaptive steps run as a stream through the shard's own slots.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import integrate, noise
from ..grids import Grid
from ..integrate import SolverError, Status
from ..integrate.results import REASONS
from ..predictors import get_corrector, get_predictor
from ..sampling import PCLoop, PcSampler, get_ode_sampler, get_pc_sampler
from ..stochastic import get_sde_sampler
from . import networks, shards
from .settings import Refused, Sample, first_line

Tick = Callable[[int, int], None]
"""Told of how many samples are done, and how many evaluations they took."""


class Computed(NamedTuple):
    """The samples of a shard.

    Args:
        samples: those that did not fail, as the files have them.
        ids: theirs, int64, rising.
        failed: why the others did, by id.
        evaluations: how many samples took so many evaluations.
        slot_evaluations: rows that the network was given.
        batch: the fewest samples that were computed together.
        seconds: it took.
    """

    samples: np.ndarray
    ids: np.ndarray
    failed: dict[int, str]
    evaluations: dict[int, int]
    slot_evaluations: int
    batch: int
    seconds: float


def is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class Sampling:
    """A sampler and its network.

    Raises:
        Refused: the settings, the network or the grid do not fit together; before any sample is computed.
    """

    def __init__(self, settings: Sample, network: Any, device: torch.device, say: Callable[[str], None]) -> None:
        self.settings, self.network, self.device, self.say = settings, network, device, say
        self.shape = networks.sample_shape(settings, network)
        self.rows = settings.batch  # fewer where memory was short
        self.pc_steps: int | None = None
        if settings.kind == "pc" and settings.nfe is not None:
            each = 1 + (settings.corrector_steps or 0)
            self.pc_steps = self._steps(settings.nfe, each, "a predictor step with its corrector steps")
            if not settings.continuous:
                raise Refused("nfe: a network trained on N discrete times takes N steps. Give N in sde_options")
        self.sde = networks.make_sde(settings, self.pc_steps)
        self.grid = self._load_grid()
        shards.check_format(settings, self.shape)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sampler = self.sampler(1, (settings.seed, [0]))
            networks.try_network(network, self.sde, self.shape, device, settings.continuous)
            if isinstance(sampler, PcSampler):
                self._try_steps(sampler)
        except (ValueError, KeyError, TypeError, NotImplementedError, AssertionError) as error:
            raise Refused(first_line(error)) from None

    def _try_steps(self, sampler: PcSampler) -> None:
        """One step of one sample shows whether predictor and corrector know the SDE."""
        x = torch.zeros((1, *self.shape), device=self.device)
        t = torch.full((1,), float(self.sde.T), device=self.device)
        with torch.no_grad(), noise.seeds(self.settings.seed, [0]):
            loop = PCLoop(self.sde, self.network, *sampler.steps)
            loop.predict(loop.correct(x, t)[0], t)

    def _load_grid(self) -> Any:
        if self.settings.grid is None:
            return None
        networks.read(self.settings.grid, "grid")
        try:
            grid = Grid.load(self.settings.grid, self.sde)
        except ValueError as error:
            raise Refused(f"grid: {first_line(error)}") from None
        if abs(grid.times[-1] - self.settings.eps) > 1e-6 * self.settings.eps:
            raise Refused(f"grid: was calibrated for eps {grid.times[-1]:g}, got {self.settings.eps:g}")
        return grid

    @staticmethod
    def _steps(nfe: int, each: int, what: str) -> int:
        if nfe % each or nfe < each:
            near = max(each, round(nfe / each) * each)
            raise Refused(f"nfe: {what} takes {each} evaluations, got {nfe}, which is no multiple. {near} is near")
        return nfe // each

    def sampler(self, count: int, seeds: noise.Seeds) -> Any:
        """The library's sampler for ``count`` samples."""
        s, shape = self.settings, (count, *self.shape)
        common: dict[str, Any] = {"denoise": s.denoise, "eps": s.eps, "device": self.device, "seeds": seeds}
        if s.kind == "fixed":
            steps = None
            if s.nfe is not None:
                each = 1
                if s.sampler in integrate.METHODS:
                    each = len(integrate.tableaus.tableau_of(s.sampler).b)
                steps = self._steps(s.nfe, each, f"a step of {s.sampler}")
            return get_ode_sampler(
                self.sde, shape, _same, method=s.sampler, steps=steps, grid=self.grid, order=s.order or 3, **common
            )
        if s.kind == "adaptive":
            return get_ode_sampler(
                self.sde,
                shape,
                _same,
                method=s.sampler,
                rtol=s.rtol or 0.0,
                atol=s.atol or 0.0,
                order=s.order or 3,
                coordinate=s.coordinate or "t",
                control="per_sample",
                **common,
            )
        if s.kind == "fixed_sde":
            assert s.nfe is not None and s.order is not None
            steps = s.nfe - bool(s.denoise)  # its evaluation is one of them
            return get_sde_sampler(self.sde, shape, _same, method=s.sampler, steps=steps, order=s.order, **common)
        if s.kind == "adaptive_sde":
            return get_sde_sampler(
                self.sde,
                shape,
                _same,
                method="adaptive",
                rtol=s.rtol or 0.0,
                atol=s.atol or 0.0,
                order=s.order or 2,
                **common,
            )
        return get_pc_sampler(
            self.sde,
            shape,
            get_predictor(s.predictor or "none"),
            get_corrector(s.corrector or "none"),
            _same,
            s.snr or 0.0,
            s.corrector_steps or 0,
            continuous=s.continuous,
            on_failure="status",
            **common,
        )

    # -- a shard

    def shard(self, first: int, stop: int, tick: Tick) -> Computed:
        """Samples ``first`` to ``stop - 1``."""
        start = time.perf_counter()
        found = _Shard(self.settings, first, stop, tick)
        (self._refilled if self.settings.refills else self._batches)(found)
        return found.computed(time.perf_counter() - start)

    def _batches(self, found: _Shard) -> None:
        batch = self.settings.batch
        for start in range(found.first // batch * batch, found.stop, batch):
            at = start
            while at < min(start + batch, found.stop):
                rows = min(self.rows, start + batch - at)
                if at + rows <= found.first:
                    at += rows
                    continue
                try:
                    y, reasons, evaluations = self._batch(range(at, at + rows))
                except Exception as error:
                    self._halve(error)
                    continue
                found.add(np.arange(at, at + rows), y, reasons, evaluations, int(evaluations.sum()), rows)
                at += rows

    def _batch(self, ids: range) -> tuple[Tensor, dict[int, str], np.ndarray]:
        """The samples, why some failed, by row, and the evaluations of each."""
        sampler = self.sampler(len(ids), (self.settings.seed, torch.arange(ids.start, ids.stop)))
        if self.settings.kind == "pc":
            y, nfe = sampler(self.network)
            lost = ~y.reshape(len(y), -1).isfinite().all(1)
            reasons = dict.fromkeys(lost.nonzero().flatten().tolist(), REASONS[Status.NOT_FINITE])
            return y, reasons, np.full(len(y), nfe)
        try:
            solution = sampler.solve(self.network)
        except SolverError as error:
            if error.solution is None or error.__cause__ is not None:  # the network raised it
                raise error.__cause__ or error from None
            solution = error.solution
        return solution.y, _reasons(solution.status, solution.t), solution.evaluations.cpu().numpy()

    def _refilled(self, found: _Shard) -> None:
        while len(left := found.left()):
            stream = self.sampler(len(left), (self.settings.seed, left)).stream(self.network, self.rows)
            before = 0
            try:
                for group in stream:
                    ids, evaluations = left[group.rows].numpy(), group.evaluations.cpu().numpy()
                    reasons = _reasons(group.status, group.t)
                    found.add(ids, group.y, reasons, evaluations, stream.computed - before, self.rows)
                    before = stream.computed
            except Exception as error:
                self._halve(error)

    def _halve(self, error: Exception) -> None:
        """Fewer samples at a time, where memory was short; else the error goes on."""
        if not is_out_of_memory(error) or self.rows == 1 or self.settings.mixes_rows:
            raise error
        self.say(f"out of memory with {self.rows} samples at a time: going on with {(self.rows + 1) // 2}")
        self.rows = (self.rows + 1) // 2


class _Shard:
    """A shard that fills."""

    def __init__(self, settings: Sample, first: int, stop: int, tick: Tick) -> None:
        self.settings, self.first, self.stop, self.tick = settings, first, stop, tick
        self.samples: np.ndarray | None = None
        self.there = np.zeros(stop - first, bool)
        self.failed: dict[int, str] = {}
        self.evaluations: Counter[int] = Counter()
        self.slot_evaluations, self.batch = 0, settings.batch

    def left(self) -> Tensor:
        """The ids that are still to be computed."""
        done = self.there.copy()
        done[[i - self.first for i in self.failed]] = True
        return torch.from_numpy(np.flatnonzero(~done) + self.first)

    def add(
        self, ids: np.ndarray, y: Tensor, reasons: dict[int, str], evaluations: np.ndarray, computed: int, batch: int
    ) -> None:
        inside = (ids >= self.first) & (ids < self.stop)
        good = inside.copy()
        good[list(reasons)] = False
        whole = encoded = shards.encoded(self.settings, y)
        if not good.all():
            encoded = whole[good]
        if self.samples is None:
            self.samples = np.empty((self.stop - self.first, *whole.shape[1:]), whole.dtype)
        self.samples[ids[good] - self.first] = encoded
        self.there[ids[good] - self.first] = True
        self.failed |= {int(ids[row]): why for row, why in reasons.items() if inside[row]}
        self.evaluations.update(evaluations[inside].tolist())
        self.slot_evaluations += computed
        self.batch = min(self.batch, batch)
        self.tick(int(inside.sum()), int(evaluations[inside].sum()))

    def computed(self, seconds: float) -> Computed:
        assert self.samples is not None
        samples = self.samples if self.there.all() else self.samples[self.there]
        ids = np.flatnonzero(self.there) + self.first
        evaluations = dict(sorted(self.evaluations.items()))
        return Computed(samples, ids, self.failed, evaluations, self.slot_evaluations, self.batch, seconds)


def _same(x: Tensor) -> Tensor:
    return x


def _reasons(status: Tensor, t: Tensor) -> dict[int, str]:
    rows = status.nonzero().flatten().tolist()
    if not rows:
        return {}
    kinds, times = status.tolist(), t.tolist()
    return {
        row: REASONS[Status(kinds[row])].format(max_steps=10_000, error="an error") + f" (t = {times[row]:.6g})"
        for row in rows
    }
