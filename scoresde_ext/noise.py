"""Where every random number comes from.

One source is in force at a time. By default it is torch's generator: a key is drawn from it (so ``torch.manual_seed``
rules) and the kernels expand the key into noise. Two context managers put another in its place:

* ``with replay(tensors):`` each draw takes the next tensor, as what ``torch.rand``, ``torch.randn`` or
  ``torch.randint`` would have returned;
* ``with seeds(seed, ids):`` sample b of each draw is stream ``ids[b]`` of the seed, whatever the batch it is computed
  in.

Code that needs noise asks :func:`normal`, :func:`uniform` or :func:`integers`. A sampler wraps its loop in :func:`run`,
which draws one key for all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import ops
from ._C import host
from .callers import warn
from .checks import as_whole, outlasting, traced, whole
from .reference import Draw

__all__ = [
    "Draws",
    "Seeds",
    "integers",
    "normal",
    "normal_tensor",
    "part",
    "prior",
    "replay",
    "run",
    "seeded",
    "seeds",
    "streams",
    "times_and_normal",
    "torch_draws",
    "uniform",
]

Seeds = int | tuple[int, Tensor | Sequence[int]] | None
"""What the samplers take as ``seeds``: see :func:`seeded`."""


class Source(Protocol):
    """What can be asked for noise. ``like`` gives the shape ``(B, *)``, the device and the dtype."""

    def normal(self, like: Tensor) -> Draw: ...

    def uniform(self, like: Tensor) -> Tensor: ...

    def integers(self, high: int, like: Tensor) -> Tensor: ...


def _new_key(device: torch.device) -> Tensor:
    # On the device and from its generator: no copy, no synchronisation, and a captured graph refreshes it at each
    # replay.
    if device.type == "cpu" and not traced():
        return host.new_key()
    return torch.randint(2**62, (2,), device=device)


class _Generator:
    """torch's generator: a new key for every draw."""

    def normal(self, like: Tensor) -> Draw:
        return Draw(key=_new_key(like.device))

    def uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, device=like.device, dtype=like.dtype)

    def integers(self, high: int, like: Tensor) -> Tensor:
        return torch.randint(high, like.shape, device=like.device)


