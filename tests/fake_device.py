"""A device that records work, without one: operations on the CPU are noted down as torch dispatches them, and repeated.

What would make a GPU's host wait, or be no part of a graph, is an error. :class:`FakeDevice` stands for a GPU as a
whole; :class:`FakeCuda` for ``torch.cuda`` below :class:`scoresde_ext.graphs.Cuda`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scoresde_ext import graphs

if TYPE_CHECKING:
    import pytest

aten = torch.ops.aten
WAITING_OPS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.repeat_interleave.Tensor, aten.is_nonzero.default, aten.item.default,
}  # fmt: skip
WAITING_CALLS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
}


class Waited(RuntimeError):
    """The host would have waited for the device."""


class _NoWaitingCalls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING_CALLS:
            raise Waited(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class _NoWaitingOps(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        if func in WAITING_OPS or any(isinstance(i, Tensor) and i.dtype == torch.bool for i in chosen):
            raise Waited(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class NoWaiting(ExitStack):
    """Within it, what would wait for a device raises :class:`Waited`."""

    def __enter__(self) -> NoWaiting:
        super().__enter__()
        self.enter_context(_NoWaitingOps())
        self.enter_context(_NoWaitingCalls())
        return self


class _Recording(TorchDispatchMode):
    """Notes operations down. When it ends, what was written to is as before, and what was made is NaN: nothing has been
    done yet."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for declared, value in zip(func._schema.arguments, args, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                self.keep(value)
        if "out" in kwargs:
            self.keep(kwargs["out"])
        result = func(*args, **kwargs)
        self.work.append((func, args, kwargs, result))
        return result

    def keep(self, t: Tensor) -> None:
        if t.data_ptr() not in self.before:
            self.before[t.data_ptr()] = (t, t.clone())

    def undo(self) -> None:
        for func, _, _, result in self.work:
            if all(r.alias_info is None for r in func._schema.returns):
                for t in tree_leaves(result):
                    if isinstance(t, Tensor) and t.is_floating_point():
                        t.fill_(torch.nan)
        for t, value in self.before.values():
            t.copy_(value)


class Graph:
    def __init__(self, work: list[tuple[Any, Any, Any, Any]]) -> None:
        self.work, self.replays = work, 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self.work:
                for place, value in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


class FakeDevice:
    """A :class:`scoresde_ext.graphs.Backend` on the CPU."""

    def __init__(self, missing: str = "", refuses: str = "") -> None:
        self.missing, self.refuses = missing, refuses
        self.asked = 0  # for a loop
        self.captures: list[Graph] = []
        self.loops = 0  # started
        self.capturing = False

    def loops_missing(self) -> str:
        return self.missing

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def rehearse(self, work: Callable[[], None], guarded: bool) -> None:
        with NoWaiting() if guarded else ExitStack():
            work()

    def capture(self, work: Callable[[], None]) -> Graph:
        recording, self.capturing = _Recording(), True
        try:
            with recording, _NoWaitingOps(), _NoWaitingCalls():
                work()
        finally:
            self.capturing = False
            recording.undo()
        self.captures.append(Graph(recording.work))
        return self.captures[-1]

    def repeat(self, graph: Graph, flag: Tensor) -> Callable[[], None]:
        self.asked += 1
        if self.refuses:
            raise RuntimeError(self.refuses)

        def launch() -> None:
            self.loops += 1
            graph.replay()
            while flag.item():
                graph.replay()

        return launch

    def watch(self) -> FakeWatch:
        return FakeWatch()


class FakeWatch:
    def __init__(self) -> None:
        self.asked: deque[bool] = deque()

    @property
    def pending(self) -> int:
        return len(self.asked)

    def ask(self, flag: Tensor) -> None:
        self.asked.append(bool(flag.item()))

    def answer(self) -> bool:
        return self.asked.popleft()


# ---- torch.cuda ----


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device, self.cuda_stream = device, id(self)

    def wait_stream(self, other: Stream) -> None:
        pass


class StreamContext:
    def __init__(self, cuda: FakeCuda, stream: Stream) -> None:
        self.cuda, self.stream = cuda, stream

    def __enter__(self) -> None:
        self.before, self.cuda.current = self.cuda.current, self.stream

    def __exit__(self, *_: object) -> None:
        self.cuda.current = self.before


class Workspace:
    """Memory that products on a stream work in, until it is freed."""

    def __init__(self, graph: Any) -> None:
        self.of_graph, self.freed = graph, False  # a graph's own goes with the graph alone

    def free(self) -> None:
        self.freed = self.of_graph is None or self.of_graph() is None


