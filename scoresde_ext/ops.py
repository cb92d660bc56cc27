"""One Python function a kernel.

Everything the package does to a batch is a per-sample affine combination of state ``x``, network output ``out`` and Gaussian noise ``z``, with
one coefficient a sample. Conventions for all functions here:

* arrays have shape ``(B, *)`` with any number of further dimensions, also none; float32, float64, bfloat16 or float16; any strides. They are
  computed and accumulated in float32 (float64 for float64 arrays). Results have the dtype of the first array and its memory format;
* coefficients are numbers or tensors of shape ``(B,)`` or with one element;
* noise is a :class:`Draw`: an array, or a stream from which the kernel generates it;
* a wrong argument raises ``ValueError`` or ``TypeError`` before any work, naming the argument.

``scoresde_ext.reference`` has the same functions in plain torch and is what the kernels are tested against. Calls with coefficients or noise
arrays that require gradients are answered by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _C, reference  # noqa: F401  _C registers torch.ops.scoresde_ext
from .reference import Draw

_ops = torch.ops.scoresde_ext


def _number(v: Tensor | float, x: Tensor) -> Tensor:
    return v if isinstance(v, Tensor) else torch.full((1,), v, dtype=_compute_dtype(x), device=x.device)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _needs_reference(*numbers: Tensor | float | None) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in numbers)


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _noise_arguments(draw: Draw, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, int]:
    return (None if draw.z is None else _like(draw.z, x)), draw.key, draw.ids, draw.draw


def _on_device(name: str, x: Tensor) -> Callable[..., Any]:
    """The op, or a readable error where this build has no kernel for the device of ``x``."""
    if not x.is_cpu:
        key = "CUDA" if x.is_cuda else x.device.type.upper()
        if key != "META" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"scoresde_ext::{name}", key):
            raise NotImplementedError(
                f"scoresde_ext.ops.{name} has no kernel for {x.device} in this build. Move the tensors to the CPU, or, for CUDA, rebuild "
                "where nvcc is found (`python -m scoresde_ext info` shows what was built)."
            )
    return getattr(_ops, name)


# ---- affine ------------------------------------------------------------------------------------------------------------------------------


def affine(x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None = None) -> Tensor:
    """``p x + q out``: drifts and noise-free updates. Differentiable in ``x`` and ``out``, twice and more."""
    if _needs_reference(p, q):
        return reference.affine(x, out, p, q)
    op = _on_device("affine", x)
    return op(x, None if out is None else _like(out, x), _number(p, x), None if q is None else _number(q, x))


def affine_noise(
    x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None, n: Tensor | float, draw: Draw
) -> tuple[Tensor, Tensor]:
    """``mean = p x + q out`` and ``next = mean + n z``: every predictor and corrector update. Returns ``(mean, next)``."""
    if _needs_reference(p, q, n):
        return reference.affine_noise(x, out, p, q, n, draw)
    op = _on_device("affine_noise", x)
    outs = None if out is None else _like(out, x)
    return op(x, outs, _number(p, x), None if q is None else _number(q, x), _number(n, x), *_noise_arguments(draw, x))


def perturb(x0: Tensor, m: Tensor | float, s: Tensor | float, draw: Draw) -> Tensor:
    """``m x0 + s z``, a sample of the transition kernel p(x_t | x_0) = N(m x_0, s^2) (Song et al. 2021, section 3.3)."""
    if _needs_reference(m, s):
        return reference.perturb(x0, m, s, draw)
    return _on_device("perturb", x0)(x0, _number(m, x0), _number(s, x0), *_noise_arguments(draw, x0))


# ---- loss ----------------------------------------------------------------------------------------------------------------------------------


def score_loss(
    out: Tensor, c: Tensor | float | None, d: Tensor | float | None, w: Tensor | float, draw: Draw | None = None
) -> Tensor:
    """``w sum r^2`` over each sample with ``r = c out + d z``, shape ``(B,)``: the denoising score-matching loss (Song et al. 2021, eq. 7).

    Where ``out`` requires a gradient, ``2 w c r`` is computed in the same pass and kept. With ``c=None`` the array ``out`` gives only the
    shape; with ``d=None`` there is no noise: sums of squares of either part, which Langevin steps need. The result is float32 (float64 for
    float64 arrays). First and second derivatives with respect to ``out``.
    """
    if _needs_reference(c, d, w, None if draw is None else draw.z):
        return reference.score_loss(out, c, d, w, draw)[0]
    with_grad = c is not None and out.requires_grad and torch.is_grad_enabled()
    numbers = [None if v is None else _number(v, out) for v in (c, d)]
    noise = (None, None, None, 0) if draw is None else _noise_arguments(draw, out)
    return _on_device("score_loss", out)(out, *numbers, _number(w, out), *noise, with_grad)[0]


# ---- Runge-Kutta -----------------------------------------------------------------------------------------------------------------------------


def rk_stage(y: Tensor, ks: Sequence[Tensor], a: Sequence[float], h: Tensor | float) -> Tensor:
    """``y + h sum_j a_j k_j``. Zero coefficients are skipped."""
    return _on_device("rk_stage", y)(y, ks, a, _number(h, y))


def rk_drift_stage(
    y: Tensor,
    ks: Sequence[Tensor],
    a: Sequence[float],
    h: Tensor | float,
    x: Tensor,
    out: Tensor,
    f: Tensor | float,
    q: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """The slope ``k = f x + q out`` of an evaluation at ``x`` and, in the same pass, the next stage ``y + h (sum_j a_j k_j + a_last k)``.

    Returns ``(k, next stage)``; ``a`` has one entry more than ``ks``, for k.
    """
    op = _on_device("rk_drift_stage", y)
    return op(y, ks, a, _number(h, y), x, _like(out, y), _number(f, y), _number(q, y))


def rk_error(
    y0: Tensor, y1: Tensor, ks: Sequence[Tensor], e: Sequence[float], h: Tensor | float, rtol: float, atol: float
) -> Tensor:
    """Each sample's sum over elements of ``(h sum_j e_j k_j / (atol + rtol max(|y0|, |y1|)))^2``: float64, shape ``(B,)``."""
    return _on_device("rk_error", y0)(y0, y1, ks, e, _number(h, y0), rtol, atol)


