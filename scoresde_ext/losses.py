"""Training objectives and steps.

The denoising score-matching loss (Song et al. 2021, eq. 7) is two kernels: one perturbs the data, one computes the loss
and its gradient with respect to the network's output from one pass over that output. The noise is generated again
there, or kept where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from . import noise, ops
from .callers import warn
from .checks import check_array, check_choice, check_eps, check_flags, check_state, real, traced, whole
from .foreign import recognised
from .models import utils as mutils
from .models.program import model_function, score_function
from .models.utils import ScoreFunction
from .reference import Draw, rows
from .sde_lib import SDE, VESDE, VPSDE, is_affine, perturbation
from .utils import require_keys

LossFn = Callable[..., Tensor]
"""``loss_fn(model, batch, mask=None)``."""


def get_optimizer(config: Any, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam with ``config.optim.{lr, beta1, eps, weight_decay}``; NotImplementedError for another
    ``config.optim.optimizer``."""
    optim = config.optim
    if optim.optimizer != "Adam":
        raise NotImplementedError(f"config.optim.optimizer: expected 'Adam', got {optim.optimizer!r}.")
    names = ("lr", "beta1", "eps", "weight_decay")
    lr, beta1, eps, weight_decay = (real(f"config.optim.{name}", getattr(optim, name)) for name in names)
    return torch.optim.Adam(params, lr=lr, betas=(beta1, 0.999), eps=eps, weight_decay=weight_decay)


def optimization_manager(config: Any) -> Callable[..., None]:
    """``optimize_fn(optimizer, params, step, lr=..., warmup=..., grad_clip=...)``: linear warm-up, clipping of the
    gradient's norm, one step.

    The defaults are those of ``config.optim``. No warm-up where ``warmup <= 0``, no clipping where ``grad_clip < 0``.

    ``optimize_fn`` reads the gradient's norm as a number. On a GPU that waits for the backward pass, once a step. Under
    ``torch.compile`` and while a CUDA graph is captured it cannot be read, and is not checked.

    Raises (``optimize_fn``; weights and the optimizer's state are then unchanged):
        FloatingPointError: the gradient's norm is NaN or Inf. The message names the step.
        ValueError: ``grad_clip`` is 0 or NaN.
    """
    return _Optimize(config.optim.lr, config.optim.warmup, config.optim.grad_clip)


class _Optimize:
    """What :func:`optimization_manager` returns."""

    def __init__(self, lr: float, warmup: int, grad_clip: float) -> None:
        self.lr, self.warmup, self.grad_clip = lr, warmup, grad_clip

    def __call__(
        self,
        optimizer: torch.optim.Optimizer,
        params: Iterable[nn.Parameter] | Tensor,
        step: int,
        lr: float | None = None,
        warmup: float | None = None,
        grad_clip: float | None = None,
    ) -> None:
        lr = self.lr if lr is None else lr
        warmup = self.warmup if warmup is None else warmup
        grad_clip = self.grad_clip if grad_clip is None else grad_clip
        lr, warmup, step = real("lr", lr), real("warmup", warmup), whole("step", step, 0)
        grad_clip = real("grad_clip", grad_clip, "a number", lambda v: True)
        if grad_clip == 0 or math.isnan(grad_clip):
            raise ValueError(
                f"grad_clip: expected a norm above 0, got {grad_clip}; clipping to 0 trains nothing. "
                "For no clipping use -1."
            )
        parameters = [params] if isinstance(params, Tensor) else list(params)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = _norm(gradients) if _readable(gradients) else None
        if norm is not None and not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step}: expected a finite gradient, got one of norm {norm}. Weights and optimizer state are as "
                "they were. Look for extreme values in the batch, lower the learning rate, or train in bfloat16 where "
                "this is float16. get_step_fn(..., on_nonfinite='skip') skips such steps."
            )
        if warmup > 0:
            for group in optimizer.param_groups:
                group["lr"] = float(lr * min(step / warmup, 1.0))
        if grad_clip >= 0 and norm is None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm=grad_clip)
        elif norm is not None and 0 <= grad_clip < norm + 1e-6:
            torch._foreach_mul_(gradients, grad_clip / (norm + 1e-6))
        optimizer.step()