class FakeCuda:
    """The parts of ``torch.cuda`` that :class:`scoresde_ext.graphs.Cuda` uses. ``torch.cuda.graph`` is torch's own.

    As torch documents them, or as it does in fact: the end of a capture that failed raises, leaves its stream current,
    and leaves the generator as in a capture; products keep a workspace for each stream, which ``frees`` is False in
    torch 2.11 never goes, and later goes with any graph that was captured on the stream.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, frees: bool = True, keeps_graphs: bool = True) -> None:
        self.frees, self.keeps_graphs = frees, keeps_graphs
        self.first = self.current = Stream()
        self.streams: set[Stream] = set()  # that work was done on
        self.workspaces: dict[Stream, Workspace] = {}
        self.capturing: Any = None
        self.modes: list[str] = []  # of captures
        self.generator_in_capture = False
        self.waiting_allowed: ExitStack | None = None
        self.refuses_loops = ""
        self.loops = 0
        for name, value in {
            "fake": self,  # a network finds it here, and does not hold it
            "Stream": Stream,
            "CUDAGraph": type("CUDAGraph", (FakeGraph,), {"cuda": self}),
            "current_stream": lambda device=None: self.current,
            "set_stream": self.set_stream,
            "stream": lambda stream: StreamContext(self, stream),
            "device": nullcontext,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "get_sync_debug_mode": lambda: "default",
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "get_rng_state": lambda device: torch.get_rng_state(),
            "set_rng_state": lambda state, device: torch.set_rng_state(state),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.clear_workspaces, raising=False)
        monkeypatch.setattr(graphs._C, "loops_missing", lambda: "", raising=False)
        monkeypatch.setattr(graphs._C, "DeviceLoop", lambda *of: FakeLoop(self, *of), raising=False)
        monkeypatch.setattr(graphs, "_KEEPS_GRAPHS", keeps_graphs)
        monkeypatch.setattr(graphs, "PinnedWatch", lambda device: FakeWatch())
        monkeypatch.setattr(graphs.Cuda, "_streams", {})
        monkeypatch.setattr(graphs, "backend_of", graphs.Cuda)

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    def set_sync_debug_mode(self, mode: str) -> None:
        if self.waiting_allowed is not None:
            self.waiting_allowed.close()
        self.waiting_allowed = NoWaiting().__enter__() if mode == "error" else None

    def product(self) -> None:
        """What a network does where cuBLAS computes."""
        self.streams.add(self.current)
        own = None if self.capturing is None else weakref.ref(self.capturing)
        workspace = self.workspaces.setdefault(self.current, Workspace(own))
        if self.capturing is not None:
            self.capturing.workspaces.add(workspace)

    def clear_workspaces(self) -> None:
        while self.workspaces:
            self.workspaces.popitem()[1].free()

    def draw(self) -> None:
        """What a random number on the GPU asks for, outside of captures."""
        if self.generator_in_capture:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def forbidden(self) -> None:
        """What a capture does not survive."""
        if self.capturing is not None:
            self.capturing.failed = True
            raise RuntimeError("operation not permitted when stream is capturing")


class FakeGraph:
    cuda: FakeCuda

    def __init__(self, **options: bool) -> None:
        if options and not self.cuda.keeps_graphs:
            raise TypeError("CUDAGraph() takes no arguments")
        self.keep_graph = options.get("keep_graph", False)
        self.workspaces: set[Workspace] = set()
        self.failed = self.instantiated = False

    def capture_begin(self, *_: Any, capture_error_mode: str = "global", **__: Any) -> None:
        self.cuda.modes.append(capture_error_mode)
        self.cuda.capturing, self.on = self, self.cuda.current
        self.cuda.generator_in_capture = True
        self.recording = _Recording()
        self.guards = ExitStack()
        for guard in (self.recording, _NoWaitingOps(), _NoWaitingCalls()):
            self.guards.enter_context(guard)

    def capture_end(self) -> None:
        assert self.cuda.current is self.on
        self.guards.close()
        self.recording.undo()
        self.cuda.capturing = None
        if self.failed:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.cuda.generator_in_capture = False
        self.instantiated = not self.keep_graph

    def instantiate(self) -> None:
        self.instantiated = True

    def replay(self) -> None:
        assert self.instantiated and self.cuda.capturing is None
        assert not any(workspace.freed for workspace in self.workspaces), "the graph works in memory that was freed"
        Graph(self.recording.work).replay()

    def raw_cuda_graph(self) -> Any:
        assert self.keep_graph
        return self

    def __del__(self) -> None:
        if self.cuda.frees and hasattr(self, "on") and (kept := self.cuda.workspaces.pop(self.on, None)) is not None:
            kept.free()


class FakeLoop:
    """In place of :class:`scoresde_ext._C.DeviceLoop`."""

    def __init__(self, cuda: FakeCuda, graph: FakeGraph, flag: int) -> None:
        if cuda.refuses_loops:
            raise RuntimeError(cuda.refuses_loops)
        self.cuda, self.graph, self.flag = cuda, graph, ctypes.c_int32.from_address(flag)

    def launch(self, stream: int) -> None:
        assert stream == self.cuda.current.cuda_stream
        self.cuda.loops += 1
        self.graph.replay()
        while self.flag.value:
            self.graph.replay()
