"""The sampling loop of k-diffusion: a denoiser in terms of sigma = s / m, one array operation after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .formulas import VP, Network, rows

Denoiser = Callable[[Tensor, Tensor], Tensor]


def vp_denoiser(sde: VP, network: Network) -> Denoiser:
    """``denoise(x, sigma)`` -> the estimate of x_0, for ``x = x_0 + sigma z`` and ``sigma`` ``(B,)``, by a network for
    the VP SDE."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        scale = 1.0 / torch.sqrt(sigma**2 + 1.0)
        slope = sde.beta_max - sde.beta_min  # log(1 + sigma^2) = slope t^2 / 2 + beta_min t
        t = (torch.sqrt(sde.beta_min**2 + 2.0 * slope * torch.log1p(sigma**2)) - sde.beta_min) / slope
        return x - rows(sigma, x) * network(rows(scale, x) * x, 999 * t)

    return denoise


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) from ``sigmas[0]`` to ``sigmas[-1]``, which
    fall."""
    times = torch.tensor([-math.log(sigma) for sigma in sigmas], dtype=x.dtype)
    before: Tensor | None = None
    for i in range(len(times) - 1):
        t, t_next = times[i], times[i + 1]
        estimate = denoise(x, t.neg().exp() * x.new_ones(len(x)))
        h = t_next - t
        direction = estimate
        if before is not None:
            r = (t - times[i - 1]) / h
            direction = (1 + 1 / (2 * r)) * estimate - (1 / (2 * r)) * before
        x = (t_next.neg().exp() / t.neg().exp()) * x - (-h).expm1() * direction
        before = estimate
    return x