def _readable(gradients: list[Tensor]) -> bool:
    """Whether values can be read: not while a program is traced or a CUDA graph captured."""
    capturing = any(g.is_cuda for g in gradients) and torch.cuda.is_current_stream_capturing()
    return not (capturing or torch.compiler.is_compiling())


def _norm(gradients: list[Tensor]) -> float:
    """The norm of all gradients together, in float32 at least: in float16 it overflows at 65504."""
    values = [
        torch.view_as_real(g.resolve_conj()) if g.is_complex() else g.coalesce().values() if g.is_sparse else g
        for g in gradients
    ]
    dtype = reduce(torch.promote_types, {v.dtype for v in values}, torch.float32)
    norms = torch._foreach_norm(values, 2, dtype) if values else []
    if all(type(n) is Tensor and n.is_cpu for n in norms):
        return math.hypot(*map(float, norms))
    device = norms[0].device  # from which one number comes
    norm: Any = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of all ranks, where they have parts


def _perturbed(batch: Tensor, m: Tensor | float, s: Tensor | float, draw: Draw) -> tuple[Tensor, Draw]:
    """:func:`ops.perturb_keeping`, which finds NaN and Inf on its way; the error then names the samples."""
    try:
        return ops.perturb_keeping(batch, m, s, draw)
    except ValueError:
        check_state("batch", batch)
        raise


def _reduction(x: Tensor, reduce_mean: bool) -> float:
    """Weight of a squared residual in the loss: the mean over elements or half their sum, then the mean over the
    batch."""
    batch = max(x.shape[0], 1)
    return 1.0 / max(x.numel(), batch) if reduce_mean else 0.5 / batch


def _squares(r: Tensor, w: Any, mask: Tensor | None, reduce_mean: bool) -> Tensor:
    """``sum w r^2`` reduced, in plain torch: w one a sample, ``mask`` the weights of the elements."""
    if mask is None:
        return _reduction(r, reduce_mean) * (rows(w, r) * r.square()).sum()
    observed = r.masked_fill(mask == 0, 0.0)  # also NaN: nobody looks at what is hidden
    total = (rows(w, r) * mask * observed.square()).sum()
    if not reduce_mean:
        return _reduction(r, reduce_mean) * total
    return total / mask.expand_as(r).sum().clamp(min=torch.finfo(mask.dtype).tiny)  # 0 where nothing is observed


def _loss(
    out: Tensor, c: Any, d: float, w: Any, draw: Draw, batch: Tensor, mask: Tensor | None, reduce_mean: bool
) -> Tensor:
    """``sum w (c out + d z)^2`` reduced: by the kernel, or in plain torch where elements have weights."""
    if out.dtype != batch.dtype:  # under autocast, or of a network in another precision
        out = out.to(ops.compute_dtype(batch))
    if mask is None:
        return ops.score_loss(out, c, d, _reduction(batch, reduce_mean) * w, draw, total=True)
    out, z = out.to(mask.dtype), ops.materialize(draw, batch).to(mask.dtype)
    r = rows(c, out) * out + d * z
    return _squares(r, w, mask, reduce_mean)


