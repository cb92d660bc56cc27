"""Adaptive solvers of others, each with its own defaults. ``f(x, t)`` takes and returns ``(B, *)``, with ``t`` of
shape ``(B,)`` in the dtype of ``x``; all return the state at the end of ``span``."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Derivative = Callable[[Tensor, Tensor], Tensor]
Span = tuple[float, float]


def scipy_rk45(f: Derivative, span: Span, z: Tensor, rtol: float, atol: float, method: str = "RK45") -> Tensor:
    """As score_sde_pytorch samples: the batch is one long float64 vector in numpy, and becomes a tensor in each
    evaluation."""
    from scipy.integrate import solve_ivp  # imported where it is used: a machine with a GPU may lack it

    def derivative(t: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat.reshape(z.shape)).to(z.device, z.dtype)
        return f(x, torch.ones(len(z), dtype=z.dtype, device=z.device) * t).cpu().numpy().reshape(-1)

    flat = z.cpu().numpy().reshape(-1)
    solution = solve_ivp(derivative, span, flat, method=method, rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"scipy stopped at t = {solution.t[-1]:g}: {solution.message}")
    return torch.from_numpy(solution.y[:, -1].reshape(z.shape)).to(z.device, z.dtype)


def torchdiffeq_dopri5(f: Derivative, span: Span, z: Tensor, rtol: float, atol: float) -> Tensor:
    """One step size for the batch. ``step_t`` makes the last step end at the end: by default torchdiffeq steps past
    it, where std(t) is not a number, and interpolates."""
    import torchdiffeq  # as above

    times = torch.tensor(span, dtype=torch.float64, device=z.device)

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        return f(x, t.to(x.dtype).expand(len(x)))

    states = torchdiffeq.odeint(
        derivative, z, times, method="dopri5", rtol=rtol, atol=atol, options={"step_t": times[1:]}
    )
    return states[-1]


def torchode_dopri5(f: Derivative, span: Span, z: Tensor, rtol: float, atol: float) -> Tensor:
    """A step size for each sample; all are evaluated until the slowest is done."""
    import torchode  # as above

    size = math.prod(z.shape[1:])

    def derivative(t: Tensor, flat: Tensor) -> Tensor:
        return f(flat.reshape(z.shape), t.to(flat.dtype)).reshape(-1, size)

    term = torchode.ODETerm(derivative)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), torchode.IntegralController(atol, rtol, term=term))
    start, end = (torch.full((len(z),), t, dtype=torch.float64, device=z.device) for t in span)
    solution = solver.solve(torchode.InitialValueProblem(z.reshape(-1, size), start, end))
    if bool((solution.status != torchode.Status.SUCCESS.value).any()):
        raise RuntimeError(f"torchode stopped with status {solution.status.tolist()}")
    return solution.ys[:, -1].reshape(z.shape)