class _Streams:
    """One key, and a count of the draws made from it."""

    def __init__(self, key: Tensor, ids: Tensor | None) -> None:
        self.key, self.ids = key, ids
        self.one_draw = torch.tensor([0, 1], device=key.device)

    def move(self, device: torch.device) -> None:
        self.key, self.one_draw = self.key.to(device), self.one_draw.to(device)
        self.ids = None if self.ids is None else self.ids.to(device)

    def _next(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.key.device != like.device:
            self.move(like.device)
        if self.ids is not None and len(self.ids) != like.shape[0]:
            raise ValueError(f"ids: expected one stream id a sample, {like.shape[0]}, got {len(self.ids)}.")
        # The count is part of the key, a tensor: as a number it would be a constant of a compiled or captured graph.
        key = self.key
        if key.is_cpu and not traced():
            self.key = host.next_draw(key)
        else:
            self.key = outlasting(key + self.one_draw)
        return key, self.ids

    def normal(self, like: Tensor) -> Draw:
        key, ids = self._next(like)
        return Draw(key=key, ids=ids)

    def uniform(self, like: Tensor) -> Tensor:
        key, ids = self._next(like)
        return ops.noise_uniform(key, ids, 0, like.shape).to(like.dtype)

    def integers(self, high: int, like: Tensor) -> Tensor:
        key, ids = self._next(like)
        return ops.noise_integers(key, ids, 0, like.shape, high)


class _Replay:
    """Recorded draws, in order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self.taken = tensors, 0

    def _next(self, like: Tensor, what: str) -> Tensor:
        if self.taken == len(self.tensors):
            raise RuntimeError(
                f"noise.replay: expected one more draw ({what} of shape {tuple(like.shape)}), "
                f"but all {self.taken} are used."
            )
        drawn = torch.as_tensor(self.tensors[self.taken])
        if drawn.shape != like.shape:
            raise ValueError(
                f"noise.replay: draw {self.taken} is {what} and has to have shape {tuple(like.shape)}, "
                f"got {tuple(drawn.shape)}."
            )
        self.taken += 1
        return drawn.to(like.device)

    def normal(self, like: Tensor) -> Draw:
        return Draw(z=self._next(like, "normal noise").to(like.dtype))

    def uniform(self, like: Tensor) -> Tensor:
        return self._next(like, "uniform noise").to(like.dtype)

    def integers(self, high: int, like: Tensor) -> Tensor:
        drawn = self._next(like, f"integers below {high}")
        integers = drawn.to(torch.int64)
        if not torch.equal(integers.to(drawn.dtype), drawn) or bool(((integers < 0) | (integers >= high)).any()):
            raise ValueError(
                f"noise.replay: draw {self.taken - 1} has to hold integers from 0 to {high - 1}, "
                f"got {drawn.dtype} with other values."
            )
        return integers


_of_thread = threading.local()  # no subclass: torch.compile before 2.12 would take the attributes of its class
_generator = _Generator()


def _in_force() -> Source:
    return getattr(_of_thread, "source", _generator)


@contextmanager
def _as_source(source: Source) -> Iterator[None]:
    before = _in_force()
    _of_thread.source = source
    try:
        yield
    finally:
        _of_thread.source = before


@contextmanager
def replay(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Each draw takes the next of ``tensors``, in the order in which upstream draws.

    Floats are cast to the dtype of the state, integers come as int64, everything is moved to the device of the state.

    Raises:
        ValueError: a draw of another shape than the next tensor's.
        RuntimeError: more draws than tensors, or tensors left over at the end of the context.
    """
    source = _Replay(list(tensors))
    with _as_source(source):
        yield
    left = len(source.tensors) - source.taken
    if left:
        raise RuntimeError(
            f"noise.replay: expected all {len(source.tensors)} tensors to be drawn, but {left} are left over."
        )


@contextmanager
def seeds(seed: int, ids: Tensor | Sequence[int]) -> Iterator[None]:
    """Sample b of each draw is stream ``ids[b]`` of ``seed``: the same numbers at any batch size, in any order, on any
    device.

    Draws are counted from the start of the context: calls of samplers within one context draw on and on, as a roll-out
    needs it.

    Args:
        seed: any integer of 64 bits.
        ids: int64 ``(B,)``, one stream a sample.

    Raises:
        ValueError: ids that are not integers ``(B,)``, a seed beyond 64 bits; a draw for a batch of another size.
    """
    with _as_source(_streams(seed, ids)):
        yield


def _streams(seed: Any, ids: Any, draw: int = 0) -> _Streams:
    if isinstance(ids, range):
        ids = torch.arange(ids.start, ids.stop, ids.step)
    elif isinstance(ids, Sequence):
        numbers = [as_whole(i) for i in ids]
        if None in numbers:
            wrong = numbers.index(None)
            raise ValueError(f"ids: expected integers of shape (B,), got {ids[wrong]!r:.100} at {wrong}.")
        ids = torch.tensor(numbers, dtype=torch.int64)
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"ids: expected integers of shape (B,), got {ids!r:.100}.") from None
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(f"ids: expected integers of shape (B,), got {ids.dtype} of shape {tuple(ids.shape)}.")
    seed = whole("seed", seed, -(2**63), 2**64 - 1, "an integer of 64 bits,")
    mixed = seed % 2**64 if draw == 0 else _mixed(seed, draw)
    signed = mixed - 2**64 if mixed >= 2**63 else mixed
    return _Streams(torch.tensor([signed, 0]), ids.to(torch.int64))


def _mixed(seed: int, draw: int) -> int:
    """The seed of another draw: number ``draw`` of SplitMix64 from ``seed`` on (Steele, Lea, Flood 2014)."""
    v = (seed + draw * 0x9E3779B97F4A7C15) % 2**64
    v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    v = (v ^ (v >> 27)) * 0x94D049BB133111EB % 2**64
    return v ^ (v >> 31)


def seeded(seeds: Seeds, batch: int, draw: int = 0) -> AbstractContextManager[None]:
    """The context in which a sampler's argument ``seeds`` puts its ``batch`` samples: for a seed, its streams 0, 1, ...
    , batch - 1; for ``(seed, ids)``, :func:`seeds` with these ids; for None, the source that is in force. ``draw``: the
    number of the call, 0, 1, ...: each has noise of its own.

    Raises:
        ValueError: anything else, or another number of ids than samples; at once, not when the context is entered.
    """
    draw = whole("draw", draw, 0, 2**64 - 1, "the number of a draw")
    if seeds is None:
        return nullcontext()
    if as_whole(seeds) is not None:
        return _as_source(_streams(seeds, range(batch), draw))
    if not isinstance(seeds, tuple) or len(seeds) != 2 or isinstance(seeds[0], bool):
        raise ValueError(f"seeds: expected None, a seed or (seed, ids), got {seeds!r:.100}.")
    source = _streams(*seeds, draw)
    assert source.ids is not None
    if len(source.ids) != batch:
        raise ValueError(f"seeds: expected one stream id a sample, {batch}, got {len(source.ids)}.")
    return _as_source(source)


