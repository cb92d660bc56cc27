"""Checks of arguments that several modules share. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
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


# ---- numbers ----


def as_whole(value: Any) -> int | None:
    """The int that ``value`` is: a number of Python's or numpy's, or an array or tensor without axes that holds one.
    None for anything else, bools included."""
    if type(value) is int:
        return value
    dtype = getattr(value, "dtype", None)
    if isinstance(value, (bool, np.bool_)) or dtype is torch.bool or getattr(value, "shape", ()) != ():
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without values
        return None


def as_real(value: Any) -> float | None:
    """The same for a float, NaN and infinities included. A whole number is one too; a text is not."""
    if type(value) is float or type(value) is int:
        return float(value)
    dtype = getattr(value, "dtype", None)
    if isinstance(value, (bool, np.bool_, str, bytes)) or getattr(value, "shape", ()) != ():
        return None
    if dtype == np.bool_ or (isinstance(dtype, torch.dtype) and (dtype is torch.bool or dtype.is_complex)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def whole(name: str, value: Any, least: int, most: int | None = None, expected: str = "a whole number") -> int:
    """``value`` as a Python int; ValueError where it is no whole number from ``least`` to ``most``."""
    found = as_whole(value)
    if found is None or found < least or (most is not None and found > most):
        span = f"from {least} on" if most is None else f"from {least} to {most}"
        number = as_real(value) if found is None else None
        remedy = " Convert it with int()." if number is not None and number.is_integer() else ""
        raise ValueError(f"{name}: expected {expected} {span}, got {value!r:.100}.{remedy}")
    return found


def real(
    name: str, value: Any, expected: str = "a finite number", inside: Callable[[float], bool] = math.isfinite
) -> float:
    """``value`` as a Python float; ValueError where it is no number or not ``inside`` (as NaN never is)."""
    found = as_real(value)
    if found is None or not inside(found):
        remedy = " Convert it with float()." if isinstance(value, (str, bytes)) else ""
        raise ValueError(f"{name}: expected {expected}, got {value!r:.100}.{remedy}")
    return found


def check_flags(**flags: Any) -> None:
    """Flags are True or False, or 1 or 0: another argument in their place would count as True."""
    for name, value in flags.items():
        if not (isinstance(value, (bool, np.bool_)) or as_whole(value) in (0, 1)):
            raise ValueError(f"{name}: expected True or False, got {value!r:.100}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """A word is one of the ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r:.100}.")


def check_times(
    name: str, times: Any, start: Any, end: Any, ends: tuple[str, str] = ("T", "eps"), within: bool = False
) -> list[float]:
    """Times as floats, each further on the way from ``start`` to ``end`` than the one before. The first and the last
    are the two ends, to the rounding of float32, and become exactly that; with ``within``, they need not be, and a time
    may be there twice.

    Args:
        ends: what start and end are called.
    """
    way = "fall" if end < start else "rise"
    expected = f"{name}: expected times that {way} from {ends[0]} = {start:.9g} to {ends[1]} = {end:.9g}"
    start, end = float(start), float(end)
    found: list[float] = []
    try:
        for i, given in enumerate(times.tolist() if isinstance(times, Tensor) else times):
            number = as_real(given)
            if number is None or not math.isfinite(number):
                raise ValueError(f"{expected}, got {given!r:.100} at {i}.")
            found.append(number)
    except TypeError:
        raise ValueError(f"{expected}, got {times!r:.100}.") from None
    if len(found) < 2 and not within:
        raise ValueError(f"{expected}, got {found}.")
    for i, exact, other in ((0, start, end), (-1, end, start)) if found else ():
        if math.isclose(found[i], exact, rel_tol=1e-6, abs_tol=0.0 if exact else 1e-7 * abs(other)):
            found[i] = exact
        elif not within or not min(start, end) <= found[i] <= max(start, end):
            raise ValueError(f"{expected}, got {found[i]!r} as the {'first' if i == 0 else 'last'}.")
    for i, (one, following) in enumerate(itertools.pairwise(found)):
        way_made = (following - one) * (end - start)
        if not (way_made > 0 or (within and way_made == 0)):
            raise ValueError(f"{expected}, got {one!r} at {i} and {following!r} after it.")
    return found


# ---- arrays ----


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


