"""Who computes which shard: one process alone, or the processes that torchrun (or Slurm) started.

Workers talk through torch.distributed's store alone. There is no process group: no collective waits for a worker that
is gone. Each takes the next shard from a counter; what a lost worker had taken, others take again. A shard that is made
twice is no harm: its bytes are the same, and a file gets its name at once.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

LEASE = 60.0
"""Seconds without a sign of life after which a worker counts as lost."""

Shards = Sequence[tuple[int, int]]


class Alone:
    """One worker."""

    rank, size, restarts = 0, 1, 0

    def __init__(self) -> None:
        self.next, self.samples, self.evaluations = 0, 0, 0
        self.shards: Shards = ()

    def agree(self, choose: Callable[[], Any]) -> Any:
        """What the first worker chooses, for all. None where it refused, which it raises itself."""
        return choose()

    def begin(self, shards: Shards, written: Callable[[], set[int]]) -> None:
        """Starts on these shards; ``written`` looks up the first ids of those that exist."""
        self.shards = shards

    def claim(self, idle: Callable[[], None]) -> int | None:
        """The next shard for this worker, by index; None when all are written. ``idle`` is called while it waits."""
        self.next += 1
        return self.next - 1 if self.next <= len(self.shards) else None

    def written(self, index: int) -> None:
        """A shard that was claimed is on disk and in the manifest."""

    def tick(self, samples: int, evaluations: int) -> None:
        self.samples += samples
        self.evaluations += evaluations

    def totals(self) -> tuple[int, int]:
        """Samples and evaluations of all workers in this run."""
        return self.samples, self.evaluations

    def leave(self) -> None:
        """The end of this worker's part."""


class Team(Alone):
    """A worker among several.

    Keys of the store: ``plan`` what the first worker chose, ``next`` shards claimed, ``held/R`` those that worker R has
    claimed and not written, ``beat/R`` its signs of life, ``again/I`` who took shard I from a lost worker, ``samples``
    and ``evaluations`` the sums, ``left`` workers that have ended.
    """

    def __init__(self, store: Any, rank: int, size: int, restarts: int = 0, lease: float | None = None) -> None:
        super().__init__()
        self.store, self.rank, self.size, self.restarts = store, rank, size, restarts
        self.lease = LEASE if lease is None else lease
        self.held: list[int] = []
        self.lock = threading.Lock()
        self.beats: dict[int, tuple[int, float]] = {}
        self.over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self.over.wait(self.lease / 10):
            try:
                self.store.add(f"beat/{self.rank}", 1)
            except RuntimeError:  # the store is gone: whoever needs it next says so
                return

    def agree(self, choose: Callable[[], Any]) -> Any:
        if self.rank > 0:
            self.store.wait(["plan"], timedelta(hours=1))
            return json.loads(self.store.get("plan"))
        try:
            chosen = choose()
        except BaseException:
            self.store.set("plan", "null")
            raise
        self.store.set("plan", json.dumps(chosen))
        return chosen

    def begin(self, shards: Shards, written: Callable[[], set[int]]) -> None:
        self.shards, self.look_up = shards, written

    def claim(self, idle: Callable[[], None]) -> int | None:
        index = self.store.add("next", 1) - 1
        if index < len(self.shards):
            self._hold(index)
            return index
        while True:
            lost = self._lost()
            if lost is None:
                return None
            for index in lost:
                if self._take_again(index):
                    self._hold(index)
                    return index
            idle()
            time.sleep(min(1.0, self.lease / 5))

    def _hold(self, index: int) -> None:
        with self.lock:
            self.held.append(index)
            self.store.set(f"held/{self.rank}", json.dumps(self.held))

    def written(self, index: int) -> None:
        with self.lock:
            self.held.remove(index)
            self.store.set(f"held/{self.rank}", json.dumps(self.held))

    def alive(self, rank: int) -> bool:
        """Whether a worker gave a sign of life within the lease."""
        if rank == self.rank:
            return True
        count, now = self.store.add(f"beat/{rank}", 0), time.monotonic()
        if rank not in self.beats or self.beats[rank][0] != count:
            self.beats[rank] = (count, now)
        return now - self.beats[rank][1] < self.lease

    def _lost(self) -> list[int] | None:
        """Shards that nobody who lives has in hand, though all are claimed; None when all are written."""
        in_hand: set[int] = set()
        dead = False
        for rank in range(self.size):
            key = f"held/{rank}"
            held = json.loads(self.store.get(key)) if self.store.check([key]) else []
            if not held:
                continue
            if self.alive(rank):
                in_hand.update(held)
            else:
                dead = True
        if in_hand and not dead:
            return []
        there = self.look_up()
        left = [i for i, (first, _) in enumerate(self.shards) if first not in there]
        if not left:
            return None
        return [i for i in left if i not in in_hand]

    def _take_again(self, index: int) -> bool:
        """Whether the shard is now this worker's: one taker for each that was lost."""
        key, me = f"again/{index}", str(self.rank)
        owner = self.store.compare_set(key, "", me).decode()
        if owner == me:
            return True
        return not self.alive(int(owner)) and self.store.compare_set(key, owner, me).decode() == me

    def tick(self, samples: int, evaluations: int) -> None:
        self.store.add("samples", samples)
        self.store.add("evaluations", evaluations)

    def totals(self) -> tuple[int, int]:
        return self.store.add("samples", 0), self.store.add("evaluations", 0)

    def leave(self) -> None:
        """The first worker's process may hold the store: it goes last, unless others are lost."""
        self.over.set()
        self.store.add("left", 1)
        until = time.monotonic() + 10.0
        while self.rank == 0 and self.store.add("left", 0) < self.size and time.monotonic() < until:
            time.sleep(0.05)


def join() -> Alone:
    """This process as a worker, by the environment that torchrun sets."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        alone = Alone()
        alone.restarts = restarts
        return alone
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://")))
    # torchrun keeps one store over its restarts: what a former attempt wrote there would be taken for this one's.
    return Team(PrefixStore(f"scoresde_ext/{restarts}", store), rank, size, restarts)