def rk_control(norm: Tensor, h: Tensor, after_rejection: Tensor, exponent: float) -> Tensor:
    """The step-size controller, one decision a row: float64 ``(2, R)``, whether the step is accepted (1 or 0) and the next ``|h|``.

    Args:
        norm: float64 ``(R,)``, error over tolerance; accepted iff below 1.
        h: float64 ``(R,)``, ``|h|`` of the attempted step.
        after_rejection: bool ``(R,)``, whether this step was rejected before with a larger h.
        exponent: -1 / (order of the error estimate + 1).
    """
    return _on_device("rk_control", norm)(norm, h, after_rejection, exponent)


# ---- noise -----------------------------------------------------------------------------------------------------------------------------------


def noise_normal(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int]) -> Tensor:
    """Standard normals of shape ``size = (B, *)``, float32. See :class:`Draw` for the arguments."""
    return _on_device("noise_normal", key)(key, ids, draw, size)


def noise_uniform(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int]) -> Tensor:
    """Uniform on [0, 1) with 24 bits, float32."""
    return _on_device("noise_uniform", key)(key, ids, draw, size)


def noise_integers(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int], high: int) -> Tensor:
    """Uniform on {0, ..., high - 1}, int64; 1 <= high <= 2^32."""
    return _on_device("noise_integers", key)(key, ids, draw, size, high)


def materialize(draw: Draw, like: Tensor) -> Tensor:
    """The noise of a draw as an array of the shape, dtype and device of ``like``."""
    if draw.z is not None:
        return _like(draw.z, like)
    assert draw.key is not None
    return noise_normal(draw.key, draw.ids, draw.draw, like.shape).to(like.dtype)


# ---- registration: shapes for tracing, derivatives -------------------------------------------------------------------------------------------


