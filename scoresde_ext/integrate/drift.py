"""Right-hand sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import ops
from .._C import host
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


class Function:
    """A plain ``f(t, y)``; ``t`` is handed over as a tensor ``(B,)``."""

    def __init__(self, f: Callable[..., Any], packed: bool) -> None:
        self.f, self.packed = f, packed

    def terms(self, t: Time, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        times = time_vector(t, ys[0])
        slopes = self.f(times, ys) if self.packed else (self.f(times, ys[0]),)
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


def time_vector(t: Time, like: Tensor) -> Tensor:
    """``t``, one number or one a sample, once for each sample: float64 where the state is, else float32."""
    if isinstance(t, Tensor):
        return t.to(ops.compute_dtype(like)).expand(like.shape[0])
    # One number, expanded: what is computed from it cannot depend on its place in the batch.
    if like.is_cpu and not traced():
        return host.filled(1, t, like.dtype == torch.float64).expand(like.shape[0])
    return torch.full((1,), t, dtype=ops.compute_dtype(like), device=like.device).expand(like.shape[0])
