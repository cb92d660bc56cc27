"""Checks of arguments that several modules share. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter, temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._C import host

Result = TypeVar("Result")


def recorded() -> bool:
    """Whether calls are recorded by torch.compile, torch.export or the like: then tensors have no values yet."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def transformed() -> bool:
    """Whether torch.func transforms calls (grad, vmap, ...) or forward-mode derivatives are taken: then calls have to
    be plain torch's, which has a rule for each transform."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether calls are recorded or transformed: then they have to be torch's own, on tensors whose memory is no one
    else's business."""
    return recorded() or transformed()


def derived(*arguments: Any) -> bool:
    """Whether derivatives with respect to any of the arguments are asked for: then no kernel without one will do, and
    no number that was read from a tensor. Under a transform the answer is always yes."""
    if torch.is_grad_enabled():
        for v in arguments:
            if isinstance(v, Tensor) and v.requires_grad:
                return True
    return transformed()


def of_values(f: Callable[[Tensor], Result], t: Tensor) -> Result:
    """``f(t)`` for what only looks at values, also of a tensor that torch.func wraps: ``f`` is given the tensor within,
    where no transform sees it. Within a tensor that vmap wraps are the values of all its calls."""
    if not _are_functorch_transforms_active():
        return f(t)
    wrapped = torch._C._functorch
    with temporarily_clear_interpreter_stack():
        while wrapped.is_functorch_wrapped_tensor(t):
            t = wrapped.get_unwrapped(t)
        return f(t)


def outlasting(t: Tensor) -> Tensor:
    """A tensor without derivatives as it can be kept when the transforms that it was computed in have ended, which wrap
    all that is computed."""
    if _are_functorch_transforms_active():
        for level in range(retrieve_current_functorch_interpreter().level(), 0, -1):
            t = torch._C._functorch._unwrap_for_grad(t, level)
    return t


def check_array(name: str, y: Any) -> None:
    """An array is a floating-point tensor (B, ...)."""
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() < 1:
        got = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{name}: expected a floating-point tensor of shape (B, ...), got {got}. "
            "Convert it, for example with .float()."
        )


def check_inputs(x: Tensor, t: Tensor, T: float) -> float | None:
    """States are floating point ``(B, *)``; times are one a sample, in [0, T]. The times' values are looked at on the
    CPU alone: elsewhere that would wait for the device. Returns the time where all samples are seen to have the same;
    None where it is differentiated or transformed, for a number has no derivative.

    Raises:
        ValueError: another shape, dtype or device, a value outside [0, T], or NaN.
    """
    check_array("x", x)
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.shape != x.shape[:1] or t.device != x.device:
        got = f"{t.dtype} {tuple(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)
        raise ValueError(
            f"t: expected one time a sample, a floating-point tensor of shape {tuple(x.shape[:1])} on {x.device}, "
            f"got {got}. "
            "For one time for all, use torch.full((B,), t)."
        )
    if not t.is_cpu or recorded() or t.numel() == 0:
        return None
    first, last = of_values(_extremes, t)
    if not (first >= 0 and last <= T * (1 + 1e-6)):
        raise ValueError(f"t: expected times in [0, T = {T}], got values from {first:g} to {last:g}.")
    return first if first == last and not derived(t) else None


def _extremes(t: Tensor) -> tuple[float, float]:
    if t.dim() != 1 or t.dtype not in (torch.float32, torch.float64):
        t = t.detach().flatten().double()
    return host.extremes(t)


def finite(*arrays: Tensor) -> bool:
    """Whether arrays have no NaN or Inf, in a pass without an array of its own: a finite sum has finite terms. (False
    also where the sum overflows.)"""
    return all(of_values(lambda v: math.isfinite(v.detach().sum()), a) for a in arrays)


def check_state(name: str, y: Any) -> None:
    """A state is a floating-point tensor (B, ...) without NaN or Inf, which are looked for where there are values."""
    check_array(name, y)
    if torch.compiler.is_compiling():
        return
    if y.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on {y.device}.")
    if not (finite(y) or of_values(lambda v: bool(v.isfinite().all()), y)):
        where = "." if transformed() else f" in {name_rows(bad_rows(y))}."  # vmap sees one sample of many
        raise ValueError(f"{name}: expected finite values, got NaN or Inf{where}")


def check_latent(z: Any, shape: tuple[int, ...], device: torch.device | str) -> None:
    """A latent code is a state of the sampler's shape, on its device."""
    check_state("z", z)
    if tuple(z.shape) != shape:
        raise ValueError(f"z: expected the sampler's shape {shape}, got {tuple(z.shape)}.")
    wanted = torch.device(device)
    if z.device.type != wanted.type or (wanted.index is not None and z.device.index != wanted.index):
        raise ValueError(f"z: expected a tensor on the sampler's device {wanted}, got {z.device}. Move it with .to().")


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A batch of samples: (B, *) with no negative size."""
    if len(shape) < 1 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape: expected the shape (B, ...) of the batch, got {tuple(shape)}.")
    return tuple(shape)


def check_eps(eps: float, T: float) -> None:
    """The smallest time lies in (0, T): the score has no limit at 0."""
    if not 0 < eps < T:
        raise ValueError(f"eps: expected a time in (0, T = {T}), got {eps}.")


def check_tolerances(rtol: float, atol: float, *ys: Tensor) -> None:
    """Tolerances have to be positive and finite (one of them may be zero), and above the rounding of the states."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a non-negative number, got {value!r}.")
    if rtol == 0 and atol == 0:
        raise ValueError("rtol, atol: expected at least one above zero, got 0 and 0.")
    largest = max((y.abs().max().item() for y in ys if y.numel()), default=0.0)
    if largest > 0 and rtol + atol / largest < (rounding := torch.finfo(ys[0].dtype).eps):
        raise ValueError(
            f"rtol, atol: expected more than the rounding of {ys[0].dtype}, {rounding:.1e} of the largest value "
            f"{largest:.3g}, got {rtol:g} and {atol:g}. Loosen them, or integrate in float64."
        )


def check_corrector(snr: float, n_steps: int) -> None:
    """Corrector steps are counted from 0 on; the signal-to-noise ratio is not negative."""
    if not isinstance(n_steps, int) or n_steps < 0:
        raise ValueError(f"n_steps: expected a number of corrector steps from 0 on, got {n_steps!r}.")
    if not 0 <= snr < math.inf:
        raise ValueError(f"snr: expected a non-negative signal-to-noise ratio, got {snr!r}.")


def bad_rows(*ys: Tensor) -> list[int]:
    """Samples with an element that is not finite."""
    bad = sum((~y.isfinite()).reshape(len(y), math.prod(y.shape[1:])).any(1) for y in ys)
    return torch.nonzero(torch.as_tensor(bad)).flatten().tolist()


def name_rows(rows: Sequence[Any]) -> str:
    """In words: "sample 3", "samples 0, 2, 5", "samples 0, 1, 2, 3, 4, ... (12 in all)"."""
    shown = ", ".join(str(r) for r in rows[:5])
    more = f", ... ({len(rows)} in all)" if len(rows) > 5 else ""
    return f"sample{'s' if len(rows) > 1 else ''} {shown}{more}"
