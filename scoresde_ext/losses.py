"""Training objectives and steps.

The denoising score-matching loss (Song et al. 2021, eq. 7) is two kernels: one perturbs the data, one computes the loss
and its gradient with respect to the network's output from one pass over that output. The noise is generated again
there, or kept where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import noise, ops
from .checks import check_array, check_eps, check_flags, check_sde, check_state, real, whole
from .models import utils as mutils
from .reference import Draw, rows
from .sde_lib import SDE, VESDE, VPSDE, is_affine, perturbation

LossFn = Callable[[Any, Tensor], Tensor]


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
    """

    def optimize_fn(
        optimizer: torch.optim.Optimizer,
        params: Iterable[nn.Parameter],
        step: int,
        lr: float = config.optim.lr,
        warmup: float = config.optim.warmup,
        grad_clip: float = config.optim.grad_clip,
    ) -> None:
        lr, warmup, step = real("lr", lr), real("warmup", warmup), whole("step", step, 0)
        grad_clip = real("grad_clip", grad_clip, "a number", lambda v: not math.isnan(v))
        if warmup > 0:
            for group in optimizer.param_groups:
                group["lr"] = float(lr * min(step / warmup, 1.0))
        if grad_clip >= 0:
            torch.nn.utils.clip_grad_norm_(params, max_norm=grad_clip)
        optimizer.step()

    return optimize_fn


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
    batch = max(len(x), 1)
    return 1.0 / max(x.numel(), batch) if reduce_mean else 0.5 / batch


def get_sde_loss_fn(
    sde: SDE,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
) -> LossFn:
    """``loss_fn(model, batch)``: the continuous-time score-matching loss (Song et al. 2021, eq. 7).

    Args:
        sde: the forward SDE.
        train: mode of the network.
        reduce_mean: average over the elements of a sample; else half the sum.
        continuous: whether the network is trained on continuous times, see
            :func:`scoresde_ext.models.utils.get_score_fn`.
        likelihood_weighting: weight g(t)^2 (Song, Durkan, Murray, Ermon 2021) instead of std(t)^2.
        eps: smallest time.

    The batch has shape ``(B, *)`` and any floating dtype; the loss is a number in float32 (float64 for float64 data).

    Raises:
        ValueError: eps outside (0, T); a batch that is not floating point, or holds NaN or Inf (looked for on the CPU
            alone); a network output of another shape.
    """
    check_sde(sde)
    eps = check_eps(eps, sde.T)
    check_flags(train=train, reduce_mean=reduce_mean, continuous=continuous, likelihood_weighting=likelihood_weighting)
    affine = is_affine(sde)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        check_array("batch", batch)
        mutils.ensure_mode(model, train)
        score_fn = mutils.make_score_fn(sde, mutils.CheckedNetwork(model), continuous)
        weight = _reduction(batch, reduce_mean)
        if not affine:
            check_state("batch", batch)
            u, draw = noise.times_and_normal(batch)
            t = u * (sde.T - eps) + eps
            return _plain_loss(sde, score_fn, batch, t, ops.materialize(draw, batch), likelihood_weighting, weight)
        x, labels, c, ratio, draw = perturbed(score_fn, batch)
        out = score_fn.network(x, labels)
        del x, labels  # unless the network keeps them for its own derivative, their memory serves for the gradient
        # (score std + z)^2, or (score + z / std)^2 g^2 = (score std + z)^2 (g / std)^2
        return ops.score_loss(out, c, 1.0, weight * ratio * ratio, draw, total=True)

    def perturbed(score_fn: mutils.ScoreFunction, batch: Tensor) -> tuple[Tensor, Tensor, Any, Any, Draw]:
        """A state for each sample and its labels; c with score std = c out; g / std, or 1; the noise."""
        u, draw = noise.times_and_normal(batch)
        t, m, std = perturbation(sde, u, eps)  # type: ignore[arg-type]
        x, draw = _perturbed(batch, m, std, draw)
        c = -1.0 if score_fn.predicts_noise else score_fn.coefficient(t) * std
        ratio = sde.sde_coefficients(t)[1] / std if likelihood_weighting else 1.0  # type: ignore[attr-defined]
        # The product by a kernel takes half as long as torch's, and nobody differentiates this t.
        labels = score_fn.labels(t) if score_fn.scale is None else ops.affine(t, None, score_fn.scale)
        return x, labels, c, ratio, draw

    return loss_fn


def _plain_loss(
    sde: SDE,
    score_fn: mutils.ScoreFunction,
    x0: Tensor,
    t: Tensor,
    z: Tensor,
    likelihood_weighting: bool,
    weight: float,
) -> Tensor:
    """The same loss for an SDE that is known by its methods alone."""
    mean, std = sde.marginal_prob(x0, t)
    score = score_fn(mean + rows(std, x0) * z, t)
    if likelihood_weighting:
        g = sde.sde(torch.zeros_like(x0), t)[1]
        return weight * ((score + z / rows(std, x0)).square() * rows(g * g, x0)).sum()
    return weight * (score * rows(std, x0) + z).square().sum()


