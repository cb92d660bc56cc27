"""Score functions from networks, and the registry of networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import sde_lib
from .._C import host
from ..checks import check_flags, check_inputs, check_sde, traced
from ..integrate.drift import time_vector
from ..reference import rows

Network = Callable[[Tensor, Tensor], Tensor]

_MODELS: dict[str, type] = {}


def register_in(registry: dict[str, type], kind: str, cls: type | None, name: str | None) -> Any:
    """Registers a class under ``name`` or its own name; without ``cls``, the decorator that does. ValueError where the
    name is taken."""

    def register(cls: type) -> type:
        key = cls.__name__ if name is None else name
        if key in registry:
            raise ValueError(f"name: a {kind} {key!r} is already registered ({registry[key]}). Choose another name.")
        registry[key] = cls
        return cls

    return register if cls is None else register(cls)


def register_model(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: registers a network under ``name`` or its class name; ValueError where the name is taken."""
    return register_in(_MODELS, "model", cls, name)


def get_model(name: str) -> type:
    """The network registered under ``name``; KeyError if there is none."""
    return _MODELS[name]


def get_sigmas(config: Any) -> np.ndarray:
    """The noise levels of SMLD, largest first: geometric from ``model.sigma_max`` to ``model.sigma_min`` in
    ``model.num_scales``."""
    model = config.model
    return np.exp(np.linspace(np.log(model.sigma_max), np.log(model.sigma_min), model.num_scales))


def get_ddpm_params(config: Any) -> dict[str, Any]:
    """The tables of DDPM for ``model.{beta_min, beta_max, num_scales}`` (Ho et al. 2020), as float64 arrays."""
    steps = 1000
    # Upstream's scale: betas are those of 1000 steps whatever num_scales says.
    beta_min, beta_max = (
        config.model.beta_min / config.model.num_scales,
        config.model.beta_max / config.model.num_scales,
    )
    betas = np.linspace(beta_min, beta_max, steps, dtype=np.float64)
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas, axis=0)
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_1m_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "beta_min": beta_min * (steps - 1),
        "beta_max": beta_max * (steps - 1),
        "num_diffusion_timesteps": steps,
    }


def create_model(config: Any) -> nn.Module:
    """The network that ``config.model.name`` names, on ``config.device``, in DataParallel as upstream has it."""
    model = get_model(config.model.name)(config).to(config.device)
    return nn.DataParallel(model)


def set_mode(model: Network, train: bool) -> None:
    """Training or evaluation mode for the whole network. Called once a run: the walk over all modules costs
    milliseconds."""
    if isinstance(model, nn.Module):
        model.train(bool(train))  # also where it is numpy's


def ensure_mode(model: Network, train: bool) -> None:
    """Like :func:`set_mode`, but only where the network is in the other mode: for what is called every training
    step."""
    if isinstance(model, nn.Module) and model.training != train:
        model.train(bool(train))


def get_model_fn(model: Network, train: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """``model_fn(x, labels)``: the network in the mode asked for. A plain function is accepted as a network."""
    check_flags(train=train)
    set_mode(model, train)
    return CheckedNetwork(model)


class CheckedNetwork:
    """A network that is given inputs in the dtype of its own parameters, and whose output is checked."""

    def __init__(self, model: Network) -> None:
        if not callable(model) or isinstance(model, type):
            got = f"the class {model.__name__}" if isinstance(model, type) else f"{model!r:.100}"
            raise ValueError(f"model: expected a network, a module or a function of (x, labels), got {got}.")
        self.model = model
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        self.dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.dtype is not None and x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self.dtype is not None and labels.is_floating_point():
            # Labels run to 999: half precision would merge neighbours.
            labels = labels.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        out = self.model(x, labels)
        if not isinstance(out, Tensor) or out.shape != x.shape or not out.is_floating_point():
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"model: expected an output of the shape of its input, floating point {tuple(x.shape)}, got {got}. "
                "A score network maps (x, labels) to one number for each element of x."
            )
        return out


