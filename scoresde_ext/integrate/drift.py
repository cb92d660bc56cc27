"""Right-hand sides."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._C import host
from ..callers import say_no_gradient
from ..checks import traced

Time = float | Tensor  # of the whole batch, a float or float64 (1,), or one a sample: float64 (B,)


class Terms(NamedTuple):
    """A derivative ``f y + q out``; ``f`` and ``q`` are numbers or ``(B,)``. ``f = 0, q = 1``: ``out`` is the
    derivative itself."""

    out: Tensor
    f: Tensor | float = 0.0
    q: Tensor | float = 1.0

    @property
    def factor(self) -> Tensor | float | None:
        """f, or None where it is the number 0: then y has no part in the derivative, whatever it holds."""
        return None if isinstance(self.f, float) and self.f == 0.0 else self.f

    @property
    def plain(self) -> bool:
        return isinstance(self.f, float) and isinstance(self.q, float) and self.f == 0.0 and self.q == 1.0


class Drift(Protocol):
    """A right-hand side that leaves its products to the kernels: for the state's parts ``ys`` the terms of each part's
    derivative at time ``t``, a float for all samples or, under per-sample control, a float64 tensor ``(B,)``.

    It may also have ``passing_terms``, of the same form, for the stages of a step whose slopes only other stages take:
    where the derivative of a part is nothing that others depend on, and is asked for in vain, it may then be anything
    finite."""

    def terms(self, t: Time, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]: ...


class Lent:
    """Calls a function of tensors that may write to them, ``x.relu_()``: those of the caller stay as they are.

    The first call gets copies. Where it writes to one, every call does, else none does: an evaluation copies nothing
    for a function that only reads. ``name`` is that of the argument whose function it is.
    """

    def __init__(self, name: str) -> None:
        self.name, self.called = name, False
        self.copied: Callable[[Tensor], Tensor] | None = None

    def __call__(self, function: Callable[..., Any], *args: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        if not self.called:
            return self._first(function, args)
        if self.copied is not None:
            return function(*map(self.copied, args))
        before = sum(map(_version, args))
        result = function(*args)
        if sum(map(_version, args)) != before:  # they only grow
            raise RuntimeError(
                f"{self.name}: expected inputs to be left as they are, as at the first evaluation, got one that was "
                "changed in place. Change a copy, x.clone()."
            )
        return result

    def _first(self, function: Callable[..., Any], args: tuple[Tensor, ...]) -> Any:
        copies = tuple(map(_copy, args))
        try:
            result = function(*copies)
        except RuntimeError as error:
            if not any(_guarded(v) for v in args) or not any(why in str(error) for why in _REFUSALS):
                raise
            self.copied = _whole_copy
            result = function(*map(_whole_copy, args))
        self.called = True
        # Tensors of inference mode do not count what is written to them.
        if self.copied is None and any(v.is_inference() or v._version for v in copies if not _guarded(v)):
            self.copied = _copy
        return result


_version = operator.attrgetter("_version")
_REFUSALS = ("single memory location", "leaf Variable")


def _guarded(v: Tensor) -> bool:
    """Whether torch itself refuses to write to a tensor: elements share their memory, or it is what a derivative is
    taken by."""
    if v.requires_grad and v.is_leaf and torch.is_grad_enabled():
        return True
    return any(step == 0 and size > 1 for step, size in zip(v.stride(), v.shape, strict=True))


def _copy(v: Tensor) -> Tensor:
    return v if _guarded(v) else v.clone()


def _whole_copy(v: Tensor) -> Tensor:
    return v.clone(memory_format=torch.contiguous_format)


class Function:
    """A plain ``f(t, y)``; ``t`` is handed over as a tensor ``(B,)``.

    ``finer``: as float64 whatever the state is. ``grads``: whether the caller records gradients: a warning at the first
    evaluation says where ``f`` wants some.
    """

    def __init__(self, f: Callable[..., Any], packed: bool, finer: bool = False, grads: bool = False) -> None:
        self.f, self.lent = (lambda t, *ys: f(t, ys)) if packed else f, Lent("f")
        self.packed, self.finer, self.grads = packed, finer, grads

    def terms(self, t: Time, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        times = time_vector(t, ys[0], torch.float64 if self.finer else None)
        slopes = self.first_slopes(times, ys) if self.grads else self.slopes(times, ys)
        if not isinstance(slopes, (tuple, list)) or len(slopes) != len(ys):
            raise ValueError(
                f"f: expected {len(ys)} derivatives, one for each part of y0, got {type(slopes).__name__}."
            )
        for slope, y in zip(slopes, ys, strict=True):
            if (
                not isinstance(slope, Tensor)
                or slope.shape != y.shape
                or slope.dtype != y.dtype
                or slope.device != y.device
            ):
                got = (
                    f"{slope.dtype} {tuple(slope.shape)} on {slope.device}"
                    if isinstance(slope, Tensor)
                    else type(slope).__name__
                )
                raise ValueError(
                    f"f: expected a derivative like y, {y.dtype} {tuple(y.shape)} on {y.device}, got {got}."
                )
        return tuple(Terms(slope) for slope in slopes)

    def slopes(self, t: Tensor, ys: tuple[Tensor, ...]) -> Any:
        slopes = self.lent(self.f, t, *ys)
        slopes = slopes if self.packed else (slopes,)
        if self.finer and isinstance(slopes, (tuple, list)):  # products with times are float64 too
            return [v.to(ys[0].dtype) if isinstance(v, Tensor) and v.dtype == torch.float64 else v for v in slopes]
        return slopes

    def first_slopes(self, t: Tensor, ys: tuple[Tensor, ...]) -> Any:
        self.grads = False
        with torch.enable_grad():
            slopes = self.slopes(t, ys)
            if not isinstance(slopes, (tuple, list)):
                return slopes
            say_no_gradient("f", *(v for v in slopes if isinstance(v, Tensor)))
        return [v.detach() if isinstance(v, Tensor) else v for v in slopes]


def time_vector(t: Time, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``t``, one number or one a sample, once for each sample: float64 where the state is, else float32."""
    dtype = ops.compute_dtype(like) if dtype is None else dtype
    if isinstance(t, Tensor):
        return t.to(dtype).expand(like.shape[0])
    # One number, expanded: what is computed from it cannot depend on its place in the batch.
    if like.is_cpu and not traced():
        return host.filled(1, t, dtype == torch.float64).expand(like.shape[0])
    return torch.full((1,), t, dtype=dtype, device=like.device).expand(like.shape[0])


def needs_double(start: float, end: float) -> bool:
    """Whether float32 has too few numbers between two times: fewer than 2^18. Stages then have the same time, or one
    that is off by more than the tolerances allow."""
    return bool(np.spacing(np.float32(max(abs(start), abs(end)))) > 2.0**-18 * abs(end - start))