def get_smld_loss_fn(vesde: VESDE, train: bool, reduce_mean: bool = False) -> LossFn:
    """``loss_fn(model, batch)``: the loss of SMLD on the discrete noise levels, largest first (Song and Ermon 2019;
    Song et al. 2021, eq. 1). Batch, result and errors as in :func:`get_sde_loss_fn`; AssertionError for another SDE."""
    if not isinstance(vesde, VESDE):
        raise AssertionError(f"vesde: SMLD training works for VESDE alone, got {type(vesde).__name__}.")
    check_flags(train=train, reduce_mean=reduce_mean)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        check_array("batch", batch)
        mutils.ensure_mode(model, train)
        like = batch.new_empty(len(batch), dtype=ops.compute_dtype(batch))
        labels = noise.integers(vesde.N, like)
        sigmas = vesde.table("discrete_sigmas", like)[vesde.N - 1 - labels]  # label 0 is the largest
        draw = noise.normal(batch)
        x, draw = _perturbed(batch, 1.0, sigmas, draw)
        out = mutils.CheckedNetwork(model)(x, labels)
        del x
        # (score + z / sigma)^2 sigma^2
        return ops.score_loss(out, sigmas, 1.0, _reduction(batch, reduce_mean), draw, total=True)

    return loss_fn


def get_ddpm_loss_fn(vpsde: VPSDE, train: bool, reduce_mean: bool = True) -> LossFn:
    """``loss_fn(model, batch)``: the loss of DDPM on the discrete steps; the network predicts the noise (Ho et al.
    2020; Song et al. 2021, eq. 3). Batch, result and errors as in :func:`get_sde_loss_fn`; AssertionError for another
    SDE."""
    if not isinstance(vpsde, VPSDE):
        raise AssertionError(f"vpsde: DDPM training works for VPSDE alone, got {type(vpsde).__name__}.")
    if not bool(vpsde.sqrt_alphas_cumprod.isfinite().all()):
        raise ValueError(f"vpsde: expected N of at least beta_max for the discrete process, got N = {vpsde.N}.")
    check_flags(train=train, reduce_mean=reduce_mean)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        check_array("batch", batch)
        mutils.ensure_mode(model, train)
        like = batch.new_empty(len(batch), dtype=ops.compute_dtype(batch))
        labels = noise.integers(vpsde.N, like)
        m, std = (vpsde.table(name, like)[labels] for name in ("sqrt_alphas_cumprod", "sqrt_1m_alphas_cumprod"))
        draw = noise.normal(batch)
        x, draw = _perturbed(batch, m, std, draw)
        out = mutils.CheckedNetwork(model)(x, labels)
        del x
        # (out - z)^2
        return ops.score_loss(out, 1.0, -1.0, _reduction(batch, reduce_mean), draw, total=True)

    return loss_fn


def get_step_fn(
    sde: SDE,
    train: bool,
    optimize_fn: Callable[..., None] | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
) -> Callable[[dict[str, Any], Tensor], Tensor]:
    """``step_fn(state, batch)`` -> loss: one training step, or one evaluation with the averaged weights.

    ``state`` has the keys ``model optimizer ema step``; training adds one to ``step``.

    Raises:
        ValueError: discrete training of an SDE that has none (sub-VP, a user's own).
        AssertionError: discrete training with likelihood weighting.
    """
    check_sde(sde)
    check_flags(train=train, reduce_mean=reduce_mean, continuous=continuous, likelihood_weighting=likelihood_weighting)
    if continuous:
        loss_fn = get_sde_loss_fn(
            sde, train, reduce_mean=reduce_mean, continuous=True, likelihood_weighting=likelihood_weighting
        )
    else:
        if likelihood_weighting:
            raise AssertionError(
                "likelihood_weighting: the original SMLD and DDPM losses have none; use continuous=True."
            )
        if isinstance(sde, VESDE):
            loss_fn = get_smld_loss_fn(sde, train, reduce_mean=reduce_mean)
        elif isinstance(sde, VPSDE):
            loss_fn = get_ddpm_loss_fn(sde, train, reduce_mean=reduce_mean)
        else:
            raise ValueError(
                f"sde: discrete training is known for VPSDE and VESDE, got {type(sde).__name__}. Use continuous=True."
            )
    if train and not callable(optimize_fn):
        got = f"{optimize_fn!r:.100}"
        raise ValueError(f"optimize_fn: expected the function of optimization_manager(config) for training, got {got}.")

    def step_fn(state: dict[str, Any], batch: Tensor) -> Tensor:
        model = state["model"]
        if train:
            assert optimize_fn is not None
            optimizer = state["optimizer"]
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimize_fn(optimizer, model.parameters(), step=state["step"])
            state["step"] += 1
            state["ema"].update(model.parameters())
            return loss
        ema = state["ema"]
        with torch.no_grad():
            ema.store(model.parameters())
            try:
                ema.copy_to(model.parameters())
                return loss_fn(model, batch)
            finally:
                ema.restore(model.parameters())

    return step_fn
