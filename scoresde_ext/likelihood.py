"""Exact likelihoods through the probability-flow ODE (Song et al. 2021, appendix D.2, eq. 39, 40).

``log p_0(x) = log p_T(x(T)) + integral of div(drift) dt``; the divergence is estimated by ``eps^T (d drift / dx) eps``
with one random ``eps`` a solve (Skilling 1989; Hutchinson 1990). Drift and divergence of an evaluation share one
forward pass of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import noise, ops, sampling
from .checks import check_eps, check_state, check_tolerances
from .integrate import Terms, time_vector
from .models import utils as mutils
from .sde_lib import SDE

HUTCHINSON = ("Gaussian", "Rademacher")


def get_div_fn(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``div(x, t, eps)`` -> ``(B,)``: the estimate ``eps^T (d fn / dx) eps`` of the divergence of ``fn(x, t)`` at ``x``
    ``(B, *)``."""

    def div_fn(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (product,) = torch.autograd.grad(fn(x, t), x, eps)
        return _row_dot(product, eps)

    return div_fn


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    n = math.prod(a.shape[1:])
    return torch.linalg.vecdot(a.reshape(len(a), n), b.reshape(len(b), n))


class _FlowWithDivergence(sampling.ProbabilityFlow):
    """The state with its accumulated divergence: parts ``(x, log density)``."""

    def __init__(self, sde: SDE, score_fn: mutils.ScoreFunction, eps: Tensor) -> None:
        super().__init__(sde, score_fn)
        self.eps, self.eps_squared = eps, _row_dot(eps, eps)

    def terms(self, t: float, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        times = time_vector(t, ys[0])
        with torch.enable_grad():
            x = ys[0].detach().requires_grad_(True)
            if self.fused:
                out = self.score_fn.network(x, self.score_fn.labels(times)).to(x.dtype)
            else:
                out = self.rsde.sde(x, times)[0].to(x.dtype)
            if not out.requires_grad:
                raise ValueError("model: expected an output that is differentiable in x, got one without gradient.")
            (product,) = torch.autograd.grad(out, x, self.eps)
        f, q = self.coefficients_at(t) if self.fused else (0.0, 1.0)
        divergence = f * self.eps_squared + q * _row_dot(product, self.eps)
        return Terms(out.detach(), f, q), Terms(divergence)


def get_likelihood_fn(
    sde: SDE,
    inverse_scaler: Callable[[Any], Any],
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Any = "RK45",
    eps: float = 1e-5,
) -> Callable[[Any, Tensor], tuple[Tensor, Tensor, int]]:
    """``likelihood_fn(model, data)`` -> ``(bpd (B,), z (B, *), nfe)``: bits a dimension of 8-bit data, and the latent
    codes at T.

    Args:
        sde: the forward SDE.
        inverse_scaler: the scaler of the samples; it gives the offset 7 - inverse_scaler(-1) of data scaled to [-1, 1]
            or [0, 1].
        hutchinson_type: law of the divergence estimator's noise, 'Rademacher' or 'Gaussian'.
        rtol, atol, method: as in :func:`scoresde_ext.sampling.get_ode_sampler`. The log densities count in the error
            norm.
        eps: first time.

    ``data`` is ``(B, *)``, float32 or float64 and kept so.

    Raises:
        ValueError: an argument is wrong; before any evaluation. NotImplementedError: another ``hutchinson_type``.
        SolverError: the integration failed, or a likelihood is not finite.
    """
    check_eps(eps, sde.T)
    check_tolerances(rtol, atol)
    if hutchinson_type not in HUTCHINSON:
        raise NotImplementedError(f"hutchinson_type: expected one of {', '.join(HUTCHINSON)}, got {hutchinson_type!r}.")

    def likelihood_fn(model: Any, data: Tensor) -> tuple[Tensor, Tensor, int]:
        check_state("data", data)
        with torch.no_grad():
            if hutchinson_type == "Gaussian":
                epsilon = ops.materialize(noise.normal(data), data)
            else:
                epsilon = noise.integers(2, data).to(data.dtype) * 2 - 1
            score_fn = mutils.get_score_fn(sde, model, train=False, continuous=True)
            parts = (data, data.new_zeros(len(data)))
            drift = _FlowWithDivergence(sde, score_fn, epsilon)
            (z, delta_logp), nfe = sampling.solve_ode(drift, (eps, sde.T), parts, method, rtol, atol, progress=False)
            dimensions = math.prod(data.shape[1:])
            bpd = -(sde.prior_logp(z) + delta_logp) / math.log(2) / dimensions + (7.0 - inverse_scaler(-1.0))
            return sampling.check_finite(bpd, "The likelihood"), z, nfe

    return likelihood_fn
