"""One Python function a kernel.

Everything the package does to a batch is a per-sample affine combination of state ``x``, network output ``out`` and
Gaussian noise ``z``, with one coefficient a sample. Conventions for all functions here:

* arrays have shape ``(B, *)`` with any number of further dimensions, also none; float32, float64, bfloat16 or float16;
  any strides. They are computed and accumulated in float32 (float64 for float64 arrays). Results have the dtype of the
  first array and its memory format;
* coefficients are numbers or tensors of shape ``(B,)`` or with one element;
* noise is a :class:`Draw`: an array, or a stream from which the kernel generates it;
* a wrong argument raises ``ValueError`` or ``TypeError`` before any work, naming the argument.

``scoresde_ext.reference`` has the same functions in plain torch and is what the kernels are tested against. It answers
where a kernel has no derivative: calls with coefficients or noise arrays that require gradients, calls that torch.func
transforms (grad, vmap, ...), and calls in forward mode.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _C, reference
from .checks import as_real, check_state, derived, traced, transformed
from .reference import PROCESSES, Draw

_traced, _calls = torch.ops.scoresde_ext, _C.calls  # the operators, twice: see _op
# Before torch 2.7 an export is not told apart from a compilation.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


# ---- what is refused ----

Op = TypeVar("Op", bound=Callable[..., Any])


def _refusing(op: Op) -> Op:
    """Names the argument that is not of its type, where a call fails: looking first would take as long as a kernel."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return op(*args, **kwargs)
        except Exception as error:
            _name_argument(op, args, kwargs, error)
            raise

    return typing.cast(Op, call)


def _name_argument(op: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> None:
    signature, hints = inspect.signature(op), typing.get_type_hints(op)
    first_word = re.match(r"\w+", str(error))
    if first_word and first_word[0] in (*signature.parameters, *Draw._fields):
        return  # it is named already
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # Python has said what is missing
    for name, value in arguments.items():
        if isinstance(value, Draw):
            _require_types(value._asdict(), typing.get_type_hints(Draw))
        _require_types({name: value}, hints)


def _require_types(values: dict[str, Any], hints: dict[str, Any]) -> None:
    for name, value in values.items():
        if not _is_a(hints[name], value):
            got = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise TypeError(f"{name}: expected {_in_words(hints[name])}, got {got}.") from None


def _is_a(hint: Any, value: Any) -> bool:
    """Whether a value is of a type. Real numbers of any kind are floats, whole ones that 64 bits hold are ints."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(h, value) for h in inner)
    if origin is Sequence:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return False
        return all(_is_a(inner[0], v) for v in value)
    if hint is Tensor:
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        return dense and not value.is_nested and not value.is_quantized
    try:
        if hint is int:
            return -(2**63) <= operator.index(value) < 2**63
        if hint is float:
            return not isinstance(value, (str, bytes)) and isinstance(float(value), float)
        return isinstance(value, hint)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _in_words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_in_words(h) for h in inner)
    if origin is Sequence:
        return f"a sequence, each entry {_in_words(inner[0])}"
    words = {Tensor: "a dense tensor", float: "a number", int: "a whole number of 64 bits", types.NoneType: "None"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


# ---- arguments ----


def compute_dtype(x: Tensor) -> torch.dtype:
    """What an array is computed in, and the dtype of its times and coefficients: float64 for float64, else float32."""
    try:
        return torch.float64 if x.dtype == torch.float64 else torch.float32
    except AttributeError:
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}.") from None


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _state(name: str, x: Any) -> None:
    """The first array of a call: all others are measured by it."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a float32, float64, bfloat16 or float16 tensor, got {got}.")
    if x.dim() < 1:
        raise ValueError(f"{name}: expected shape (B, ...), got a tensor without dimensions. Add a batch dimension.")


def _array(name: str, t: Any, x: Tensor) -> Tensor:
    """An array that goes with ``x``, in the dtype of ``x``: a network under autocast may answer in another."""
    if isinstance(t, Tensor) and t.is_cpu and x.is_cpu and t.dtype == x.dtype and not torch.is_grad_enabled():
        return t  # the operator itself refuses another shape, in less time
    return _whole(name, t, x)