def _register_fakes() -> None:
    fake = torch.library.register_fake

    def loss_fake(out, c, d, w, z, key, ids, draw, with_grad):
        loss = out.new_empty((out.shape[0],), dtype=_compute_dtype(out))
        return loss, torch.empty_like(out) if with_grad else out.new_empty((0,))

    fake("scoresde_ext::affine")(lambda x, out, p, q: torch.empty_like(x))
    fake("scoresde_ext::affine_noise")(
        lambda x, out, p, q, n, z, key, ids, draw: (torch.empty_like(x), torch.empty_like(x))
    )
    fake("scoresde_ext::perturb")(lambda x, m, s, z, key, ids, draw: torch.empty_like(x))
    fake("scoresde_ext::score_loss")(loss_fake)
    fake("scoresde_ext::rk_stage")(lambda y, ks, a, h: torch.empty_like(y))
    fake("scoresde_ext::rk_drift_stage")(lambda y, ks, a, h, x, out, f, q: (torch.empty_like(y), torch.empty_like(y)))
    fake("scoresde_ext::rk_error")(
        lambda y0, y1, ks, e, h, rtol, atol: y0.new_empty((y0.shape[0],), dtype=torch.float64)
    )
    fake("scoresde_ext::rk_control")(lambda norm, h, after_rejection, exponent: norm.new_empty((2, norm.shape[0])))
    fake("scoresde_ext::noise_normal")(lambda key, ids, draw, size: key.new_empty(size, dtype=torch.float32))
    fake("scoresde_ext::noise_uniform")(lambda key, ids, draw, size: key.new_empty(size, dtype=torch.float32))
    fake("scoresde_ext::noise_integers")(lambda key, ids, draw, size, high: key.new_empty(size))


def _register_derivatives() -> None:
    def scaled(g: Tensor | None, c: Tensor | None, wanted: bool) -> Tensor | None:
        return affine(g, None, c) if wanted and g is not None and c is not None else None

    def affine_setup(ctx, inputs, output):
        x, out, p, q = inputs
        ctx.save_for_backward(p, q)

    def affine_backward(ctx, g):
        p, q = ctx.saved_tensors
        return scaled(g, p, ctx.needs_input_grad[0]), scaled(g, q, ctx.needs_input_grad[1]), None, None

    def noise_setup(ctx, inputs, output):
        x, out, p, q, n, z, key, ids, draw = inputs
        ctx.save_for_backward(p, q, n)
        ctx.set_materialize_grads(False)

    def noise_backward(ctx, g_mean, g_next):
        p, q, n = ctx.saved_tensors
        parts = [g for g in (g_mean, g_next) if g is not None]
        g = sum(parts[1:], parts[0]) if parts else None
        wants = ctx.needs_input_grad
        return scaled(g, p, wants[0]), scaled(g, q, wants[1]), None, None, None, scaled(g_next, n, wants[5]), None, None, None

    def perturb_setup(ctx, inputs, output):
        x, m, s, z, key, ids, draw = inputs
        ctx.save_for_backward(m, s)

    def perturb_backward(ctx, g):
        m, s = ctx.saved_tensors
        return scaled(g, m, ctx.needs_input_grad[0]), None, None, scaled(g, s, ctx.needs_input_grad[3]), None, None, None

    def loss_setup(ctx, inputs, output):
        out, c, d, w, z, key, ids, draw, with_grad = inputs
        ctx.save_for_backward(output[1], c, w)
        ctx.with_grad = with_grad
        ctx.set_materialize_grads(False)

    def loss_backward(ctx, g_loss, g_grad):
        if not ctx.with_grad:
            raise RuntimeError("score_loss: no gradient was kept. Call it with with_grad=True where out requires a gradient.")
        grad, c, w = ctx.saved_tensors
        total = None
        if g_loss is not None:
            # The usual case, all ones, needs no pass over memory. (Not while the backward itself is traced or differentiated.)
            plain = type(g_loss) is Tensor and g_loss.is_cpu and not torch.is_grad_enabled()
            total = grad if plain and bool((g_loss == 1).all()) else affine(grad, None, g_loss)
        if g_grad is not None:  # the gradient is itself an output, with derivative 2 w c^2
            curvature = affine(g_grad, None, 2 * w * c * c)
            total = curvature if total is None else total + curvature
        return total, None, None, None, None, None, None, None, None

    register = torch.library.register_autograd
    register("scoresde_ext::affine", affine_backward, setup_context=affine_setup)
    register("scoresde_ext::affine_noise", noise_backward, setup_context=noise_setup)
    register("scoresde_ext::perturb", perturb_backward, setup_context=perturb_setup)
    register("scoresde_ext::score_loss", loss_backward, setup_context=loss_setup)


_register_fakes()
_register_derivatives()