class ScoreFunction:
    """``score(x, t) = k(t) out`` with ``out = network(x, labels(t))``; ``labels`` may be a number, for ``labels * t``.

    Called, it returns the score, shape ``(B, *)``, at states ``x`` and times ``t`` ``(B,)``. :meth:`terms` leaves the
    product to the kernels. ValueError for times and states as in ``marginal_prob``, and for an output of another shape.
    """

    def __init__(
        self,
        sde: sde_lib.SDE,
        network: Network,
        labels: Callable[[Tensor], Tensor] | float,
        coefficient: Callable[[Any], Any],
        predicts_noise: bool = False,
    ) -> None:
        self.sde, self.network, self.coefficient = sde, network, coefficient
        self.labels = labels if callable(labels) else lambda t: t * labels
        self.scale = None if callable(labels) else float(labels)
        self.predicts_noise = predicts_noise  # score = -out / std(t)

    def label(self, t: float, like: Tensor) -> Tensor:
        """The labels of a batch ``like`` that has one time."""
        if self.scale is None or not like.is_cpu or traced():
            return self.labels(time_vector(t, like))
        return self._scaled(t, len(like), like.dtype == torch.float64)

    def _scaled(self, t: float, n: int, is_double: bool) -> Tensor:
        """Labels of n samples on the CPU. The same numbers as a product of tensors, which takes longer than all else
        that a small batch needs between two evaluations: one of float32 numbers in double precision is rounded once."""
        assert self.scale is not None
        return host.filled(n, (t if is_double else float(np.float32(t))) * self.scale, is_double)

    def terms(self, x: Tensor, t: Tensor, at: Any) -> tuple[Tensor, Any]:
        """``(out, k)``; k at the time ``at``, ``t`` itself or the number that all of it is, on the CPU."""
        one = self.scale is not None and not isinstance(at, Tensor)
        labels = self._scaled(at, len(t), t.dtype == torch.float64) if one else self.labels(t)
        return self.network(x, labels), self.coefficient(at)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        check_inputs(x, t, self.sde.T)
        out, k = self.terms(x, t, t)
        return (rows(k, out) * out).to(x.dtype)


def get_score_fn(sde: sde_lib.SDE, model: Network, train: bool = False, continuous: bool = False) -> ScoreFunction:
    """The score function of a network for ``sde``. Sets the network's mode once, now.

    The network's labels and the score's coefficient are upstream's: VP and sub-VP label 999 t and score = -out / std;
    VP trained on discrete steps label t (N - 1) and the discrete std; VE label sigma(t), or the index from the largest
    sigma down, and score = out. For a user's own SDE the network is taken to return the score at label t.

    Args:
        sde: VPSDE, subVPSDE, VESDE or the user's own.
        model: a module or function ``model(x, labels)``.
        train: mode of the network.
        continuous: whether the network was trained on continuous times.
    """
    check_sde(sde)
    check_flags(continuous=continuous)
    return make_score_fn(sde, get_model_fn(model, train), continuous)


def make_score_fn(sde: sde_lib.SDE, network: Callable[[Tensor, Tensor], Tensor], continuous: bool) -> ScoreFunction:
    """:func:`get_score_fn` for a network that is in its mode already."""
    if isinstance(sde, (sde_lib.VPSDE, sde_lib.subVPSDE)):
        if continuous or isinstance(sde, sde_lib.subVPSDE):
            std = _marginal_std(sde)
            return ScoreFunction(sde, network, 999, lambda t: -1.0 / std(t), True)

        return ScoreFunction(sde, network, sde.N - 1, lambda t: -1.0 / sde.row("sqrt_1m_alphas_cumprod", t))
    if isinstance(sde, sde_lib.VESDE):
        if continuous:
            return ScoreFunction(sde, network, _marginal_std(sde), lambda t: 1.0)
        return ScoreFunction(sde, network, lambda t: torch.round((sde.T - t) * (sde.N - 1)).long(), lambda t: 1.0)
    return ScoreFunction(sde, network, lambda t: t, lambda t: 1.0)


def _marginal_std(sde: sde_lib.AffineSDE) -> Callable[[Any], Any]:
    """std(t) as a function, also where a subclass gives it by ``marginal_prob`` alone."""
    if sde_lib.is_affine(sde):
        return lambda t: sde.marginal_coefficients(t)[1]
    return lambda t: sde.marginal_prob(torch.zeros_like(t), t)[1]


def to_flattened_numpy(x: Tensor) -> np.ndarray:
    """A flat numpy copy of a tensor, as scipy's solvers want it."""
    return x.detach().cpu().numpy().reshape((-1,))


def from_flattened_numpy(x: np.ndarray, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_flattened_numpy`."""
    assert math.prod(shape) == x.size
    return torch.from_numpy(x.reshape(tuple(shape)))
