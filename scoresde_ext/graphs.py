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

import contextlib
import pickle
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _C, precision
from .callers import warn
from .contents import Contents, NotComparable, contents

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


# Where older versions of torch have no such graphs, there is none to put into a loop.
_KEEPS_GRAPHS = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph")


class Cuda:
    """A CUDA device."""

    # One rehearsal or capture at a time, all on one stream a device: what another thread launched there would become
    # part of the graph.
    _alone = threading.RLock()
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def loops_missing(self) -> str:
        if not hasattr(_C, "loops_missing"):
            return "this build of scoresde_ext has no CUDA"
        if not _KEEPS_GRAPHS:
            return f"torch {torch.__version__} does not give captured graphs out"
        return _C.loops_missing()

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)  # kept on the host: nothing is waited for

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)

    def rehearse(self, work: Callable[[], None], guarded: bool) -> None:
        with self._alone, torch.cuda.device(self.device):
            current, stream = torch.cuda.current_stream(), self._stream()
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
        with self._alone, torch.cuda.device(self.device):
            stream = self._stream()
            # After a failed capture, torch leaves the thread on the stream of the capture.
            with torch.cuda.stream(stream), _no_workspaces():
                try:
                    return _captured_on(stream, work)
                except Exception:
                    # torch's generator, too, takes the capture to go on, until one ends well.
                    with contextlib.suppress(RuntimeError):
                        _captured_on(stream, lambda: torch.zeros(1, device=self.device))
                    raise

    def _stream(self) -> torch.cuda.Stream:
        if self.device not in self._streams:
            self._streams[self.device] = torch.cuda.Stream(self.device)
        return self._streams[self.device]

    def repeat(self, graph: Any, flag: Tensor) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            loop = _C.DeviceLoop(graph.raw_cuda_graph(), flag.data_ptr())

        def launch() -> None:
            with torch.cuda.device(self.device):
                loop.launch(torch.cuda.current_stream().cuda_stream)

        return launch

    def watch(self) -> Watch:
        return PinnedWatch(self.device)


def _captured_on(stream: torch.cuda.Stream, work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True) if _KEEPS_GRAPHS else torch.cuda.CUDAGraph()
    raised: list[Exception] = []
    try:
        # Other threads may do what a capture must not, as the one that pins a DataLoader's memory does.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                work()
            except Exception as error:
                raised.append(error)
                raise
        if _KEEPS_GRAPHS:
            graph.instantiate()
        return graph
    except Exception as error:
        raised.append(error)  # of a capture that has failed, the end raises, too
    raise raised[0]


