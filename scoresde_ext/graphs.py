"""Loops that a device runs by itself.

A sampling loop is an object with tensors for its state and a ``step`` that replaces them by functions of themselves,
without a value being looked at. On a GPU such a step is captured once, as a CUDA graph, and then run without Python:

* ``while``: by a WHILE node, until the step itself clears the flag ``going`` (CUDA 12.4 and later);
* ``replay``: launched from here, again and again; the flag is read a step late, from pinned memory, so that the GPU
  always has work;
* ``off``: called from here, step after step, with the flag read in the same way.

All three run the same kernels on the same numbers: results are the same bits. On the CPU a loop is called.

What is CUDA's own is in :class:`Cuda`; the rest is told apart from it so that it can be tested without a GPU.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import _C
from .reach import identity, modules_of

MODES = ("auto", "while", "replay", "off")


class Choice(NamedTuple):
    """How a loop was run, ``while``, ``replay`` or ``off``, and why so."""

    mode: str
    why: str


ON_CPU = Choice("off", "the state is on the CPU")


class Loop(Protocol):
    """What can be run here.

    ``STATE`` names its state: tensors, and sequences and named groups of tensors. ``step`` puts others in their place,
    of the same shapes and dtypes, or writes into them. ``going``, int32 ``(1,)``, is part of the state where the number
    of steps is not known before; a step does nothing where it is 0.
    """

    STATE: tuple[str, ...]
    going: Tensor

    def step(self) -> None: ...


# ---- devices ----


class Graph(Protocol):
    def replay(self) -> None: ...


class Watch(Protocol):
    """Reads flags late: every ``ask`` is answered in its turn, with what the flag was when the device came to it."""

    @property
    def pending(self) -> int: ...

    def ask(self, flag: Tensor) -> None: ...

    def answer(self) -> bool: ...


class Backend(Protocol):
    """What is asked of a device that can record work."""

    def loops_missing(self) -> str:
        """Why it has no WHILE node; empty where it has."""

    def random_state(self) -> Tensor: ...

    def set_random_state(self, state: Tensor) -> None: ...

    def rehearse(self, work: Callable[[], None], guarded: bool) -> None:
        """Does the work apart from all other; ``guarded``: an error where it waits for the device."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records the work, without doing it."""

    def repeat(self, graph: Graph, flag: Tensor) -> Callable[[], None]:
        """A function that starts a loop on the device: the graph, as long as the flag is not 0 after it."""

    def watch(self) -> Watch: ...


class Cuda:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def loops_missing(self) -> str:
        if not hasattr(_C, "loops_missing"):
            return "this build of scoresde_ext has no CUDA"
        return _C.loops_missing()

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)  # kept on the host: nothing is waited for

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)

    def rehearse(self, work: Callable[[], None], guarded: bool) -> None:
        current, stream = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        stream.wait_stream(current)
        before = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            torch.cuda.set_sync_debug_mode("error" if guarded else before)
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(stream)

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):
            work()
        graph.instantiate()
        return graph

    def repeat(self, graph: Any, flag: Tensor) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            loop = _C.DeviceLoop(graph.raw_cuda_graph(), flag.data_ptr())

        def launch() -> None:
            with torch.cuda.device(self.device):
                loop.launch(torch.cuda.current_stream().cuda_stream)

        return launch

    def watch(self) -> Watch:
        return PinnedWatch(self.device)