class Draws:
    """The ``seeds`` of a sampler. Called, the context of one of its calls. A second call without the number of a draw
    has the same noise again: a warning says so, once, for in a roll-out that is a mistake."""

    def __init__(self, seeds: Seeds) -> None:
        self.seeds, self.calls = seeds, 0

    def __call__(self, batch: int, draw: int | None) -> AbstractContextManager[None]:
        context = seeded(self.seeds, batch, 0 if draw is None else draw)
        if draw is None and self.seeds is not None:
            self.calls += 1
            if self.calls == 2:
                warn(
                    "seeds: this sampler was called before, and draws the same noise again. Where every call needs its "
                    "own, as in a roll-out, number the calls, draw=0, 1, ..., or leave seeds out and make all calls "
                    "within one `with noise.seeds(seed, ids):`. Where it is meant to be the same, say draw=0."
                )
        return context


def part(seeds: Seeds, first: int, stop: int) -> Seeds:
    """Of a sampler's ``seeds``, those of samples ``first`` to ``stop - 1``."""
    if seeds is None:
        return None
    seed, ids = seeds if isinstance(seeds, tuple) else (seeds, range(stop))
    return seed, ids[first:stop]


def run(device: torch.device | str) -> AbstractContextManager[None]:
    """For the length of a loop: one key from torch's generator instead of one a draw. Other sources stay as they
    are."""
    if isinstance(_in_force(), _Generator):
        return _as_source(_Streams(_new_key(torch.device(device)), None))
    return nullcontext()


def streams_in_force(device: torch.device) -> Any:
    """What a loop within :func:`run` or :func:`seeds` draws from, moved to the device: part of the loop's state. None
    under ``replay``, whose draws are not made but looked up."""
    source = _in_force()
    if not isinstance(source, _Streams):
        return None
    source.move(device)
    return source


def normal(like: Tensor) -> Draw:
    """The next draw of standard normal noise for an array like ``like``, to be handed to the functions of
    ``scoresde_ext.ops``."""
    return _in_force().normal(like)


def normal_tensor(like: Tensor) -> Tensor:
    """The next draw of standard normal noise, as an array like ``like``."""
    return ops.materialize(normal(like), like)


def streams(like: Tensor) -> tuple[Tensor, Tensor]:
    """``key, ids`` of the next draw, int64 ``(2,)`` and ``(B,)``, for code that makes more of its streams than one
    array. ValueError under ``replay``, which has none; call it within :func:`run` or :func:`seeds`."""
    source = _in_force()
    if not isinstance(source, _Streams):
        raise ValueError("noise.replay: expected noise.seeds, for how much is drawn here depends on the samples.")
    key, ids = source._next(like)
    return key, torch.arange(like.shape[0], device=like.device) if ids is None else ids


def uniform(like: Tensor) -> Tensor:
    """The next draw, uniform on [0, 1), of the shape, device and dtype of ``like``."""
    return _in_force().uniform(like)


def times_and_normal(batch: Tensor) -> tuple[Tensor, Draw]:
    """The two draws of a training step: uniform on [0, 1), one a sample, ``(B,)`` in the batch's compute dtype; and
    normal noise. One key of torch's generator serves both."""
    dtype = ops.compute_dtype(batch)
    if not isinstance(_in_force(), _Generator):
        return uniform(batch.new_empty(batch.shape[0], dtype=dtype)), normal(batch)
    key = _new_key(batch.device)
    u = ops.noise_uniform(key, None, 0, (batch.shape[0],))
    return u if u.dtype == dtype else u.to(dtype), Draw(key=key, draw=1)


def integers(high: int, like: Tensor) -> Tensor:
    """The next draw, uniform on {0, ..., high - 1}: int64, of the shape and on the device of ``like``."""
    return _in_force().integers(high, like)


class _TorchDraws(TorchFunctionMode):
    """Answers torch.randn and its like from the source in force."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if func in (torch.randn_like, torch.rand_like):
                like = torch.empty_like(*args, **kwargs)
                return normal_tensor(like) if func is torch.randn_like else uniform(like)
            if func in (torch.randn, torch.rand):
                like = torch.empty(*args, **{k: v for k, v in kwargs.items() if k != "generator"})
                return normal_tensor(like) if func is torch.randn else uniform(like)
            return func(*args, **kwargs)


def torch_draws() -> AbstractContextManager[Any]:
    """For code of the user's own that calls torch.randn, torch.rand or their ``_like`` forms: under ``replay`` and
    ``seeds`` they are answered from the source in force. Without these contexts nothing changes. A generator handed to
    torch.randn is not used then; integers and in-place draws stay torch's."""
    return nullcontext() if isinstance(_in_force(), _Generator) else _TorchDraws()


def prior(sde: Any, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """``sde.prior_sampling(shape)`` on ``device``, its normals from the source in force."""
    with torch_draws():
        return sde.prior_sampling(tuple(shape)).to(device)