def _observed(batch: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """The batch with zeros where it is hidden; the weights of its elements, in its compute dtype."""
    if not isinstance(mask, Tensor) or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a tensor of bools or of weights >= 0, got {got}.")
    if mask.dim() != batch.dim() or any(m not in (1, n) for m, n in zip(mask.shape, batch.shape, strict=True)):
        leads = mask.shape == batch.shape[: mask.dim()]
        shape = [*mask.shape, *[1] * (batch.dim() - mask.dim())]
        raise ValueError(
            f"mask: expected the dimensions of the batch, {tuple(batch.shape)}, each its size or 1, got "
            f"{tuple(mask.shape)}." + (f" Write mask.reshape({', '.join(map(str, shape))})." if leads else "")
        )
    if mask.device != batch.device:
        raise ValueError(f"mask: expected the device of the batch, {batch.device}, got {mask.device}. Use mask.to().")
    weights = mask.to(ops.compute_dtype(batch))
    if weights.is_cpu and not traced() and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("mask: expected bools or finite weights >= 0, got a negative number, NaN or Inf.")
    return batch.masked_fill(weights == 0, 0.0), weights


def get_sde_loss_fn(
    sde: SDE,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
) -> LossFn:
    """``loss_fn(model, batch, mask=None)``: the continuous-time score-matching loss (Song et al. 2021, eq. 7).

    Args:
        sde: the forward SDE.
        train: mode of the network.
        reduce_mean: average over the elements of a sample; else half the sum.
        continuous: whether the network is trained on continuous times, see
            :func:`scoresde_ext.models.utils.get_score_fn`.
        likelihood_weighting: weight g(t)^2 (Song, Durkan, Murray, Ermon 2021) instead of std(t)^2.
        eps: smallest time.

    The batch has shape ``(B, *)`` and any floating dtype; the loss is a number in float32 (float64 for float64 data).
    The network may answer in any floating dtype. An output of another dtype than the batch's, as under autocast, is
    converted to the dtype of the loss.

    ``mask`` says which elements count: bools, or weights >= 0, with the dimensions of the batch, each its size or 1
    (padded sequences ``(B, L, C)``: ``(B, L, 1)``). With ``reduce_mean`` the loss is the weighted mean over all
    observed elements of the batch, ``sum mask r^2 / sum mask``: each counts the same, in short samples and in long
    ones, and it is 0 where nothing is observed. Without, it is half the sum ``sum mask r^2``, averaged over the batch.
    Data where the mask is 0 are never looked at and may be NaN; the network sees zeros there, perturbed like data. Its
    output there does not count. Noise is the same with and without a mask. The masked loss is plain torch, not a
    kernel.

    Raises:
        TypeError: a mask that is not a real tensor.
        ValueError: eps outside (0, T); a batch that is not floating point, or holds NaN or Inf where it is observed, or
            a mask with a negative number, NaN or Inf (values are looked at on the CPU alone); a mask of another shape
            or device; a network output of another shape.
    """
    read = recognised(sde)
    eps = check_eps(eps, sde.T)
    check_flags(train=train, reduce_mean=reduce_mean, continuous=continuous, likelihood_weighting=likelihood_weighting)
    return partial(_sde_loss, sde, read, train, reduce_mean, continuous, likelihood_weighting, eps)


def _sde_loss(
    sde: Any,
    read: SDE,
    train: bool,
    reduce_mean: bool,
    continuous: bool,
    likelihood_weighting: bool,
    eps: float,
    model: Any,
    batch: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    check_array("batch", batch)
    if mask is not None:
        batch, mask = _observed(batch, mask)
    given = read if torch.compiler.is_compiling() else sde  # a foreign one is looked at outside of the graph
    score_fn = score_function(given, model, train, continuous, mutils, each_step=True)
    process: Any = score_fn.sde
    if not is_affine(process):
        return _plain_sde_loss(process, score_fn, batch, mask, reduce_mean, likelihood_weighting, eps)
    u, draw = noise.times_and_normal(batch)
    t, m, std = perturbation(process, u, eps)
    x, draw = _perturbed(batch, m, std, draw)
    # (score std + z)^2, or (score + z / std)^2 g^2 = (score std + z)^2 (g / std)^2, with score std = c out. The network
    # may write to t: coefficients come first.
    c = -1.0 if score_fn.predicts_noise else score_fn.coefficient(t) * std
    ratio = process.sde_coefficients(t)[1] / std if likelihood_weighting else 1.0
    # The product by a kernel takes half as long as torch's, and nobody differentiates this t.
    labels = score_fn.labels(t) if score_fn.scale is None else ops.affine(t, None, score_fn.scale)
    out = score_fn.network(x, labels)
    del x, labels  # unless the network keeps them for its own derivative, their memory serves for the gradient
    return _loss(out, c, 1.0, ratio * ratio, draw, batch, mask, reduce_mean)


def _plain_sde_loss(
    sde: SDE,
    score_fn: ScoreFunction,
    batch: Tensor,
    mask: Tensor | None,
    reduce_mean: bool,
    likelihood_weighting: bool,
    eps: float,
) -> Tensor:
    """The same loss for an SDE that is known by its methods alone."""
    check_state("batch", batch)
    u, draw = noise.times_and_normal(batch)
    t, z = u * (sde.T - eps) + eps, ops.materialize(draw, batch).to(u.dtype)
    mean, std = sde.marginal_prob(batch, t)
    g = sde.sde(torch.zeros_like(batch), t)[1] if likelihood_weighting else 1.0  # first: the network may write to t
    score = score_fn(mean + rows(std, z) * z, t)
    if likelihood_weighting:
        return _squares(score + z / rows(std, z), g * g, mask, reduce_mean)
    return _squares(score * rows(std, z) + z, 1.0, mask, reduce_mean)


def get_smld_loss_fn(vesde: VESDE, train: bool, reduce_mean: bool = False) -> LossFn:
    """``loss_fn(model, batch, mask=None)``: the loss of SMLD on the discrete noise levels, largest first (Song and
    Ermon 2019; Song et al. 2021, eq. 1). Batch, mask, result and errors as in :func:`get_sde_loss_fn`; AssertionError
    for another SDE."""
    if not isinstance(recognised(vesde), VESDE):
        raise AssertionError(f"vesde: SMLD training works for VESDE alone, got {type(vesde).__name__}.")
    check_flags(train=train, reduce_mean=reduce_mean)
    return partial(_discrete_loss, _smld_terms, vesde, train, reduce_mean)


def _smld_terms(sde: VESDE, labels: Tensor, like: Tensor) -> tuple[Any, ...]:
    sigmas = sde.table("discrete_sigmas", like)[sde.N - 1 - labels]  # label 0 is the largest
    return 1.0, sigmas, sigmas, 1.0  # (score + z / sigma)^2 sigma^2


def get_ddpm_loss_fn(vpsde: VPSDE, train: bool, reduce_mean: bool = True) -> LossFn:
    """``loss_fn(model, batch, mask=None)``: the loss of DDPM on the discrete steps; the network predicts the noise (Ho
    et al. 2020; Song et al. 2021, eq. 3). Batch, mask, result and errors as in :func:`get_sde_loss_fn`; AssertionError
    for another SDE."""
    process = recognised(vpsde)
    if not isinstance(process, VPSDE):
        raise AssertionError(f"vpsde: DDPM training works for VPSDE alone, got {type(vpsde).__name__}.")
    process.require_discrete()
    check_flags(train=train, reduce_mean=reduce_mean)
    return partial(_discrete_loss, _ddpm_terms, vpsde, train, reduce_mean)


def _ddpm_terms(sde: VPSDE, labels: Tensor, like: Tensor) -> tuple[Any, ...]:
    m, std = (sde.table(name, like)[labels] for name in ("sqrt_alphas_cumprod", "sqrt_1m_alphas_cumprod"))
    return m, std, 1.0, -1.0  # (out - z)^2


def _discrete_loss(
    terms: Callable[[Any, Tensor, Tensor], tuple[Any, ...]],
    sde: SDE,
    train: bool,
    reduce_mean: bool,
    model: Any,
    batch: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """``(c out + d z)^2`` at ``m x_0 + s z``, with the ``m, s, c, d`` that ``terms`` gives for the labels."""
    check_array("batch", batch)
    if mask is not None:
        batch, mask = _observed(batch, mask)
    process: Any = recognised(sde)
    if isinstance(process, VPSDE):
        process.require_discrete()
    network = model_function(model, train, mutils, each_step=True)
    like = batch.new_empty(batch.shape[0], dtype=ops.compute_dtype(batch))
    labels = noise.integers(process.N, like)
    m, s, c, d = terms(process, labels, like)
    x, draw = _perturbed(batch, m, s, noise.normal(batch))
    out = network(x, labels)
    del x  # unless the network keeps it for its own derivative, its memory serves for the gradient
    return _loss(out, c, d, 1.0, draw, batch, mask, reduce_mean)


def get_step_fn(
    sde: SDE,
    train: bool,
    optimize_fn: Callable[..., None] | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
    *,
    on_nonfinite: str = "raise",
) -> Callable[..., Tensor]:
    """``step_fn(state, batch, mask=None)`` -> loss: one training step, or one evaluation with the averaged weights.

    ``state`` has the keys ``model optimizer ema step``; training adds one to ``step``. For ``mask`` see
    :func:`get_sde_loss_fn`.

    Args:
        on_nonfinite: what becomes of a step whose gradient is NaN or Inf (``optimize_fn`` raises FloatingPointError).
            ``"raise"``: the error leaves weights, optimizer, averages and ``step`` as they were. ``"skip"``: a warning
            names the step, weights, optimizer and averages stay as they were, and the step counts. (What the network
            itself changed in its forward pass, such as BatchNorm's statistics, stays changed.)

    Raises:
        ValueError: discrete training of an SDE that has none (sub-VP, a user's own); another ``on_nonfinite``.
        AssertionError: discrete training with likelihood weighting.
        FloatingPointError: by ``step_fn``, see ``on_nonfinite``.
    """
    recognised(sde)
    check_flags(train=train, reduce_mean=reduce_mean, continuous=continuous, likelihood_weighting=likelihood_weighting)
    check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
    if continuous:
        loss_fn = get_sde_loss_fn(
            sde, train, reduce_mean=reduce_mean, continuous=True, likelihood_weighting=likelihood_weighting
        )
    else:
        if likelihood_weighting:
            raise AssertionError(
                "likelihood_weighting: the original SMLD and DDPM losses have none; use continuous=True."
            )
        process = recognised(sde)
        if isinstance(process, VESDE):
            loss_fn = get_smld_loss_fn(sde, train, reduce_mean=reduce_mean)  # type: ignore[arg-type]
        elif isinstance(process, VPSDE):
            loss_fn = get_ddpm_loss_fn(sde, train, reduce_mean=reduce_mean)  # type: ignore[arg-type]
        else:
            raise ValueError(
                f"sde: discrete training is known for VPSDE and VESDE, got {type(sde).__name__}. Use continuous=True."
            )
    if not train:
        return partial(_evaluate, loss_fn)
    if not callable(optimize_fn):
        got = f"{optimize_fn!r:.100}"
        raise ValueError(f"optimize_fn: expected the function of optimization_manager(config) for training, got {got}.")
    return partial(_train, loss_fn, optimize_fn, on_nonfinite == "skip")


def _train(
    loss_fn: LossFn,
    optimize_fn: Callable[..., None],
    skip_nonfinite: bool,
    state: dict[str, Any],
    batch: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    require_keys(state)
    model, optimizer = state["model"], state["optimizer"]
    optimizer.zero_grad()
    loss = loss_fn(model, batch, mask)
    loss.backward()
    try:
        optimize_fn(optimizer, model.parameters(), step=state["step"])
    except FloatingPointError as error:
        if not skip_nonfinite:
            raise
        warn(f"Skipped {error}")
        state["step"] += 1
        return loss
    state["step"] += 1
    state["ema"].update(model.parameters())
    return loss


@torch.no_grad()
def _evaluate(loss_fn: LossFn, state: dict[str, Any], batch: Tensor, mask: Tensor | None = None) -> Tensor:
    require_keys(state, ("model", "ema"))
    model, ema = state["model"], state["ema"]
    ema.store(model.parameters())
    try:
        ema.copy_to(model.parameters())
        return loss_fn(model, batch, mask)
    finally:
        ema.restore(model.parameters())
