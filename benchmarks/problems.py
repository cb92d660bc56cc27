"""Problems for the ODE solvers: a network in upstream's convention, an SDE, and noise to start from.

Gaussian mixtures have their score in closed form and are solved in float64. The digits network was trained for the VP
SDE, and is used for sub-VP and VE too: what it estimates, the picture in noise, depends on the ratio of the two alone.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde_ext.sde_lib import VESDE, VPSDE, AffineSDE, subVPSDE

from .baselines import SDES, Formulas, flow_drift

Network = Callable[[Tensor, Tensor], Tensor]

KINDS: dict[str, tuple[str, Callable[[], AffineSDE], float]] = {  # name, SDE, and upstream's last time
    "vp": ("VP", VPSDE, 1e-3),
    "subvp": ("sub-VP", subVPSDE, 1e-3),
    "ve": ("VE", VESDE, 1e-5),
}
DIGITS = Path(__file__).parent.parent / "examples" / "digits"
SEED = 2011_13456  # of the noise: no other part of the package uses it


@dataclass(frozen=True)
class Problem:
    """``network(x, labels)`` with upstream's labels and output for ``sde``; ``exact_network`` is the same in float64,
    for the reference. ``z`` ``(B, *)`` is the state at T, in the dtype solvers work in."""

    name: str
    kind: str  # vp, subvp, ve
    network: Network
    exact_network: Network
    z: Tensor
    reference_tolerance: float

    @property
    def sde(self) -> AffineSDE:
        return KINDS[self.kind][1]()

    @property
    def sde_name(self) -> str:
        return KINDS[self.kind][0]

    @property
    def span(self) -> tuple[float, float]:
        return 1.0, KINDS[self.kind][2]

    @property
    def formulas(self) -> Formulas:
        return SDES[self.kind]()

    def derivative(self, network: Network, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt by upstream's formulas."""
        formulas = self.formulas
        return flow_drift(formulas, formulas.score(network, x, t), x, t)


# ---- mixtures ----


@dataclass(frozen=True)
class Mixture:
    """``sum_k w_k N(mu_k, s_k^2 1)``: weights ``(K,)``, means ``(K, D)``, spreads ``(K,)``, all float64."""

    weights: Tensor
    means: Tensor
    spreads: Tensor

    def score(self, x: Tensor, m: Tensor, s: Tensor) -> Tensor:
        """Of the density of ``m x_0 + s z``, for ``x`` ``(B, D)`` and ``m, s`` ``(B,)``: each component stays normal,
        with mean m mu_k and variance v_k = m^2 s_k^2 + s^2."""
        variances = (m[:, None] * self.spreads) ** 2 + s[:, None] ** 2
        offsets = m[:, None, None] * self.means - x[:, None]
        distances = offsets.square().sum(2)
        log_densities = self.weights.log() - 0.5 * (distances / variances + x.shape[1] * variances.log())
        shares = log_densities.softmax(1)
        return ((shares / variances)[:, :, None] * offsets).sum(1)

    def network(self, kind: str) -> Network:
        """The perfect network for an SDE."""
        sde = KINDS[kind][1]()

        def network(x: Tensor, labels: Tensor) -> Tensor:
            if kind == "ve":
                return self.score(x, torch.ones_like(labels), labels)
            m, s = sde.marginal_coefficients(labels / 999)
            return -s[:, None] * self.score(x, m, s)

        return network


def mixture(dimension: int, components: int, seed: int) -> Mixture:
    """Means uniform in [-1, 1]^D as pixels are, spreads from 0.05 to 0.5 on a logarithmic scale."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    weights = 0.5 + uniform(components)
    means = 2.0 * uniform(components, dimension) - 1.0
    spreads = 0.05 * 10.0 ** uniform(components)
    return Mixture(weights / weights.sum(), means, spreads)


MIXTURES = {
    "mixture 2-D": mixture(2, 4, seed=2),
    "mixture 16-D": mixture(16, 6, seed=16),
    "mixture 64-D": mixture(64, 10, seed=64),
}
# Kept back: nothing was tuned on this one, and nothing may be. It is left out unless --kept-back asks for it.
KEPT_BACK = {"kept-back 24-D": mixture(24, 7, seed=2024)}


def mixture_problem(name: str, kind: str, samples: int) -> Problem:
    which = {**MIXTURES, **KEPT_BACK}[name]
    network = which.network(kind)
    z = prior(kind, (samples, which.means.shape[1]), torch.float64)
    return Problem(name, kind, network, network, z, 1e-12)


# ---- digits ----


def digits_network(kind: str) -> nn.Module:
    """The trained U-Net, which sees a scaled state and the log-SNR, behind the marginals, labels and output of another
    SDE. sub-VP's log-SNR runs from where VP's ends, 6.9 in training, on to 9.1."""
    module = _digits_module()
    trained = module.load(DIGITS / "digits-vp.safetensors")
    network = module.DigitsNetwork(kind, trained.arguments["width"])
    network.load_state_dict(trained.state_dict())
    return network.eval().requires_grad_(False)


def _digits_module() -> Any:
    """``examples/digits/network.py``, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("digits_network", DIGITS / "network.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits_problem(kind: str, samples: int) -> Problem:
    z = prior(kind, (samples, 1, 8, 8), torch.float32)
    return Problem("digits", kind, digits_network(kind), digits_network(kind).double(), z, 1e-8)


# ---- all ----


@functools.cache
def problem_of(name: str, kind: str, samples: int) -> Problem:
    """By its name: how processes tell each other of problems."""
    return digits_problem(kind, samples) if name == "digits" else mixture_problem(name, kind, samples)


def prior(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    scale = KINDS[kind][1]().sigma_max if kind == "ve" else 1.0  # type: ignore[attr-defined]
    return scale * torch.randn(*shape, dtype=dtype, generator=generator)


def root_mean_square(x: Tensor) -> Tensor:
    """Of each sample: ``(B,)`` float64."""
    return x.double().square().flatten(1).mean(1).sqrt()
