"""Probability flows with known answers for any affine SDE: networks that return the score itself, labelled by t."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scoresde_ext import integrate
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.models.utils import CheckedNetwork, ScoreFunction
from scoresde_ext.sde_lib import VESDE, VPSDE, AffineSDE, subVPSDE

Network = Callable[[Tensor, Tensor], Tensor]


class CosineSDE(AffineSDE):
    """A user's own: m = cos(w t), s = sin(w t), so that the angle runs evenly."""

    def __init__(self, w: float = 1.5, N: int = 1000) -> None:
        super().__init__(N)
        self.w = w

    def marginal_coefficients(self, t: Any) -> tuple[Any, Any]:
        return torch.cos(self.w * t), torch.sin(self.w * t)

    def sde_coefficients(self, t: Any) -> tuple[Any, Any]:
        tangent = torch.tan(self.w * t)
        return -self.w * tangent, torch.sqrt(2 * self.w * tangent)


SDES: dict[str, AffineSDE] = {"vp": VPSDE(), "subvp": subVPSDE(), "ve": VESDE(), "own": CosineSDE()}


def flow_of(sde: AffineSDE, network: Network) -> ProbabilityFlow:
    """The flow of a network that returns the score; its labels are the times."""
    return ProbabilityFlow(sde, ScoreFunction(sde, CheckedNetwork(network), lambda t: t, lambda t: 1.0))


def marginal(sde: AffineSDE, t: float) -> tuple[float, float]:
    """m, s at one time."""
    m, s = sde.marginal_coefficients(torch.tensor([t], dtype=torch.float64))
    return float(m), float(s)


def columns(sde: AffineSDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """m and s once for every element of x: exp of an array as long as x, the same whatever row stands where."""
    return sde.marginal_coefficients(t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape).contiguous())


def gaussian(sde: AffineSDE, mean: float = 0.4, spread: float = 0.5) -> Network:
    """The score of data N(mean, spread^2)."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        m, s = columns(sde, x, t)
        return (m * mean - x) / (m * m * spread**2 + s * s)

    return network


def gaussian_solution(sde: AffineSDE, x: Tensor, start: float, end: float, mean: float, spread: float) -> Tensor:
    """The flow of :func:`gaussian`: (x - m mean) / std does not change."""
    (m0, s0), (m1, s1) = marginal(sde, start), marginal(sde, end)
    return m1 * mean + (x - m0 * mean) * math.sqrt((m1**2 * spread**2 + s1**2) / (m0**2 * spread**2 + s0**2))


def mixture(sde: AffineSDE, mean: float = 0.8, spread: float = 0.3) -> Network:
    """The score of data whose elements are +-mean with equal odds, plus noise: not linear in x."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        m, s = columns(sde, x, t)
        variance = m * m * spread**2 + s * s
        return (m * mean * torch.tanh(m * mean * x / variance) - x) / variance

    return network


def arithmetic(x: Tensor, t: Tensor) -> Tensor:
    """Something like a score, of sums, products and quotients: these are rounded the same at any place in an array."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    return (0.5 * (1 - t) * x / (1 + x * x) - x) / (0.1 + t * t)


def prior(sde: AffineSDE, *shape: int, dtype: torch.dtype = torch.float64, T: float = 1.0) -> Tensor:
    m, s = marginal(sde, T)
    return math.hypot(m, s) * torch.randn(shape, dtype=dtype)


def exactly(flow: ProbabilityFlow, span: tuple[float, float], x: Tensor, **options: Any) -> integrate.Solution:
    """To rounding."""
    return integrate.solve(flow, span, x.double(), "DOP853", rtol=1e-12, atol=1e-12, **options)


def _named(*modes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {" ".join(str(v) for v in mode.values()): mode for mode in modes}


CONTROLS, COORDINATES = ("joint", "per_sample"), ("t", "angle")
RK_ADAPTIVE = _named(
    *({"method": "RK45", "control": control, "coordinate": c} for control in CONTROLS for c in COORDINATES),
    *({"method": "RK45", "control": control, "pi": True} for control in CONTROLS),
    {"method": "RK23", "control": "joint", "coordinate": "angle"},
    {"method": "RK23", "control": "per_sample", "coordinate": "t"},
    {"method": "DOP853", "control": "joint", "coordinate": "t"},
    {"method": "DOP853", "control": "per_sample", "coordinate": "angle"},
)
UNIPC_ADAPTIVE = _named(
    *({"method": "unipc", "control": control, "order": 3} for control in CONTROLS),
    {"method": "unipc", "control": "joint", "order": 4},
)
ADAPTIVE = RK_ADAPTIVE | UNIPC_ADAPTIVE
"""Options of ``solve`` by name: every way to choose the steps."""
DENSE = {name: mode for name, mode in ADAPTIVE.items() if mode["method"] != "DOP853"}

STEPS = 24
GRID = [1.0 - 0.99 * i / STEPS for i in range(STEPS)] + [0.01]  # times from 1 to 0.01
FIXED = _named(
    {"method": "euler", "coordinate": "t", "steps": STEPS},
    {"method": "midpoint", "coordinate": "angle", "steps": STEPS},
    {"method": "heun", "coordinate": "t", "steps": STEPS},
    {"method": "rk4", "coordinate": "angle", "steps": STEPS},
    {"method": "DOP853", "coordinate": "t", "steps": STEPS},
    {"method": "unipc", "order": 1, "steps": STEPS},
    {"method": "unipc", "order": 4, "steps": STEPS},
    {"method": "dpmpp_2m", "steps": STEPS},
) | {
    "heun angle grid": {"method": "heun", "coordinate": "angle", "grid": GRID},
    "unipc 3 grid": {"method": "unipc", "order": 3, "grid": GRID},
    "dpmpp_2m grid": {"method": "dpmpp_2m", "grid": GRID},
}
MODES = ADAPTIVE | FIXED
