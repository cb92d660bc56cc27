"""The three SDEs of Song et al. 2021 (arXiv 2011.13456) as score_sde_pytorch computes with them: drift and diffusion
as arrays, the score made from the network's output, nothing fused, ``1 - exp`` where digits cancel.

``x`` is ``(B, *)`` and ``t`` is ``(B,)``, in the dtype of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]


def rows(v: Tensor, x: Tensor) -> Tensor:
    """One number a sample, ``(B,)``, to be multiplied with ``(B, *)``."""
    return v.reshape(-1, *[1] * (x.dim() - 1))


class Formulas:
    """An SDE ``dx = f(x, t) dt + g(t) dw`` on [0, 1] and the meaning of its networks."""

    def std(self, t: Tensor) -> Tensor:
        """Standard deviation of p(x_t | x_0)."""
        raise NotImplementedError

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def diffusion(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def score(self, network: Network, x: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError


class VP(Formulas):
    """Eqs. 11, 32 and 33: beta(t) = beta_min + t (beta_max - beta_min)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_mean(self, t: Tensor) -> Tensor:
        """The logarithm of E[x_t | x_0] / x_0."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def std(self, t: Tensor) -> Tensor:
        return torch.sqrt(1.0 - torch.exp(2.0 * self.log_mean(t)))

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return -0.5 * rows(self.beta(t), x) * x

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def score(self, network: Network, x: Tensor, t: Tensor) -> Tensor:
        return -network(x, 999 * t) / rows(self.std(t), x)


class SubVP(VP):
    """Eqs. 12 and 34: VP's mean, the square of its standard deviation."""

    def std(self, t: Tensor) -> Tensor:
        return 1.0 - torch.exp(2.0 * self.log_mean(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t) * (1.0 - torch.exp(4.0 * self.log_mean(t))))


class VE(Formulas):
    """Eqs. 9, 30 and 31: sigma(t) grows geometrically."""

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def std(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.std(t) * math.sqrt(2.0 * math.log(self.sigma_max / self.sigma_min))

    def score(self, network: Network, x: Tensor, t: Tensor) -> Tensor:
        return network(x, self.std(t))


SDES: dict[str, type[VP] | type[VE]] = {"vp": VP, "subvp": SubVP, "ve": VE}


def flow_drift(sde: Formulas, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt along the probability flow (eq. 13)."""
    return sde.drift(x, t) - 0.5 * rows(sde.diffusion(t), x) ** 2 * score