def check_latent(z: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """A latent code is a state of the sampler's shape, on its device."""
    check_state("z", z)
    if tuple(z.shape) != shape:
        raise ValueError(f"z: expected the sampler's shape {shape}, got {tuple(z.shape)}.")
    if z.device.type != device.type or (device.index is not None and z.device.index != device.index):
        raise ValueError(f"z: expected a tensor on the sampler's device {device}, got {z.device}. Move it with .to().")


# ---- what samplers and losses take ----


def check_shape(shape: Iterable[Any]) -> tuple[int, ...]:
    """A batch of samples: (B, *) with no negative size."""
    try:
        sizes = tuple(as_whole(n) for n in shape)
    except TypeError:  # nothing to iterate over
        sizes = ()
    if not sizes or any(n is None or n < 0 for n in sizes):
        got = tuple(shape) if sizes else shape
        raise ValueError(f"shape: expected the shape (B, ...) of the batch, whole numbers from 0 on, got {got!r:.100}.")
    return sizes  # type: ignore[return-value]


def check_device(device: Any) -> torch.device:
    """A device that torch can use here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device: expected a device of torch's, such as 'cpu', 'cuda' or 'cuda:1', got {device!r:.100}."
        ) from None
    if why := _fault_of_device(found):
        raise ValueError(
            f"device: expected one that can be used here, got {str(found)!r}, but {why}. Pass device='cpu', or one "
            "that is there."
        )
    return found


def _fault_of_device(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    if device.type == "meta":
        return "its tensors have no values"
    if device.type == "cuda":  # without starting CUDA: a process that is to fork must not
        n = torch.cuda.device_count()
        if n == 0:
            return f"torch {torch.__version__} finds no CUDA device"
        return "" if (device.index or 0) < n else f"the last one is cuda:{n - 1}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):
        return f"torch {torch.__version__} cannot use it"
    return ""


def as_it_is(x: Any) -> Any:
    return x


def check_scaler(inverse_scaler: Any) -> Callable[[Any], Any]:
    """A function of samples; None leaves them as they are."""
    if inverse_scaler is None:
        return as_it_is
    if not callable(inverse_scaler):
        raise ValueError(
            f"inverse_scaler: expected a function of the samples, or None to leave them as they are, got "
            f"{inverse_scaler!r:.100}."
        )
    return inverse_scaler


def check_eps(eps: Any, T: float) -> float:
    """The smallest time lies in (0, T): the score has no limit at 0."""
    return real("eps", eps, f"a time in (0, T = {T})", lambda t: 0 < t < T)


def check_step(t: Any, earlier: Any, T: float) -> tuple[float, float]:
    """A step goes from a time in (0, T] to an earlier one."""
    t = real("t", t, f"a time in (0, T = {T}]", lambda v: 0 < v <= T * (1 + 1e-6))
    return t, real("earlier", earlier, f"a time in [0, t = {t})", lambda v: 0 <= v < t)


def check_tolerances(rtol: Any, atol: Any, *ys: Tensor) -> tuple[float, float]:
    """Tolerances have to be positive and finite (one of them may be zero), and above the rounding of the states."""
    rtol, atol = (
        real(name, value, "a non-negative number", lambda v: 0 <= v < math.inf)
        for name, value in (("rtol", rtol), ("atol", atol))
    )
    if rtol == 0 and atol == 0:
        raise ValueError("rtol, atol: expected at least one above zero, got 0 and 0.")
    largest = max((y.abs().max().item() for y in ys if y.numel()), default=0.0)
    if largest > 0 and rtol + atol / largest < (rounding := torch.finfo(ys[0].dtype).eps):
        raise ValueError(
            f"rtol, atol: expected more than the rounding of {ys[0].dtype}, {rounding:.1e} of the largest value "
            f"{largest:.3g}, got {rtol:g} and {atol:g}. Loosen them, or integrate in float64."
        )
    return rtol, atol


def check_corrector(snr: Any, n_steps: Any) -> tuple[float, int]:
    """Corrector steps are counted from 0 on; the signal-to-noise ratio is not negative."""
    n_steps = whole("n_steps", n_steps, 0, expected="a number of corrector steps")
    return real("snr", snr, "a non-negative signal-to-noise ratio", lambda v: 0 <= v < math.inf), n_steps


# ---- names of samples ----


def bad_rows(*ys: Tensor) -> list[int]:
    """Samples with an element that is not finite."""
    bad = sum((~y.isfinite()).reshape(len(y), math.prod(y.shape[1:])).any(1) for y in ys)
    return torch.nonzero(torch.as_tensor(bad)).flatten().tolist()


def name_rows(rows: Sequence[Any]) -> str:
    """In words: "sample 3", "samples 0, 2, 5", "samples 0, 1, 2, 3, 4, ... (12 in all)"."""
    shown = ", ".join(str(r) for r in rows[:5])
    more = f", ... ({len(rows)} in all)" if len(rows) > 5 else ""
    return f"sample{'s' if len(rows) > 1 else ''} {shown}{more}"