class PinnedWatch:
    """Copies of flags in pinned memory, an event behind each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free = [(torch.empty(1, dtype=torch.int32, pin_memory=True), torch.cuda.Event()) for _ in range(3)]
        self.asked: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @property
    def pending(self) -> int:
        return len(self.asked)

    def ask(self, flag: Tensor) -> None:
        copy, event = self.free.pop()
        copy.copy_(flag, non_blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        self.asked.append((copy, event))

    def answer(self) -> bool:
        copy, event = self.asked.popleft()
        event.synchronize()
        self.free.append((copy, event))
        return bool(copy.item())


def backend_of(device: torch.device) -> Backend | None:
    """None for a device whose loops are called."""
    return Cuda(device) if device.type == "cuda" else None


# ---- state ----


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a piece of state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif value is not None:
        yield from tensors(list(vars(value).values()))


def state_of(loop: Loop) -> list[Tensor]:
    return [t for name in loop.STATE for t in tensors(getattr(loop, name))]


def set_state(loop: Loop, state: Sequence[Tensor]) -> None:
    """Puts these tensors where :func:`state_of` finds them."""
    left = iter(state)

    def filled(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(left)
        if isinstance(value, (tuple, list)):
            return type(value)([filled(part) for part in value])
        if value is not None:
            for name, part in vars(value).items():
                setattr(value, name, filled(part))
        return value

    for name in loop.STATE:
        setattr(loop, name, filled(getattr(loop, name)))


# ---- capture ----


class Uncapturable(Exception):
    """Why a step cannot be captured."""


class Captured:
    """A step as a graph, with the memory it works on."""

    def __init__(self, loop: Loop, backend: Backend) -> None:
        self.loop, self.backend = loop, backend
        self.memory = [t.clone() for t in state_of(loop)]
        try:
            with _no_autocast_cache():
                self._rehearse()
                self.graph = self._capture()
        finally:
            set_state(loop, self.memory)
        self.flag: Tensor | None = getattr(loop, "going", None)
        self.held = dict(vars(loop))  # what the step read besides its state stays where it is
        self.launch_loop: Callable[[], None] | None = None

    def _step_in_place(self) -> None:
        set_state(self.loop, self.memory)
        self.loop.step()
        memory, results = {id(t) for t in self.memory}, state_of(self.loop)
        # What another part of the state becomes must not have been written to when it is copied.
        results = [
            r.clone() if id(r) in memory and r is not m else r for r, m in zip(results, self.memory, strict=True)
        ]
        for result, place in zip(results, self.memory, strict=True):
            if result is not place:
                place.copy_(result)

    def _rehearse(self) -> None:
        """Twice, from the state as it is: first what a network does once (it may choose algorithms, and wait), then
        what it does each time."""
        start, random = [t.clone() for t in self.memory], self.backend.random_state()
        for guarded in (False, True):
            try:
                self.backend.rehearse(self._step_in_place, guarded)
            except Exception as error:
                why = "it waits for the device" if guarded else "it raised an exception"
                raise Uncapturable(f"{why} ({_first_line(error)})") from error
            finally:
                self.load(start)
                drawn = not torch.equal(self.backend.random_state(), random)
                self.backend.set_random_state(random)
            if drawn:
                raise Uncapturable("it draws random numbers from torch's generator, which a graph would repeat")

    def _capture(self) -> Graph:
        try:
            return self.backend.capture(self._step_in_place)
        except Exception as error:
            raise Uncapturable(f"its capture failed ({_first_line(error)})") from error

    def load(self, state: Sequence[Tensor]) -> None:
        for place, value in zip(self.memory, state, strict=True):
            if value is not place:
                place.copy_(value)

    def unload(self, loop: Loop) -> None:
        """The state as it is now becomes that of ``loop``."""
        set_state(loop, [t.clone() for t in self.memory])


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Weights that autocast has cast are kept until its context ends: a graph would read them after that."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _first_line(error: BaseException) -> str:
    error = error.__cause__ or error  # what the network raised
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class Cache:
    """The loops that one sampler captured, the latest few. They are released with it, and their memory with them."""

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self.kept: OrderedDict[Hashable, Captured] = OrderedDict()
        self.refused: dict[Hashable, Uncapturable] = {}

    def __reduce__(self) -> tuple[type[Cache], tuple[int]]:
        """A copy, or what a file holds, is empty: a captured loop belongs to the memory of one process."""
        return Cache, (self.most,)

    def find(self, key: Hashable, make: Callable[[], Captured]) -> Captured:
        """What is kept for the key, made where there is nothing; what cannot be captured is not tried again."""
        if key in self.refused:
            raise self.refused[key]
        if key not in self.kept:
            try:
                self.kept[key] = make()
            except Uncapturable as error:
                self.refused[key] = error
                raise
        self.kept.move_to_end(key)
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return self.kept[key]


def fingerprint(network: Any) -> Hashable | None:
    """What a captured network consists of, so far as a run may find it changed: the memory of its parameters and
    buffers, the modes, hooks and plain attributes of its modules, and torch's settings; of a function, also its code
    and what it holds. None for a function without modules, or one that holds what cannot be compared: it may depend on
    anything."""
    function = None
    if not isinstance(network, nn.Module) and (function := identity(network)) is None:
        return None
    modules = [m for module in modules_of(network) for m in module.modules()]
    devices = {p.device.type for m in modules for p in m.parameters(recurse=False)}
    settings = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices) if d != "meta"]
    return (
        function,
        *((id(m), *_plain(vars(m)), *((t.data_ptr(), t.dtype) for t in _memory(m))) for m in modules),
        *settings,
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )


def _memory(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _plain(attributes: dict[str, Any]) -> Iterator[Hashable]:
    for name, value in attributes.items():
        if isinstance(value, (bool, int, float, str, type(None))):
            yield name, value
        elif isinstance(value, (tuple, list)):
            yield name, *_plain(dict(enumerate(value)))  # type: ignore[arg-type]
        elif "hooks" in name:
            yield name, len(value)


# ---- running ----


def check(graph: Any, device: torch.device | str) -> None:
    """ValueError for a ``graph`` that is none of :data:`MODES`, or that the device cannot have."""
    if graph not in MODES:
        raise ValueError(f"graph: expected one of {', '.join(MODES)}, got {graph!r}.")
    if graph in ("while", "replay") and backend_of(torch.device(device)) is None:
        raise ValueError(f"graph: {graph!r} expects a CUDA device, got {device}. Leave it at 'auto'.")


class Plan:
    """How the loops of a sampler are to be run.

    Args:
        asked: one of :data:`MODES`.
        cache: where captured loops are kept; None: they are not, and are made only where asked for by name.
        key: what the loops depend on, beside the shapes of their state; None: no one knows.
    """

    def __init__(self, asked: str = "auto", cache: Cache | None = None, key: Hashable | None = None) -> None:
        self.asked, self.cache, self.key = asked, cache, key
        self.choice = Choice("off", "asked for") if asked == "off" else ON_CPU

    def run(self, loop: Loop, device: torch.device, kind: Hashable, steps: Iterable[Any] | None = None) -> None:
        """Steps until ``going`` is 0, or one for each of ``steps`` where their number is known before. ``kind``: what
        one sampler's loops differ in, beside shapes."""
        backend = backend_of(device)
        if backend is None:
            _until_done_here(loop) if steps is None else _as_often(loop.step, steps)
            return
        self.choice = self._choose(backend, steps is not None)
        captured = None if self.choice.mode == "off" else self._captured(loop, backend, kind)
        if captured is None:
            launch: Callable[[], None] = loop.step
        else:
            captured.load(state_of(loop))
            launch = self._launcher(captured)
        if steps is not None:
            _as_often(launch, steps)
        else:
            flag = (lambda: loop.going) if captured is None else (lambda: captured.flag)
            _until_done(launch, backend.watch(), flag, ahead=self.choice.mode != "while")
        if captured is not None:
            captured.unload(loop)

    def _choose(self, backend: Backend, known_length: bool) -> Choice:
        if self.asked == "off":
            return Choice("off", "asked for")
        if self.asked == "auto" and (self.cache is None or self.key is None):
            return Choice(
                "off",
                "a captured loop pays where it is used again: for a torch.nn.Module or a function around one, by a "
                "sampler. graph='while' captures one all the same",
            )
        if known_length:
            return Choice("replay", "the number of steps is known: nothing has to be asked")
        missing = backend.loops_missing()
        if missing:
            if self.asked == "while":
                warnings.warn(f"graph: 'while' is replaced by 'replay', for {missing}.", stacklevel=2)
            return Choice("replay", missing)
        if self.asked == "replay":
            return Choice("replay", "asked for")
        return Choice("while", "asked for" if self.asked == "while" else "the device runs loops by itself")

    def _captured(self, loop: Loop, backend: Backend, kind: Hashable) -> Captured | None:
        cache = self.cache if self.cache is not None and self.key is not None else Cache()
        key = (kind, self.key, tuple((t.shape, t.dtype, t.device) for t in state_of(loop)))
        known = key in cache.refused
        try:
            return cache.find(key, lambda: Captured(loop, backend))
        except Uncapturable as error:
            self.choice = Choice("off", f"the network cannot be captured: {error}")
            if not known:
                warnings.warn(f"graph: the loop runs step by step, for {self.choice.why}.", stacklevel=2)
            return None

    def _launcher(self, captured: Captured) -> Callable[[], None]:
        if self.choice.mode == "replay":
            return captured.graph.replay
        if captured.launch_loop is None:
            assert captured.flag is not None
            captured.launch_loop = captured.backend.repeat(captured.graph, captured.flag)
        return captured.launch_loop


def _as_often(step: Callable[[], None], steps: Iterable[Any]) -> None:
    for _ in steps:
        step()


def _until_done_here(loop: Loop) -> None:
    while bool(loop.going):
        loop.step()


LONG = 1e-3  # seconds


def _until_done(launch: Callable[[], None], watch: Watch, flag: Callable[[], Any], ahead: bool) -> None:
    """Launches until the flag is seen to be 0. ``ahead``: one step is launched before the flag of the last is known, so
    that the device does not wait for us, as long as steps are short; in vain where that was the last."""
    while True:
        launch()
        watch.ask(flag())
        while watch.pending > int(ahead):
            since = time.perf_counter()
            if not watch.answer():
                return
            ahead = ahead and time.perf_counter() - since < LONG


def plan(
    asked: str, cache: Cache, network: Any, device: torch.device, process: Callable[[], Hashable] = lambda: None
) -> Plan:
    """The plan of a sampler for one call. ``process()``: what its loops depend on beside the network."""
    needs_key = asked != "off" and backend_of(device) is not None
    key = fingerprint(network) if needs_key else None
    return Plan(asked, cache, None if key is None else (key, process()))
