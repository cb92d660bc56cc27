"""Training and sampling steps as score_sde_pytorch computes them (Song et al. 2021, eq. 7; appendix G): every product
and sum an array of its own. Noise is an argument, so that a test can say what it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formulas import VP, Formulas, Network, rows


def mean(sde: Formulas, x0: Tensor, t: Tensor) -> Tensor:
    """E[x_t | x_0]."""
    return torch.exp(rows(sde.log_mean(t), x0)) * x0 if isinstance(sde, VP) else x0


def score_matching_loss(
    sde: Formulas,
    network: Network,
    x0: Tensor,
    u: Tensor,
    z: Tensor,
    likelihood_weighting: bool = False,
    reduce_mean: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """The continuous-time loss; ``u`` ``(B,)`` is uniform, ``z`` ``(B, *)`` normal."""
    t = u * (1.0 - eps) + eps
    x_mean, std = mean(sde, x0, t), sde.std(t)
    perturbed = x_mean + rows(std, x0) * z
    score = sde.score(network, perturbed, t)
    if likelihood_weighting:
        losses = torch.square(score + z / rows(std, x0))
        losses = _reduced(losses, reduce_mean) * sde.diffusion(t) ** 2
    else:
        losses = _reduced(torch.square(score * rows(std, x0) + z), reduce_mean)
    return torch.mean(losses)


def _reduced(losses: Tensor, reduce_mean: bool) -> Tensor:
    flat = losses.reshape(len(losses), -1)
    return torch.mean(flat, dim=-1) if reduce_mean else 0.5 * torch.sum(flat, dim=-1)


def euler_maruyama(
    sde: Formulas, network: Network, x: Tensor, t: Tensor, z: Tensor, N: int = 1000
) -> tuple[Tensor, Tensor]:
    """One step of 1 / N along the reverse-time SDE: ``(x, x_mean)``."""
    dt = -1.0 / N
    g = sde.diffusion(t)
    drift = sde.drift(x, t) - rows(g, x) ** 2 * sde.score(network, x, t)
    x_mean = x + drift * dt
    return x_mean + rows(g, x) * math.sqrt(-dt) * z, x_mean


def langevin(
    sde: Formulas, network: Network, x: Tensor, t: Tensor, z: Tensor, N: int = 1000, snr: float = 0.16
) -> tuple[Tensor, Tensor]:
    """One step of Langevin dynamics, its size from the norms of score and noise: ``(x, x_mean)``."""
    if isinstance(sde, VP):
        betas = torch.linspace(sde.beta_min / N, sde.beta_max / N, N)
        alpha = (1.0 - betas)[(t * (N - 1)).long()]
    else:
        alpha = torch.ones_like(t)
    score = sde.score(network, x, t)
    score_norm = torch.norm(score.reshape(len(score), -1), dim=-1).mean()
    noise_norm = torch.norm(z.reshape(len(z), -1), dim=-1).mean()
    step = (snr * noise_norm / score_norm) ** 2 * 2 * alpha
    x_mean = x + rows(step, x) * score
    return x_mean + torch.sqrt(rows(step, x) * 2) * z, x_mean