@contextmanager
def _no_workspaces() -> Iterator[None]:
    """cuBLAS works in memory that torch keeps for each stream: for good, or, in versions after 2.11, until any graph
    that was captured on the stream is gone. Without such memory when a capture begins, its products work in memory of
    the graph's own; without any when it has ended, nobody else works there. That is right in all versions."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear()
    try:
        yield
    finally:
        clear()


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


class Changes(Uncapturable):
    """What the step depends on is something else each time."""


def _as_bytes(state: Any) -> bytes:
    return pickle.dumps(state.numpy() if isinstance(state, Tensor) else state)


# How the state is asked for, and put back.
_HOST_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "Python": (random.getstate, random.setstate),
    "numpy": (np.random.get_state, np.random.set_state),
    "torch": (torch.get_rng_state, torch.set_rng_state),
}


class Captured:
    """A step as a graph, with the memory it works on. ``mark()``: what the step depends on, as a key."""

    def __init__(self, loop: Loop, backend: Backend, mark: Callable[[], Hashable] = lambda: None) -> None:
        self.backend = backend
        self.memory = [t.clone() for t in state_of(loop)]
        try:
            with _no_autocast_cache():
                self._rehearse(loop, False)
                self.key = mark()  # a network may keep something from its first evaluation on
                self._rehearse(loop, True)
                self.graph = self._capture(loop)
                _check_same(self.key, mark())
        except NotComparable as error:
            raise Uncapturable(str(error)) from error
        finally:
            set_state(loop, self.memory)
        self.flag: Tensor | None = getattr(loop, "going", None)
        # What the step read besides its state stays where it is. A plan would keep all that is captured.
        self.held = [value for value in vars(loop).values() if not isinstance(value, Plan)]
        self.loop_on_device: Callable[[], None] | None = None
        self.refusal = ""  # of the device, to make one

    def _step_in_place(self, loop: Loop) -> None:
        set_state(loop, self.memory)
        loop.step()
        memory, results = {id(t) for t in self.memory}, state_of(loop)
        # What another part of the state becomes must not have been written to when it is copied.
        results = [
            r.clone() if id(r) in memory and r is not m else r for r, m in zip(results, self.memory, strict=True)
        ]
        for result, place in zip(results, self.memory, strict=True):
            if result is not place:
                place.copy_(result)

    def _rehearse(self, loop: Loop, guarded: bool) -> None:
        """From the state as it is: first what a network does once (it may choose algorithms, and wait), then, guarded,
        what it does each time."""
        start = [t.clone() for t in self.memory]
        generators = _HOST_GENERATORS | {"the device": (self.backend.random_state, self.backend.set_random_state)}
        states = {name: state() for name, (state, _) in generators.items()}
        drawn = []
        try:
            self.backend.rehearse(lambda: self._step_in_place(loop), guarded)
        except Exception as error:
            why = "it waits for the device" if guarded else "it raised an exception"
            raise Uncapturable(f"{why} ({_first_line(error)})") from error
        finally:
            self.load(start)
            for name, (state, put_back) in generators.items():
                if _as_bytes(state()) != _as_bytes(states[name]):
                    drawn.append(name)
                    put_back(states[name])
        if drawn:
            raise Uncapturable(f"it draws random numbers from the generator of {drawn[0]}, which a graph would repeat")

    def _capture(self, loop: Loop) -> Graph:
        try:
            return self.backend.capture(lambda: self._step_in_place(loop))
        except Exception as error:
            raise Uncapturable(f"its capture failed ({_first_line(error)})") from error

    def loop_refused(self) -> str:
        """Why the device makes no loop of it; empty where it does. It is asked once."""
        if self.loop_on_device is None and not self.refusal:
            assert self.flag is not None
            try:
                self.loop_on_device = self.backend.repeat(self.graph, self.flag)
            except RuntimeError as error:
                self.refusal = f"CUDA makes no loop of the captured step ({_first_line(error)})"
        return self.refusal

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
        self.refused: OrderedDict[Hashable, str] = OrderedDict()  # why
        self.unused = 0  # captures since one was used again
        self.vain = ""  # why there would be more of them
        self.latest: Hashable = None  # the key of the latest call
        self.said: set[str] = set()

    def __reduce__(self) -> tuple[type[Cache], tuple[int]]:
        """A copy, or what a file holds, is empty: a captured loop belongs to the memory of one process."""
        return Cache, (self.most,)

    def find(self, key: Hashable) -> Captured | None:
        """What is kept for the key. Uncapturable where it is known that there can be none."""
        if key in self.refused:
            raise Uncapturable(self.refused[key])
        if key not in self.kept:
            return None
        self.unused = 0
        self.kept.move_to_end(key)
        return self.kept[key]

    def keep(self, key: Hashable, captured: Captured) -> None:
        self.unused, self.vain = self.unused + 1, IN_VAIN
        _keep_latest(self.kept, key, captured, self.most)

    def refuse(self, key: Hashable, why: Uncapturable) -> None:
        """What cannot be captured is not tried again."""
        if isinstance(why, Changes):  # its key would not be found
            self.unused, self.vain = self.most, f"at an earlier call, the network could not be captured: {why}"
            self.said.add(self.vain)
        _keep_latest(self.refused, key, str(why), self.most)

    def in_vain(self, key: Hashable, by_name: bool) -> bool:
        """Whether captures have not been used again, one after the other, and one for this key would not be: it comes
        for the first time. ``by_name``: a capture is asked for all the same."""
        new, self.latest = key != self.latest, key
        return new and self.unused >= self.most and not (by_name and self.vain == IN_VAIN)


def _keep_latest(kept: OrderedDict[Hashable, Any], key: Hashable, value: Any, most: int) -> None:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)


IN_VAIN = (
    "what was captured was not used again: the network, what it holds, or the shapes are others at each call. A "
    "captured loop reads new values that are written into the tensors that the network holds, as in "
    "net.condition.copy_(other)"
)


# ---- what a captured loop depends on ----


def fingerprint(network: Any, device: torch.device, sde: Any = None) -> tuple[Contents, Contents]:
    """What a captured step depends on besides its state, as a key: all that the network reaches, torch's settings, and
    the SDE, of whose tensors the values may have become numbers.

    Raises:
        NotComparable: where something of it cannot be compared, and for a network without a module.
    """
    names = {name for cls in type(sde).__mro__ for name in vars(cls) if not name.startswith("__")}
    of_network = contents(network, _settings(device), device=device)
    if not of_network.modules:
        raise NotComparable("it is no torch.nn.Module and no function around one")
    return of_network, contents(sde, names=names)


def _settings(device: torch.device) -> list[Any]:
    """What decides in torch how a network computes."""
    if mode := _get_current_dispatch_mode():
        raise NotComparable(f"a {type(mode).__name__} wants to see each operation, and sees none of a graph's")
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return [
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {device.type: 0, "cpu": 0}),
        (precision.of_matrix_products(), precision.of_convolutions(), torch.get_default_dtype()),
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        torch.is_inference_mode_enabled(),  # its tensors cannot be written to outside of it
        *_get_current_function_mode_stack(),
        *(hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_forward_")),
    ]


def _check_same(before: Any, after: Any) -> None:
    """An error for a network that changes what it consists of, other than by writing to tensors."""
    if before != after:
        changed = next(a.difference(b) for a, b in zip(before, after, strict=True) if a != b)
        raise Changes(f"it changes {changed} each time it is called, which a graph would not repeat")


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
        mark: ``mark()`` is what the loops depend on, beside the shapes of their state, as a key. It raises
            :class:`NotComparable` where nobody can tell.
    """

    def __init__(
        self, asked: str = "auto", cache: Cache | None = None, mark: Callable[[], Hashable] | None = None
    ) -> None:
        self.asked, self.cache = asked, cache
        self.choice = Choice("off", "asked for") if asked == "off" else ON_CPU
        self.key: Hashable = None
        self.unknown = "no sampler keeps it"  # why there is no key
        self.found: dict[Hashable, Captured | str] = {}  # at this call
        if cache is not None and mark is not None:
            try:
                self.key, self.mark, self.unknown = mark(), mark, ""
            except NotComparable as error:
                self.unknown = str(error)

    def run(self, loop: Loop, device: torch.device, kind: Hashable, steps: Iterable[Any] | None = None) -> None:
        """Steps until ``going`` is 0, or one for each of ``steps`` where their number is known before. ``kind``: what
        one sampler's loops differ in, beside shapes."""
        backend = backend_of(device)
        if backend is None:
            _until_done_here(loop) if steps is None else _as_often(loop.step, steps)
            return
        self.choice = self._choose(backend, steps is not None)
        captured = None if self.choice.mode == "off" else self._captured(loop, backend, kind)
        if captured is not None and self.choice.mode == "while" and (why := captured.loop_refused()):
            self._say(why, f"graph: 'while' is replaced by 'replay', for {why}.")
            self.choice = Choice("replay", why)
        if captured is None:
            launch: Callable[[], None] = loop.step
        else:
            captured.load(state_of(loop))
            launch = captured.graph.replay
            if self.choice.mode == "while" and captured.loop_on_device is not None:
                launch = captured.loop_on_device
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
        if self.asked == "auto" and self.unknown:
            return Choice(
                "off",
                "a captured loop pays where it is used again: by a sampler, for a torch.nn.Module or a function around "
                f"one that can be told to be what it was. Here, {self.unknown}. graph='while' captures it all the same",
            )
        if known_length:
            return Choice("replay", "the number of steps is known: nothing has to be asked")
        missing = backend.loops_missing()
        if missing:
            if self.asked == "while":
                self._say(missing, f"graph: 'while' is replaced by 'replay', for {missing}.")
            return Choice("replay", missing)
        if self.asked == "replay":
            return Choice("replay", "asked for")
        return Choice("while", "asked for" if self.asked == "while" else "the device runs loops by itself")

    def _captured(self, loop: Loop, backend: Backend, kind: Hashable) -> Captured | None:
        """The step as a graph: the same for all runs of a call."""
        part = kind, tuple((t.shape, t.dtype, t.device) for t in state_of(loop))
        if part not in self.found:
            self.found[part] = self._find(loop, backend, part)
        found = self.found[part]
        if isinstance(found, Captured):
            return found
        self.choice = Choice("off", found)
        self._say(found, f"graph: the loop runs step by step, for {found}.")
        return None

    def _find(self, loop: Loop, backend: Backend, part: Hashable) -> Captured | str:
        """It, or why there is none."""
        cache, key = self.cache, (part, self.key)
        try:
            if cache is None or self.unknown:
                return Captured(loop, backend)
            if captured := cache.find(key):
                return captured
            if cache.in_vain(key, by_name=self.asked != "auto"):
                return cache.vain
            captured = Captured(loop, backend, self.mark)
            cache.keep((part, captured.key), captured)
            return captured
        except Uncapturable as error:
            if cache is not None and not self.unknown:
                cache.refuse(key, error)
            return f"the network cannot be captured: {error}"

    def _say(self, why: str, message: str) -> None:
        """Once a sampler."""
        said = set() if self.cache is None else self.cache.said
        if why not in said:
            said.add(why)
            warn(message)


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


def plan(asked: str, cache: Cache, network: Any, device: torch.device, sde: Any) -> Plan:
    """The plan of a sampler for one call."""
    if asked == "off" or backend_of(device) is None:
        return Plan(asked)
    return Plan(asked, cache, lambda: fingerprint(network, device, sde))
