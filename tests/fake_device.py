"""A device that records work, without one: operations on the CPU are noted down as torch dispatches them, and repeated.

What would make a GPU's host wait, or be no part of a graph, is an error.
"""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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

    def __enter__(self) -> "NoWaiting":
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

    def __init__(self, missing: str = "") -> None:
        self.missing = missing
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
        def launch() -> None:
            self.loops += 1
            graph.replay()
            while flag.item():
                graph.replay()

        return launch

    def watch(self) -> "FakeWatch":
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
