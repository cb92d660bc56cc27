"""What a network consists of, as a key: whether it is still what it was when a step of it was captured.

A captured step repeats what the network did then: with the memory of its tensors as it is now, and with every number,
choice and object of Python's as it was. So the key has the memory of all tensors that the network reaches, and the
values of all the rest: attributes of modules and of other objects, containers, hooks, closures, defaults, and the
globals and class attributes that its code names. Keys are equal where all of this is.

Nothing of the user's is run. What installed packages keep in globals and in classes is taken to stay as it is; so are
loggers, locks and what :data:`_INERT` names besides.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import gc
import importlib.util
import os
import sys
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .callers import WITHIN
from .reach import attributes, content, global_names

MOST = 200_000  # values looked at: ten times those of a large network
LARGE = 2**20  # bytes of a numpy array that are compared

Pairs = Iterable[tuple[Any, Any]]
Opener = Callable[["_Walk", Any, Any], None]


class NotComparable(Exception):
    """What of a network nobody can compare with what it was before."""


class Contents:
    """A key; it keeps the tensors alive. No object of the user's is asked for its hash. ``modules``: how many."""

    def __init__(self, parts: list[Any], tensors: list[Tensor], modules: int) -> None:
        self.parts, self.tensors, self.modules = parts, tensors, modules

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and self.parts == other.parts

    def __hash__(self) -> int:
        return len(self.parts)

    def difference(self, other: Contents) -> str:
        """The name of the first value that differs."""
        pairs = enumerate(zip(self.parts, other.parts, strict=False))
        first = next((i for i, (a, b) in pairs if a is not b and a != b), min(len(self.parts), len(other.parts)))
        return next((repr(part) for part in reversed(self.parts[:first]) if isinstance(part, str)), "something")


def contents(*roots: Any, device: torch.device | None = None, names: Iterable[str] = ()) -> Contents:
    """The key of all that ``roots`` reach. Tensors on ``device`` are read by a captured step; of others, it has the
    values. ``names``: the members of classes that are used, beside those that code names.

    Raises:
        NotComparable: they reach what nobody can compare, or more than :data:`MOST` values.
    """
    walk = _Walk(device, names)
    try:
        with torch._C.DisableTorchFunction():  # tensors of classes and modes of the user's
            walk.follow(enumerate(roots))
            walk.finish()
    except NotComparable:
        raise
    except Exception as error:  # a sampler does not fail for it
        raise NotComparable(f"it cannot be looked into ({type(error).__name__}: {error})") from error
    return Contents(walk.parts, walk.tensors, walk.modules)


# By value, and compared by C alone. Kinds of numbers are parts of a key: True == 1 == 1.0.
_VALUES = frozenset(
    {
        *(str, bytes, bool, int, type(None), type(...), type(NotImplemented), range, types.CodeType),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    }
)
_EMPTY = frozenset({dict, OrderedDict, list, tuple, set, frozenset, deque})
# Without a state of their own.
_CONSTANTS: tuple[type, ...] = (
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, np.dtype, np.ufunc, enum.Enum),
    *(type(threading.Lock()), type(threading.RLock())),
)
# Modules whose objects decide nothing about numbers, or follow from what is looked at elsewhere: compiled code.
_INERT = (
    *("logging.", "_abc.", "re.", "typing.", "pathlib.", "datetime.", "decimal.", "triton."),
    *("torch.cuda.", "torch.fx.", "torch._dynamo.", "torch._inductor.", "torch._functorch.", "torch._ops."),
    "torch._library.",
)
# What is called without its name in any code, but not by a network that runs.
_CONSTRUCTION = frozenset(
    {
        *("__init__", "__new__", "__init_subclass__", "__post_init__", "__del__", "__repr__", "__str__"),
        *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
    }
)
_BY_NAME = frozenset({"getattr", "__getattribute__", "attrgetter", "methodcaller"})
_ANYTHING = frozenset({"globals", "eval", "exec"})
_BEGIN = None  # of what one value holds, in a key
# Of every module: left out where empty.
_MOSTLY_EMPTY = frozenset(name for name, value in vars(nn.Module()).items() if type(value) in _EMPTY)
# What a class derived from a number or text adds to its value are attributes.
_BASES: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    *((int, int.__pos__), (float, float.__pos__), (complex, complex.__pos__)),
    *((str, str.__str__), ((bytes, bytearray), lambda value: bytes(memoryview(value)))),
)