def _whole(name: str, t: Any, x: Tensor) -> Tensor:
    """The same, looked at here: plain torch would broadcast."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected a floating-point tensor of shape {tuple(x.shape)}, got {got}.")
    if t.shape != x.shape or t.device != x.device:
        raise ValueError(
            f"{name}: expected the shape and device of the first array, {tuple(x.shape)} on {x.device}, "
            f"got {tuple(t.shape)} on {t.device}."
        )
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _number(name: str, v: Any, x: Tensor) -> Any:
    """A coefficient as a tensor of one element or ``(B,)``; or, as direct calls on the CPU take it, as a number."""
    if isinstance(v, (int, float)):
        return v if x.is_cpu and not traced() else torch.full((1,), float(v), dtype=compute_dtype(x), device=x.device)
    if not isinstance(v, Tensor) and (plain := as_real(v)) is not None:
        return _number(name, plain, x)
    if not isinstance(v, Tensor) or not v.is_floating_point():
        got = v.dtype if isinstance(v, Tensor) else type(v).__name__
        raise TypeError(f"{name}: expected a number or a floating-point tensor of one element or (B,), got {got}.")
    if v.dim() > 1 or (v.numel() != 1 and v.numel() != x.shape[0]) or v.device != x.device:
        raise ValueError(
            f"{name}: expected one number or one a sample, shape {tuple(x.shape[:1])} on {x.device}, "
            f"got shape {tuple(v.shape)} on {v.device}."
        )
    return v


@_refusing
def number(v: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient of several calls that go with ``x``, made once."""
    return _number("v", v, x)


def _matrix(c: Any, n_terms: int, x: Tensor) -> Tensor:
    """Coefficients of ``n_terms`` arrays as a tensor ``(M, n_terms)`` or ``(M, n_terms, B)``."""
    if not isinstance(c, Tensor):
        try:
            c = torch.tensor(c, dtype=compute_dtype(x))
            if x.is_cuda:
                # By kernels: a copy would wait for the device, and read our memory at every replay of a graph.
                values = [torch.full((1,), v, dtype=c.dtype, device=x.device) for v in c.flatten().tolist()]
                c = torch.cat(values).reshape(c.shape)
            c = c.to(x.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"coefficients: expected a tensor or a nested sequence of numbers, (M, {n_terms}), got {c!r:.80}."
            ) from None
    if not c.is_floating_point():
        raise TypeError(f"coefficients: expected a floating-point tensor, got {c.dtype}. Convert it with .to().")
    shape = c.shape
    if shape[1:] not in ((n_terms,), (n_terms, x.shape[0])) or not 1 <= shape[0] <= 4 or c.device != x.device:
        raise ValueError(
            f"coefficients: expected shape (M, {n_terms}) or (M, {n_terms}, {x.shape[0]}) on {x.device}, one column an "
            f"array and M from 1 to 4, got {tuple(shape)} on {c.device}."
        )
    return c


def _network(out: Any, q: Any, x: Tensor) -> tuple[Tensor | None, Any]:
    """The network's output and its coefficient: both or neither."""
    if (out is None) != (q is None):
        raise ValueError("out, q: expected both or neither.")
    return (None, None) if out is None else (_array("out", out, x), _number("q", q, x))


def _noise(draw: Any, x: Tensor, kept: bool = False) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    """``kept``: whether the draw may be one of :func:`perturb_keeping`."""
    if isinstance(draw, Draw):
        z, key, ids, number = draw
        if key is not None and (z is None or (kept and z.shape[1:] == x.shape[1:])):
            _streams(key, ids, x)
            return z, key, ids, number
        if z is not None and key is None:
            return _array("z", z, x), None, None, 0
    raise ValueError(
        f"draw: expected a Draw with either an array z or a key, or what perturb_keeping returned, got {draw!r:.100}."
    )


def _streams(key: Any, ids: Any, x: Tensor) -> None:
    """Of noise for an array like ``x``."""
    for name, t in (("key", key),) if ids is None else (("key", key), ("ids", ids)):
        if not isinstance(t, Tensor) or t.device != x.device or t.dtype != torch.int64:
            got = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name}: expected an int64 tensor on {x.device}, got {got}.")


