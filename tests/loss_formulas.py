"""Upstream's losses as formulas in float64: what every training loss is compared with."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde_ext import losses, sde_lib

EPS = 1e-5  # smallest time


class Decay(sde_lib.SDE):
    """dx = -x dt + sqrt(2) dw, by upstream's methods alone."""

    T = 1.0

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return -x, math.sqrt(2) * torch.ones_like(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(-t)[:, None] * x, torch.sqrt(-torch.expm1(-2 * t))

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def vp(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    """m, s; c and d of the residual ``c out + d z``, in upstream's formula."""
    log_m = -0.25 * t * t * 19.9 - 0.5 * t * 0.1
    s, g = (-torch.expm1(2 * log_m)).sqrt(), (0.1 + 19.9 * t).sqrt()
    k = -1 / s  # score = k out
    return (log_m.exp(), s, k * g, g / s) if weighted else (log_m.exp(), s, k * s, torch.ones_like(t))


def subvp(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    log_m = -0.25 * t * t * 19.9 - 0.5 * t * 0.1
    s, g = -torch.expm1(2 * log_m), ((0.1 + 19.9 * t) * -torch.expm1(4 * log_m)).sqrt()
    return (log_m.exp(), s, -g / s, g / s) if weighted else (log_m.exp(), s, -torch.ones_like(t), torch.ones_like(t))


def ve(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    s = 0.1 * 50**t
    g = s * math.sqrt(2 * math.log(50))
    return (torch.ones_like(t), s, g, g / s) if weighted else (torch.ones_like(t), s, s, torch.ones_like(t))


def decay(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    s = (-torch.expm1(-2 * t)).sqrt()
    g = math.sqrt(2) * torch.ones_like(t)
    return (torch.exp(-t), s, g, g / s) if weighted else (torch.exp(-t), s, s, torch.ones_like(t))


def smld(labels: Tensor, _: bool) -> tuple[Tensor, ...]:
    sigma = torch.exp(torch.linspace(math.log(0.1), math.log(5), 1000)).flip(0).double()[labels]
    return torch.ones_like(sigma), sigma, sigma, torch.ones_like(sigma)


def ddpm(labels: Tensor, _: bool) -> tuple[Tensor, ...]:
    product = torch.cumprod(1 - torch.linspace(0.1 / 1000, 20 / 1000, 1000), 0)
    m, s = product.sqrt().double()[labels], (1 - product).sqrt().double()[labels]
    return m, s, torch.ones_like(m), -torch.ones_like(m)


VP, VE = sde_lib.VPSDE(), sde_lib.VESDE(0.1, 5.0)
Formula = Callable[[Tensor, bool], tuple[Tensor, ...]]
CONTINUOUS: dict[str, tuple[sde_lib.SDE, Formula]] = {
    "vp": (VP, vp), "subvp": (sde_lib.subVPSDE(), subvp), "ve": (VE, ve), "user's": (Decay(1000), decay),
}  # fmt: skip
LOSSES: dict[str, tuple[losses.LossFn, Formula, bool, bool]] = {
    f"{kind}, {'g^2' if weighted else 'std^2'}, {'mean' if mean else 'sum'}": (
        losses.get_sde_loss_fn(sde, True, reduce_mean=mean, likelihood_weighting=weighted), formula, weighted, mean,
    )
    for kind, (sde, formula) in CONTINUOUS.items()
    for weighted, mean in ((True, True), (False, False))
} | {
    "smld": (losses.get_smld_loss_fn(VE, True), smld, False, False),
    "ddpm": (losses.get_ddpm_loss_fn(VP, True), ddpm, False, True),
}  # fmt: skip


def coefficients(name: str, u: Tensor) -> tuple[Tensor, ...]:
    """``m, s, c, d`` of a loss, each ``(B, 1)``: its states are ``m x0 + s z``, its residuals ``c out + d z``, and its
    first draw is ``u``."""
    _, formula, weighted, _ = LOSSES[name]
    return tuple(v[:, None] for v in formula(u.double() * (1 - EPS) + EPS if u.is_floating_point() else u, weighted))