class _Walk:
    """From the roots on, the nearest first. ``parts`` grows by name, type and value of whatever is met; for an object,
    its number, and what it consists of when its turn comes."""

    def __init__(self, device: torch.device | None, names: Iterable[str]) -> None:
        self.device = None if device is None else device.type
        self.parts: list[Any] = []
        self.tensors: list[Tensor] = []
        self.met: dict[int, int] = {}
        self.todo: list[tuple[Any, Any]] = []
        self.openers: dict[type, Opener] = {}
        self.modules = 0
        # Of a class, or a module of the user's, members that the code names; the others wait until it does.
        self.names = {"forward", *names}
        self.any_name = False
        self.waiting: dict[str, list[Any]] = {}
        self.offered: set[int] = set()

    def finish(self) -> None:
        openers = self.openers
        for name, value in self.todo:  # which grows
            if len(self.parts) > 3 * MOST:
                raise NotComparable(f"it reaches more than {MOST} values")
            kind = type(value)
            self.parts.append(name)
            (openers.get(kind) or self._opener(kind, name))(self, name, value)

    def follow(self, pairs: Pairs) -> None:
        parts, met, todo = self.parts, self.met, self.todo
        parts.append(_BEGIN)
        for name, value in pairs:
            kind = type(value)
            if kind in _VALUES:
                parts += name, kind, value
            elif kind in _EMPTY and not value:
                if name not in _MOSTLY_EMPTY:
                    parts += name, kind, None
            elif kind is nn.Parameter and not value.__dict__:
                self.tensors.append(value)
                parts += name, kind, self._memory(name, value)
            elif kind is float:
                parts += name, kind, value if value and value == value else repr(value)  # 0.0 == -0.0, nan != nan
            elif (kind is tuple or kind is list) and len(value) < MOST and _VALUES.issuperset(map(type, value)):
                parts += name, (kind, *map(type, value)), tuple(value)
            elif id(value) in met:
                parts += name, kind, met[id(value)]
            else:
                parts += name, kind, len(met)
                met[id(value)] = len(met)
                todo.append((name, value))

    def _opener(self, kind: type, name: Any) -> Opener:
        """What opens values of this type."""
        if kind is object or (f"{kind.__module__}.".startswith(_INERT) and not issubclass(kind, nn.Module)):
            return _Walk._constant
        opener = next((opener for kinds, opener in _OPENERS if issubclass(kind, kinds)), None)
        if opener is None:
            opener = _Walk._object
            if _hides_state(kind):
                if "__members__" not in vars(kind):  # which an enumeration of C++ has
                    what = f"{kind.__module__}.{kind.__qualname__}"
                    raise NotComparable(f"{name!r} is a {what}, which keeps its state to itself")
                opener = _Walk._constant
        self._offer_classes(kind)
        self.openers[kind] = opener
        return opener

    # ---- kinds of values ----

    def _constant(self, name: Any, value: Any) -> None:
        self.parts.append(value)

    def _number(self, name: Any, value: Any) -> None:
        plain = next(plain for base, plain in _BASES if isinstance(value, base))(value)
        self.parts.append(repr(plain) if isinstance(plain, (float, complex)) else plain)
        self._object(name, value)

    def _object(self, name: Any, value: Any) -> None:
        self.follow(attributes(value))

    def _module(self, name: Any, value: Any) -> None:
        self.modules += 1
        self.follow(value.__dict__.items())

    def _tensor(self, name: Any, value: Tensor) -> None:
        self.tensors.append(value)
        self.parts.append(self._memory(name, value))
        if value.__dict__:
            self.follow(value.__dict__.items())

    def _memory(self, name: Any, t: Tensor) -> Hashable:
        place = t.device
        try:
            memory: tuple[Any, ...] = (t.data_ptr(), t.dtype, t.shape, t.stride(), place)
        except RuntimeError:
            if not hasattr(type(t), "__tensor_flatten__"):  # its memory is that of tensors in its attributes
                raise NotComparable(f"{name!r} is a {type(t).__name__} without memory of its own") from None
            return None
        if type(t) is not nn.Parameter:
            memory += (t.is_conj(), t.is_neg())
        if place.type == self.device:
            return memory
        if not t.is_inference():
            memory += (t._version,)
        elif place.type != "cpu" or t.numel() * t.itemsize > LARGE:
            raise NotComparable(f"{name!r} is an inference tensor, which does not count what is written to it")
        if place.type == "cpu" and (t.numel() == 1 or t.is_inference()):
            memory += (repr(t.tolist()),)
        return memory

    def _array(self, name: Any, value: Any) -> None:
        if value.nbytes > LARGE or value.dtype.hasobject:
            raise NotComparable(f"{name!r} is a numpy array of objects, or of more than {LARGE} bytes")
        self.parts += value.shape, value.dtype, value.tobytes()

    def _mapping(self, name: Any, value: Mapping[Any, Any]) -> None:
        self._check_length(name, value)
        if {*map(type, value)} <= {str}:
            self.follow(value.items())
        else:
            self.follow(("key", key) for key in value)
            self.follow(("value", v) for v in value.values())
        if type(value) not in _EMPTY:
            self._object(name, value)

    def _sequence(self, name: Any, value: Collection[Any]) -> None:
        self._check_length(name, value)
        self.follow(enumerate(value))
        if type(value) not in _EMPTY:
            self._object(name, value)

    def _check_length(self, name: Any, value: Collection[Any]) -> None:
        if len(value) > MOST:
            raise NotComparable(f"{name!r} holds more than {MOST} values")

    def _class(self, name: Any, value: type) -> None:
        self.parts.append(value)
        self._offer_classes(value)

    def _python_module(self, name: Any, value: types.ModuleType) -> None:
        self.parts.append(value)
        if not _installed_module(value):
            self._offer(value)

    def _function(self, name: Any, value: types.FunctionType) -> None:
        code = value.__code__
        self.parts.append(code)
        self.follow(zip(code.co_freevars, map(content, value.__closure__ or ()), strict=True))
        self.follow(enumerate(value.__defaults__ or ()))
        self.follow((value.__kwdefaults__ or {}).items())
        self.follow(value.__dict__.items())
        if not _installed_file(code.co_filename):
            own, names = value.__globals__, [n for n, _ in global_names(code)]
            if anything := _ANYTHING.intersection(names):
                raise NotComparable(f"{code.co_name} calls {min(anything)}(), which reaches anything")
            self.follow((n, own[n]) for n in names if n in own)
            self.follow(_imports(code, own.get("__package__") or ""))
            self._mention(code)

    def _method(self, name: Any, value: types.MethodType) -> None:
        self.follow((("self", value.__self__), ("function", value.__func__)))

    def _builtin(self, name: Any, value: Any) -> None:
        owner = value.__self__
        bound = type(owner).__name__.startswith(("PyCapsule", "pybind11_"))  # functions of pybind11
        if bound or isinstance(owner, (types.ModuleType, type, type(None))):
            self.parts.append(value)
        else:
            self.follow((("self", owner), ("name", value.__name__)))

    def _descriptor(self, name: Any, value: Any) -> None:
        self.follow((n, getattr(value, n)) for n in ("fget", "__func__") if hasattr(value, n))

    def _partial(self, name: Any, value: Any) -> None:
        self.follow((("function", value.func), ("arguments", value.args), ("keywords", value.keywords)))
        self.follow(value.__dict__.items())

    def _remembering(self, name: Any, value: Any) -> None:
        """A function with :func:`functools.lru_cache`: what it remembers follows from the function, but the memory of
        the tensors is its own."""
        self.follow(value.__dict__.items())  # __wrapped__ is there
        held = [t for r in gc.get_referents(value) for t in (r if type(r) in (tuple, list) else (r,))]
        kept = [t for t in held if isinstance(t, Tensor)]
        self.tensors += kept
        self.parts.append(frozenset(self._memory(name, t) for t in kept))

    def _reference(self, name: Any, value: Any) -> None:
        self.follow((("referent", value()),))

    # ---- members of classes, and of modules of Python's ----

    def _offer_classes(self, kind: type) -> None:
        for cls in kind.__mro__:
            if not _installed_class(cls):
                self._offer(cls)

    def _offer(self, holder: Any) -> None:
        """What code names of it, and what Python calls without a name, is followed; the rest waits for a name."""
        if id(holder) in self.offered:
            return
        self.offered.add(id(holder))
        named = []
        for name, value in vars(holder).items():
            special = name.startswith("__")
            called = special and type(value) is types.FunctionType and name not in _CONSTRUCTION
            if name in self.names or called or (self.any_name and not special):
                named.append((name, value))
            else:
                self.waiting.setdefault(name, []).append(value)
        self.follow(named)

    def _mention(self, code: types.CodeType) -> None:
        new = _mentions(code) - self.names
        self.names |= new
        found = new & self.waiting.keys()
        if new & _BY_NAME:
            self.any_name = True
            found |= {name for name in self.waiting if not name.startswith("__")}
        for name in sorted(found):
            self.follow([(name, value) for value in self.waiting.pop(name)])