_ARRAYS = ("out", "arrays", "ks", "x", "y1")  # of the calls below, besides the first


def _by_reference(op: str, first: Tensor, /, **arguments: Any) -> Any:
    """What plain torch answers to a call, in the compute dtype of its first array."""
    dtype = compute_dtype(first)

    def plain(name: str, v: Any) -> Any:
        if isinstance(v, list):
            return [plain(name, w) for w in v]
        if isinstance(v, Draw):
            z = _whole("z", v.z, first) if v.key is None else noise_normal(v.key, v.ids, v.draw, first.shape)
            return Draw(z.to(dtype))
        if not isinstance(v, Tensor):
            return v
        return (_whole(name, v, first) if name in _ARRAYS else v).to(dtype)

    return getattr(reference, op)(*(plain(name, v) for name, v in arguments.items()))


def _weights(name: str, weights: Sequence[float], n: int) -> Sequence[float]:
    if len(weights) != n:
        raise ValueError(f"{name}: expected {n} coefficients, one a slope, got {len(weights)}.")
    return weights


def _op(name: str, x: Tensor) -> Callable[..., Any]:
    """The op, or a readable error where this build has no kernel for the device of ``x``."""
    if not x.is_cpu:
        key = "CUDA" if x.is_cuda else x.device.type.upper()
        if key != "META" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"scoresde_ext::{name}", key):
            raise NotImplementedError(
                f"scoresde_ext.ops.{name} has no kernel for {x.device} in this build. Move the tensors to the CPU, "
                "or, for CUDA, rebuild where nvcc is found (`scoresde info` shows what was built)."
            )
    # torch.ops is what a traced program calls. It takes longer than the kernels of a small batch: its arguments become
    # boxed values, its results come out of them.
    return getattr(_traced if traced() else _calls, name)


# ---- affine ----


@_refusing
def affine(x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None = None) -> Tensor:
    """``p x + q out``: drifts and noise-free updates. Differentiable in ``x`` and ``out``, twice and more."""
    _state("x", x)
    ps, (outs, qs) = _number("p", p, x), _network(out, q, x)
    if derived(ps, qs):
        return _by_reference("affine", x, x=x, out=outs, p=ps, q=qs).to(x.dtype)
    return _op("affine", x)(x, outs, ps, qs)


@_refusing
def affine_noise(
    x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None, n: Tensor | float, draw: Draw
) -> tuple[Tensor, Tensor]:
    """``mean = p x + q out`` and ``next = mean + n z``: every predictor and corrector update. Returns both."""
    _state("x", x)
    ps, (outs, qs), ns, noise = _number("p", p, x), _network(out, q, x), _number("n", n, x), _noise(draw, x)
    if derived(ps, qs, ns):
        mean, after = _by_reference("affine_noise", x, x=x, out=outs, p=ps, q=qs, n=ns, draw=draw)
        return mean.to(x.dtype), after.to(x.dtype)
    return _op("affine_noise", x)(x, outs, ps, qs, ns, *noise)


@_refusing
def affine_next(
    x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None, n: Tensor | float, draw: Draw
) -> Tensor:
    """``p x + q out + n z``: what :func:`affine_noise` returns second, where nobody wants the mean. Derivatives are by
    way of it."""
    _state("x", x)
    ps, (outs, qs), ns, noise = _number("p", p, x), _network(out, q, x), _number("n", n, x), _noise(draw, x)
    if derived(x, outs, ps, qs, ns, noise[0]):
        return affine_noise(x, out, p, q, n, draw)[1]
    return _op("affine_next", x)(x, outs, ps, qs, ns, *noise)


@_refusing
def perturb(x0: Tensor, m: Tensor | float, s: Tensor | float, draw: Draw) -> Tensor:
    """``m x0 + s z``, a sample of the transition kernel N(m x_0, s^2) (Song et al. 2021, eq. 29)."""
    _state("x0", x0)
    ms, ss, noise = _number("m", m, x0), _number("s", s, x0), _noise(draw, x0)
    if derived(ms, ss):
        return _by_reference("perturb", x0, x0=x0, m=ms, s=ss, draw=draw).to(x0.dtype)
    return _op("perturb", x0)(x0, ms, ss, *noise)


