"""Likelihoods as score_sde_pytorch computes them (Song et al. 2021, appendix D.2): scipy's RK45 on numpy vectors, and
two runs of the network in each evaluation, one for the drift and one for its divergence."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .formulas import VE, Formulas, Network, flow_drift


def likelihood(
    sde: Formulas, network: Network, data: Tensor, epsilon: Tensor, rtol: float, atol: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor, int]:
    """``(bits a dimension, latent code, evaluations)`` of data scaled to [-1, 1], by the divergence along ``epsilon``
    ``(B, *)``."""
    from scipy.integrate import solve_ivp  # imported where it is used: a machine with a GPU may lack it

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return flow_drift(sde, sde.score(network, x, t), x, t)

    def divergence(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (product,) = torch.autograd.grad(torch.sum(drift(x, t) * epsilon), x)
        return torch.sum(product * epsilon, dim=tuple(range(1, x.dim())))

    def derivative(t: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat[: -len(data)].reshape(data.shape)).to(data.dtype)
        times = torch.ones(len(data), dtype=data.dtype) * t
        with torch.no_grad():
            slope = drift(x, times)
        return np.concatenate([slope.numpy().reshape(-1), divergence(x, times).numpy()])

    start = np.concatenate([data.numpy().reshape(-1), np.zeros(len(data))])
    solution = solve_ivp(derivative, (eps, 1.0), start, method="RK45", rtol=rtol, atol=atol)
    end = torch.from_numpy(solution.y[:, -1]).to(data.dtype)
    z, delta = end[: -len(data)].reshape(data.shape), end[-len(data) :]
    n = math.prod(data.shape[1:])
    std = sde.sigma_max if isinstance(sde, VE) else 1.0
    squares = z.square().reshape(len(z), n).sum(1)
    prior = -n / 2.0 * math.log(2 * math.pi * std**2) - squares / (2 * std**2)
    return -(prior + delta) / math.log(2) / n + 7.0, z, solution.nfev