_OPENERS: tuple[tuple[type | tuple[type, ...], Opener], ...] = (
    (torch._C.TensorBase, _Walk._tensor),
    (types.FunctionType, _Walk._function),
    (types.MethodType, _Walk._method),
    ((types.BuiltinFunctionType, types.MethodWrapperType), _Walk._builtin),
    (functools.partial, _Walk._partial),
    (functools._lru_cache_wrapper, _Walk._remembering),
    ((property, staticmethod, classmethod), _Walk._descriptor),
    ((dict, types.MappingProxyType), _Walk._mapping),
    ((list, tuple, set, frozenset, deque), _Walk._sequence),
    ((np.ndarray, np.generic), _Walk._array),
    (type, _Walk._class),
    (types.ModuleType, _Walk._python_module),
    (weakref.ref, _Walk._reference),
    (slice, _Walk._object),
    (nn.Module, _Walk._module),
    (_CONSTANTS, _Walk._constant),
    ((int, float, complex, str, bytes, bytearray), _Walk._number),
)


def _hides_state(kind: type) -> bool:
    """Whether objects of a class keep something in C that no attribute shows. Slots of a class of Python's do not; a
    member of a class of C's may be an address."""
    for cls in kind.__mro__[:-1]:
        base, own = cls.__base__, vars(cls)
        shown = ("__dict__" in own) + ("__weakref__" in own)
        if "__slots__" in own:
            shown += sum(type(m) is types.MemberDescriptorType for m in own.values())
        if base is None or cls.__basicsize__ - base.__basicsize__ > 8 * shown:
            return True
    return False


