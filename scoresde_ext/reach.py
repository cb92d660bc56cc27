"""The modules behind a network that is a function.

``lambda x, labels: net(x, labels, cond)`` is a network like ``net``: it is sampled in evaluation mode, in the dtype of
its parameters. So the modules are looked for where a callable keeps what it calls. Nothing of the user's is run: values
are read from closures, defaults, arguments of partials, attributes and globals, without properties.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Network = Callable[[Tensor, Tensor], Tensor]

DEPTH = 5  # a function in an attribute of an object that a closure holds has depth 3
MOST = 1000  # values looked at: enough for any wrapper, and a bound where one holds a data set

# TensorBase: isinstance(value, Tensor) is a call of Python's
_PLAIN = (torch._C.TensorBase, str, bytes, int, float, complex, bool, type(None), type, types.BuiltinFunctionType)
_CLOSED = (*_PLAIN, nn.Module)
_OF_OTHERS = frozenset({"torch", "numpy", "scoresde_ext", "builtins", "functools", "math"})


def modules_of(network: Any) -> tuple[nn.Module, ...]:
    """The modules that a network consists of: itself, or those that a callable reaches, each once, in the order in
    which they are found."""
    if isinstance(network, nn.Module):
        return (network,)
    if torch.compiler.is_compiling():  # it cannot follow: modules behind a function stay in the mode they are in
        return ()
    return tuple(value for value in reached(network) if isinstance(value, nn.Module))


_known: weakref.WeakKeyDictionary[Any, tuple[list[int], list[weakref.ref[nn.Module]]]] = weakref.WeakKeyDictionary()


def same_modules_of(network: Any) -> Sequence[nn.Module]:
    """:func:`modules_of`, found once for a function as long as it holds the same values: for every training step."""
    if isinstance(network, nn.Module) or torch.compiler.is_compiling():
        return modules_of(network)
    held = [id(value) for value in _held(network)]
    try:
        before, refs = _known.get(network, (None, []))
        modules = [module for ref in refs if (module := ref()) is not None]
        if held != before or len(modules) < len(refs):
            modules = list(modules_of(network))
            _known[network] = held, [weakref.ref(module) for module in modules]
    except TypeError:  # no weak reference to it, or no hash
        return modules_of(network)
    return modules


def reached(network: Any) -> list[Any]:
    """All values that a callable holds, directly or through others, the nearest first; at most :data:`MOST`. Modules
    are not opened."""
    found, seen, level = [], {id(network)}, [network]
    for _ in range(DEPTH):
        further = []
        for holder in level:
            for value in _held(holder):
                if id(value) not in seen:
                    seen.add(id(value))
                    found.append(value)
                    if not isinstance(value, _CLOSED):
                        further.append(value)
            if len(found) >= MOST:
                return found[:MOST]
        level = further
    return found


def _held(holder: Any) -> Iterable[Any]:
    """What one value holds."""
    kind = type(holder)
    if kind is types.FunctionType:
        return _held_by_function(holder)
    if kind is types.MethodType:
        return holder.__self__, holder.__func__
    if isinstance(holder, functools.partial):
        return holder.func, holder.args, holder.keywords, vars(holder)
    if isinstance(holder, dict):
        return itertools.islice(dict.values(holder), MOST)
    if isinstance(holder, (list, tuple, set, frozenset)):
        return itertools.islice(holder, MOST)
    return () if isinstance(holder, types.ModuleType) else _attributes(holder)


def _held_by_function(function: types.FunctionType) -> list[Any]:
    held = [] if function.__closure__ is None else [content(cell) for cell in function.__closure__]
    held += function.__defaults__ or ()
    if function.__kwdefaults__:
        held += function.__kwdefaults__.values()
    if function.__dict__:  # also what functools.wraps calls __wrapped__
        held += function.__dict__.values()
    names = global_names(function.__code__)
    own = function.__globals__
    if names and not _of_others(own.get("__name__")):
        for name, followed in names:
            value = own.get(name)
            if not isinstance(value, types.ModuleType):
                held.append(value)
            elif not _of_others(value.__name__):
                held += (vars(value)[attribute] for attribute in followed if attribute in vars(value))
    return held


def content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _of_others(module: Any) -> bool:
    """Whether a module is of a library that calls no network of the user's."""
    return isinstance(module, str) and module.partition(".")[0] in _OF_OTHERS


@functools.lru_cache(maxsize=1000)
def global_names(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The globals that a function reads, also in functions defined in it, and the names that may follow a dot."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    found = {name: tuple(n for n in code.co_names if n not in names) for name in sorted(names)}
    for c in inner:
        found |= dict(global_names(c))
    return tuple(found.items())


def _attributes(holder: Any) -> list[Any]:
    """Attributes of an object, and what its class calls."""
    call = next((vars(c)["__call__"] for c in type(holder).__mro__ if "__call__" in vars(c)), None)
    held = _held_by_function(call) if type(call) is types.FunctionType else []
    return held + [value for _, value in attributes(holder)]


def attributes(holder: Any) -> list[tuple[str, Any]]:
    """Names and values of the attributes that an object has itself, slots included."""
    cls, found = type(holder), []
    with contextlib.suppress(AttributeError):
        found += object.__getattribute__(holder, "__dict__").items()
    for c in cls.__mro__:
        for name, member in vars(c).items():
            if type(member) is types.MemberDescriptorType:
                try:
                    found.append((name, member.__get__(holder, cls)))
                except AttributeError:  # not set
                    continue
    return found