@_refusing
def perturb_keeping(x0: Tensor, m: Tensor | float, s: Tensor | float, draw: Draw) -> tuple[Tensor, Draw]:
    """:func:`perturb`, and the draw as :func:`score_loss` takes it: on the CPU with the noise of the first 15 of
    16 samples. To keep it costs less than to generate it again, even in large arrays; with the rest, a step of the loss
    would need a third of plain torch's memory, and not less. That of a float32 batch that requires no gradient; others
    are perturbed as always and get their draw back.

    Raises:
        ValueError: NaN or Inf in ``x0``, looked for on the CPU alone.
    """
    _state("x0", x0)
    ms, ss, noise = _number("m", m, x0), _number("s", s, x0), _noise(draw, x0)
    keeps = x0.is_cpu and x0.dtype == torch.float32 and draw.key is not None and not _exporting()
    if not keeps or derived(x0, ms, ss):
        if x0.is_cpu:
            check_state("x0", x0)
        return perturb(x0, m, s, draw), draw
    x, z = _op("perturb_keeping", x0)(x0, ms, ss, *noise[1:], x0.shape[0] * 15 // 16)
    return x, draw._replace(z=z)


# ---- loss ----


@_refusing
def score_loss(
    out: Tensor,
    c: Tensor | float | None,
    d: Tensor | float | None,
    w: Tensor | float,
    draw: Draw | None = None,
    total: bool = False,
) -> Tensor:
    """``w sum r^2`` over each sample with ``r = c out + d z``, shape ``(B,)``: the denoising score-matching loss (Song
    et al. 2021, eq. 7); with ``total``, the sum over all samples, shape ``()``.

    Where ``out`` requires a gradient, ``2 w c r`` is computed in the same pass and kept (``2 c r`` in half precision,
    where the weight would underflow before a loss scale could save it). With ``c=None`` the array
    ``out`` gives only the shape; with ``d=None`` there is no noise: sums of squares of either part, which Langevin
    steps need. The result is float32 (float64 for float64 arrays). First and second derivatives with respect to
    ``out``.
    """
    _state("out", out)
    if c is None and d is None:
        raise ValueError("c, d: expected at least one coefficient, got None for both.")
    if (d is None) != (draw is None):
        raise ValueError("d, draw: expected both or neither.")
    cs, ds = (None if v is None else _number(name, v, out) for name, v in (("c", c), ("d", d)))
    ws, noise = _number("w", w, out), (None, None, None, 0) if d is None else _noise(draw, out, kept=True)
    if derived(cs, ds, ws, noise[0]):
        loss = _by_reference("score_loss", out, out=out, c=cs, d=ds, w=ws, draw=draw)[0]
        return loss.sum() if total else loss
    with_grad = c is not None and out.requires_grad and torch.is_grad_enabled()
    shape_only = c is None  # then nothing depends on the values of out
    return _op("score_loss", out)(out.detach() if shape_only else out, cs, ds, ws, *noise, with_grad, total)[0]


# ---- multistep ----


@_refusing
def combine(arrays: Sequence[Tensor], coefficients: Tensor | Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    """``sum_k C[m, k] arrays[k]`` for each line m of a matrix, added in the order of k: the update of a multistep
    method, and whatever else it makes of the same arrays, in one pass over them.

    Args:
        arrays: K arrays of one shape, 1 <= K <= 16.
        coefficients: ``(M, K)``, or ``(M, K, B)`` for one matrix a sample, 1 <= M <= 4; a floating-point tensor on the
            device of the arrays, or a nested sequence of numbers. float64 coefficients of float32 arrays are rounded
            by the kernel and need no conversion.

    Returns:
        M arrays, each with the dtype and the memory format of the first array.

    Raises:
        TypeError: an array or the coefficients are of a wrong type or dtype.
        ValueError: the number of arrays, or a shape or a device, is not as above.
    """
    if not isinstance(arrays, Sequence) or not 1 <= len(arrays) <= 16:
        got = len(arrays) if isinstance(arrays, Sequence) else type(arrays).__name__
        raise ValueError(f"arrays: expected a sequence of 1 to 16 tensors, got {got}.")
    first = arrays[0]
    _state("arrays", first)
    terms, matrix = [_array("arrays", a, first) for a in arrays], _matrix(coefficients, len(arrays), first)
    if derived(matrix, *terms):
        results = _by_reference("combine", first, arrays=terms, coefficients=matrix)
        return tuple(r.to(first.dtype) for r in results)
    return tuple(_op("combine", first)(terms, matrix))


# ---- Runge-Kutta ----


@_refusing
def rk_stage(y: Tensor, ks: Sequence[Tensor], a: Sequence[float], h: Tensor | float) -> Tensor:
    """``y + h sum_j a_j k_j``: at most 16 slopes, ``a`` one Python number a slope, ``h`` a number or ``(B,)``."""
    _state("y", y)
    slopes, hs = [_array("ks", k, y) for k in ks], _number("h", h, y)
    if derived(y, hs, *slopes):
        return _by_reference("rk_stage", y, y=y, ks=slopes, a=_weights("a", a, len(slopes)), h=hs).to(y.dtype)
    return _op("rk_stage", y)(y, slopes, a, hs)


@_refusing
def rk_drift_stage(
    y: Tensor,
    ks: Sequence[Tensor],
    a: Sequence[float],
    h: Tensor | float,
    x: Tensor | Sequence[float],
    out: Tensor,
    f: Tensor | float | None,
    q: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """The slope ``k = f x + q out`` of an evaluation at ``x`` and, in the same pass, the next stage ``y + h (sum_j a_j
    k_j + a_last k)``.

    Returns ``(k, next stage)``; ``a`` has one entry more than ``ks``, for k. ``x`` may also be given by its own
    coefficients, ``y + h sum_j x_j k_j``: that is less to read and more to compute. ``f=None``: ``k = q out``.
    """
    following, k = _drift_stage("rk_drift_stage", y, ks, (a,), 1, h, x, out, f, q, True)
    return k, following


@_refusing
def rk_last_stage(
    y: Tensor,
    ks: Sequence[Tensor],
    a: Sequence[Sequence[float]],
    h: Tensor | float,
    x: Tensor | Sequence[float],
    out: Tensor,
    f: Tensor | float | None,
    q: Tensor | float,
    keep: bool = True,
) -> tuple[Tensor, ...]:
    """:func:`rk_drift_stage` for 2 to 4 lines ``a`` in one pass: k, the last stage, and the sums that end the step as
    far as they are known: the new state, also with ``y + h``, and error estimates, without. Without ``keep`` k is not
    among them."""
    if not 2 <= len(a) <= 4:
        raise ValueError(f"a: expected 2 to 4 lines of coefficients, got {len(a)}.")
    *sums, k = _drift_stage("rk_last_stage", y, ks, a, 2, h, x, out, f, q, keep)
    return (k, *sums) if keep else (*sums, k)


def _point(x: Any, y: Tensor) -> tuple[Tensor | None, Sequence[float]]:
    """Where an evaluation was made: an array, or its coefficients."""
    if isinstance(x, (tuple, list)) and all(isinstance(c, (int, float)) for c in x):
        return None, x
    return _array("x", x, y), ()


def _drift_stage(
    name: str, y: Tensor, ks: Any, a: Any, states: int, h: Any, x: Any, out: Any, f: Any, q: Any, keep: bool
) -> Sequence[Tensor]:
    _state("y", y)
    outs, (xs, at) = _array("out", out, y), _point(x, y)
    hs, fs, qs = _number("h", h, y), None if f is None else _number("f", f, y), _number("q", q, y)
    slopes = [_array("ks", k, y) for k in ks]
    for line in a:
        _weights("a", line, len(slopes) + 1)
    if derived(y, hs, xs, outs, fs, qs, *slopes):
        point = _weights("x", at, len(slopes)) if xs is None and fs is not None else xs
        k, *sums = _by_reference(
            name,
            y,
            y=y,
            ks=slopes,
            a=a if name == "rk_last_stage" else a[0],
            h=hs,
            x=point,
            out=outs,
            f=fs,
            q=qs,
        )
        results = (*sums, k) if keep else sums
        return [r.to(y.dtype) for r in results]
    flat = a[0] if len(a) == 1 else [c for line in a for c in line]
    return _op("rk_drift_stage", y)(y, slopes, flat, hs, xs, at, outs, fs, qs, states, keep)


@_refusing
def rk_error(
    y0: Tensor, y1: Tensor, ks: Sequence[Tensor], e: Sequence[float], h: Tensor | float, rtol: float, atol: float
) -> Tensor:
    """Each sample's sum over elements of ``(h sum_j e_j k_j / (atol + rtol max(|y0|, |y1|)))^2``: float64, shape
    ``(B,)``. NaN in either state gives NaN."""
    _state("y0", y0)
    y1s, slopes, hs = _array("y1", y1, y0), [_array("ks", k, y0) for k in ks], _number("h", h, y0)
    if derived(y0, y1s, hs, *slopes):
        weights = _weights("e", e, len(slopes))
        return _by_reference("rk_error", y0, y0=y0, y1=y1s, ks=slopes, e=weights, h=hs, rtol=rtol, atol=atol)
    return _op("rk_error", y0)(y0, y1s, slopes, e, hs, rtol, atol)


@_refusing
def rk_drift_error(
    y0: Tensor,
    y1: Tensor,
    ks: Sequence[Tensor],
    e: Sequence[float],
    h: Tensor | float,
    out: Tensor,
    f: Tensor | float | None,
    q: Tensor | float,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """:func:`rk_error` with one more slope, ``k = f y1 + q out`` (``f=None``: ``q out``) of an evaluation at ``y1``,
    whose coefficient is the last of ``e``. Returns also k."""
    _state("y0", y0)
    y1s, slopes, outs = _array("y1", y1, y0), [_array("ks", k, y0) for k in ks], _array("out", out, y0)
    hs, fs, qs = _number("h", h, y0), None if f is None else _number("f", f, y0), _number("q", q, y0)
    if derived(y0, y1s, hs, outs, fs, qs, *slopes):
        weights = _weights("e", e, len(slopes) + 1)
        squares, k = _by_reference(
            "rk_drift_error", y0, y0=y0, y1=y1s, ks=slopes, e=weights, h=hs, out=outs, f=fs, q=qs, rtol=rtol, atol=atol
        )
        return squares, k.to(y0.dtype)
    return _op("rk_drift_error", y0)(y0, y1s, slopes, e, hs, outs, fs, qs, rtol, atol)


@_refusing
def rk_control(norm: Tensor, h: Tensor, after_rejection: Tensor, exponent: float) -> Tensor:
    """The step-size controller, one decision a row: float64 ``(2, R)``, whether the step is accepted (1 or 0) and the
    next ``|h|``.

    Args:
        norm: float64 ``(R,)``, error over tolerance; accepted iff below 1.
        h: float64 ``(R,)``, ``|h|`` of the attempted step.
        after_rejection: bool ``(R,)``, whether this step was rejected before with a larger h.
        exponent: -1 / (order of the error estimate + 1).
    """
    _state("norm", norm)
    for name, t in (("h", h), ("after_rejection", after_rejection)):
        if not isinstance(t, Tensor) or t.shape != norm.shape or t.device != norm.device:
            raise ValueError(
                f"{name}: expected a tensor like norm, {tuple(norm.shape)} on {norm.device}, got {t!r:.80}."
            )
    if derived(norm, h):
        for name, t, dtype in (
            ("norm", norm, torch.float64),
            ("h", h, torch.float64),
            ("after_rejection", after_rejection, torch.bool),
        ):
            if t.dtype != dtype or t.dim() != 1:
                raise ValueError(f"{name}: expected {dtype} of shape (R,), got {t.dtype} {tuple(t.shape)}.")
        return reference.rk_control(norm, h, after_rejection, exponent)
    return _op("rk_control", norm)(norm, h, after_rejection, exponent)


# ---- marginals ----


@_refusing
def marginal(u: Tensor, first: float, last: float, process: str, a: float, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """Times ``t = first + (last - first) u`` and there m and s of p(x_t | x_0) = N(m x_0, s^2), ``(B,)`` each, like
    ``u``, which is float32 or float64.

    Args:
        process: ``vp`` or ``subvp`` with a, b = beta(0), beta(1), or ``ve`` with sigma(0), sigma(1) (Song et al. 2021,
            eq. 33, 34 and 31).
    """
    _state("u", u)
    if process not in PROCESSES:
        raise ValueError(f"process: expected one of {', '.join(PROCESSES)}, got {process!r}.")
    if derived(u, first, last, a, b):
        if u.dim() != 1 or u.dtype != compute_dtype(u):
            raise ValueError(f"u: expected float32 or float64 of shape (B,), got {u.dtype} {tuple(u.shape)}.")
        return reference.marginal(u, first, last, process, a, b)
    return _op("marginal", u)(u, first, last, PROCESSES.index(process), a, b)


@_refusing
def put(into: Tensor, values: Tensor, chosen: Tensor) -> None:
    """Writes those samples of ``values`` into the contiguous array ``into`` that ``chosen``, bool ``(B,)`` or of one
    element, is true for. Others are neither read nor written, as ``torch.where`` would."""
    _state("into", into)
    values = _array("values", values, into)
    if derived(into, values):
        if chosen.dtype != torch.bool or chosen.shape not in ((1,), into.shape[:1]) or chosen.device != into.device:
            raise ValueError(f"chosen: expected a bool tensor of one element or ({len(into)},), got {chosen!r:.80}.")
        return reference.put(into, values, chosen)
    return _op("put", into)(into, values, chosen)


# ---- noise ----


def _generated(key: Any, ids: Any, size: Sequence[int]) -> None:
    if not isinstance(key, Tensor):
        raise ValueError(f"key: expected an int64 tensor (seed, first draw), got {type(key).__name__}.")
    _streams(key, ids, key)
    if len(size) < 1 or min(size) < 0 or math.prod(size[1:]) > 2**34:
        raise ValueError(f"size: expected a shape (B, ...) with at most 2^34 elements a sample, got {tuple(size)}.")


@_refusing
def noise_normal(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int]) -> Tensor:
    """Standard normals of shape ``size = (B, *)``, float32, within 4 ulp of the exact formula (Box and Muller 1958, on
    Philox4x32-10, Salmon et al. 2011). See :class:`Draw` for the arguments; ValueError for a wrong one."""
    _generated(key, ids, size)
    return _op("noise_normal", key)(key, ids, draw, size)


@_refusing
def squares_of_noise(draw: Draw, like: Tensor) -> tuple[Draw, Tensor]:
    """The sum of squares of each sample's noise, ``(B,)``, and the draw for another use of it: on the CPU as an array,
    which costs less to keep than to generate again."""
    _state("like", like)
    if like.is_cpu and draw.key is not None and like.dtype == torch.float32 and not transformed():
        _generated(draw.key, draw.ids, like.shape)
        z, squares = _op("noise_with_squares", like)(draw.key, draw.ids, draw.draw, like.shape)
        return Draw(z), squares
    if like.is_cpu:
        draw = Draw(materialize(draw, like))
    return draw, score_loss(like, None, 1.0, 1.0, draw)


@_refusing
def noise_uniform(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int]) -> Tensor:
    """Uniform on [0, 1) with 24 bits, float32."""
    _generated(key, ids, size)
    return _op("noise_uniform", key)(key, ids, draw, size)


@_refusing
def noise_integers(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int], high: int) -> Tensor:
    """Uniform on {0, ..., high - 1}, int64; 1 <= high <= 2^32."""
    _generated(key, ids, size)
    return _op("noise_integers", key)(key, ids, draw, size, high)


@_refusing
def materialize(draw: Draw, like: Tensor) -> Tensor:
    """The noise of a draw as an array of the shape, dtype and device of ``like``."""
    _state("like", like)
    if draw.key is None:
        return _array("z", draw.z, like)
    return noise_normal(draw.key, draw.ids, draw.draw, like.shape).to(like.dtype)


# ---- registration: shapes for tracing (csrc/torch/autograd.cpp has the derivatives) ----


def _register_fakes() -> None:
    fake = torch.library.register_fake

    def loss_fake(out, c, d, w, z, key, ids, draw, with_grad, total):
        loss = out.new_empty(() if total else (out.shape[0],), dtype=compute_dtype(out))
        return loss, torch.empty_like(out) if with_grad else out.new_empty((0,))

    fake("scoresde_ext::affine")(lambda x, out, p, q: torch.empty_like(x))
    fake("scoresde_ext::affine_noise")(
        lambda x, out, p, q, n, z, key, ids, draw: (torch.empty_like(x), torch.empty_like(x))
    )
    fake("scoresde_ext::affine_next")(lambda x, out, p, q, n, z, key, ids, draw: torch.empty_like(x))
    fake("scoresde_ext::perturb")(lambda x, m, s, z, key, ids, draw: torch.empty_like(x))
    fake("scoresde_ext::perturb_keeping")(
        lambda x, m, s, key, ids, draw, kept: (torch.empty_like(x), x.new_empty((kept, *x.shape[1:])))
    )
    fake("scoresde_ext::score_loss")(loss_fake)
    fake("scoresde_ext::combine")(lambda arrays, c: [torch.empty_like(arrays[0]) for _ in range(c.shape[0])])
    fake("scoresde_ext::rk_stage")(lambda y, ks, a, h: torch.empty_like(y))
    fake("scoresde_ext::rk_drift_stage")(
        lambda y, ks, a, h, x, at, out, f, q, states, keep: [
            torch.empty_like(y) for _ in range(len(a) // (len(ks) + 1) + keep)
        ]
    )
    fake("scoresde_ext::rk_error")(
        lambda y0, y1, ks, e, h, rtol, atol: y0.new_empty((y0.shape[0],), dtype=torch.float64)
    )
    fake("scoresde_ext::rk_drift_error")(
        lambda y0, y1, ks, e, h, out, f, q, rtol, atol: (
            y0.new_empty((y0.shape[0],), dtype=torch.float64),
            torch.empty_like(y0),
        )
    )
    fake("scoresde_ext::rk_control")(lambda norm, h, after_rejection, exponent: norm.new_empty((2, norm.shape[0])))
    fake("scoresde_ext::marginal")(lambda u, first, last, process, a, b: tuple(u.new_empty(u.shape) for _ in range(3)))
    fake("scoresde_ext::put")(lambda into, values, chosen: None)
    fake("scoresde_ext::noise_normal")(lambda key, ids, draw, size: key.new_empty(size, dtype=torch.float32))
    fake("scoresde_ext::noise_with_squares")(
        lambda key, ids, draw, size: (
            key.new_empty(size, dtype=torch.float32),
            key.new_empty((size[0],), dtype=torch.float32),
        )
    )
    fake("scoresde_ext::noise_uniform")(lambda key, ids, draw, size: key.new_empty(size, dtype=torch.float32))
    fake("scoresde_ext::noise_integers")(lambda key, ids, draw, size, high: key.new_empty(size))


_register_fakes()


def _register_vmap() -> None:
    """Noise under vmap, where keys or ids differ from call to call: streams of one key are made together."""

    def batched(op: Any) -> None:
        def rule(info: Any, in_dims: Any, key: Tensor, ids: Tensor | None, draw: int, size: Any, *high: int) -> Any:
            n, (of_key, of_ids, *_) = info.batch_size, in_dims
            if of_key is None and ids is not None:
                together = (n * size[0], *size[1:])
                values = op(key, ids.movedim(of_ids, 0).flatten(), draw, together, *high)
                return values.reshape(n, *size), 0
            keys = key.expand(n, 2) if of_key is None else key.movedim(of_key, 0)
            streams = [ids] * n if of_ids is None or ids is None else ids.movedim(of_ids, 0)
            return torch.stack([op(k, i, draw, size, *high) for k, i in zip(keys, streams, strict=True)]), 0

        torch.library.register_vmap(op, rule)

    for name in ("noise_normal", "noise_uniform", "noise_integers"):
        batched(getattr(_traced, name).default)


_register_vmap()