# ---- whose code it is ----

_PLACES = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@functools.lru_cache(maxsize=10_000)
def _installed_file(file: str) -> bool:
    """Whether code is of an installed package, and not of the user's program."""
    return (
        file.startswith((*_PLACES, *WITHIN, "<frozen"))
        or f"{os.sep}site-packages{os.sep}" in file
        or f"{os.sep}dist-packages{os.sep}" in file
    )


def _installed_module(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if file is not None:
        return _installed_file(file)
    package = module.__name__.partition(".")[0]
    return package in sys.builtin_module_names or (package != module.__name__ and _installed_name(package))


def _installed_name(name: str) -> bool:
    return name in sys.modules and _installed_module(sys.modules[name])


def _installed_class(cls: type) -> bool:
    forward, module = vars(cls).get("forward"), vars(cls).get("__module__")
    if type(forward) is types.FunctionType and not _installed_file(forward.__code__.co_filename):
        return False  # also one that was generated, or put into a class of a package
    return not isinstance(module, str) or module == "builtins" or _installed_name(module)


@functools.lru_cache(maxsize=10_000)
def _mentions(code: types.CodeType) -> frozenset[str]:
    """All names of globals and attributes in code and in what is defined in it."""
    inner = [_mentions(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _imports(code: types.CodeType, package: str) -> list[tuple[str, Any]]:
    """The modules that code imports itself."""
    names = []
    for level, name in _import_names(code):
        with contextlib.suppress(ImportError):  # which the code raises itself
            names.append(importlib.util.resolve_name("." * level + name, package))
    return [(name, sys.modules[name]) for name in names if name in sys.modules]


@functools.lru_cache(maxsize=10_000)
def _import_names(code: types.CodeType) -> tuple[tuple[int, str], ...]:
    """Of imports in code: how many dots, and the name."""
    found: list[tuple[int, str]] = []
    before: list[Any] = [0, 0]
    for i in dis.get_instructions(code):
        if i.opname == "IMPORT_NAME":
            found.append((before[-2], i.argval))
        if i.opname != "EXTENDED_ARG":
            before.append(i.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found += _import_names(inner)
    return tuple(found)
