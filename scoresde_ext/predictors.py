"""Predictors and correctors: one step of the reverse-time SDE, one step of Langevin dynamics (Song et al. 2021,
appendix G).

Every update is ``mean = p x + q out; x = mean + n z`` with one coefficient a sample, which is one kernel. Classes
written for upstream work too: they are made once a run, and whatever they return is taken.

``update_fn`` takes the steps of upstream, T/N or one index of the discrete process. ``step_to`` goes from any time to
any earlier one, as a sampler with a ``grid`` asks for; a predictor of your own takes a grid if it has that method.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import noise, ops, sde_lib
from ._C import host
from .checks import check_corrector, check_inputs, check_step, derived
from .foreign import UnknownSDE, recognised
from .integrate import time_vector
from .models import utils as mutils
from .reference import Draw
from .sde_lib import SDE, ReverseSDE, is_affine, score_terms, sqrt, takes_numbers

ScoreFn = Callable[[Tensor, Tensor], Tensor]

_PREDICTORS: dict[str, type] = {}
_CORRECTORS: dict[str, type] = {}


def register_predictor(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: registers a predictor under ``name`` or its class name; ValueError where the name is taken."""
    return mutils.register_in(_PREDICTORS, "predictor", cls, name)


def register_corrector(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: registers a corrector under ``name`` or its class name; ValueError where the name is taken."""
    return mutils.register_in(_CORRECTORS, "corrector", cls, name)


def get_predictor(name: str) -> type:
    """The predictor registered under ``name``; KeyError that lists the names if there is none."""
    return mutils.look_up(_PREDICTORS, "predictor", name)


def get_corrector(name: str) -> type:
    """The corrector registered under ``name``; KeyError that lists the names if there is none."""
    return mutils.look_up(_CORRECTORS, "corrector", name)


# ---- predictors ----


class Predictor(abc.ABC):
    """One step of the reverse-time SDE.

    Args:
        sde: the forward SDE.
        score_fn: ``score_fn(x, t)``.
        probability_flow: step along the probability-flow ODE instead, without noise.
    """

    # Samplers that have no use for the mean say so to classes of this module, which then return None for it: an array
    # less to write.
    wants_mean = True

    def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False) -> None:
        self.sde = sde
        self.rsde = recognised(sde).reverse(score_fn, probability_flow)
        self.score_fn = score_fn

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, x_mean)`` one step earlier: states ``(B, *)`` with and without the noise of this step; ``t`` is
        ``(B,)``."""

    # A class may also have
    #     def step_to(self, x: Tensor, t: float, earlier: float) -> tuple[Tensor, Tensor]
    # the same for the step from time t to an earlier one, for all samples; 0 stands for the data.


def takes_grid(predictor: type) -> bool:
    """Whether a predictor has a ``step_to`` that goes with its ``update_fn``: not one inherited from a class whose
    ``update_fn``, or a part of it, was replaced."""

    classes = getattr(predictor, "__mro__", ())
    owners = [cls for cls in classes if "step_to" in vars(cls)]
    updates = {"update_fn", "vpsde_update_fn", "vesde_update_fn"}
    return bool(owners) and not any(updates & vars(cls).keys() for cls in classes[: classes.index(owners[0])])


def _times(step: Predictor | Corrector, x: Tensor, t: Tensor) -> Any:
    """``t``, checked; or, where it is seen to be one time for all samples, that number. Coefficients then are numbers
    too: computing them takes microseconds, and a tenth of a millisecond as small tensors."""
    sde = recognised(step.sde)
    at = check_inputs(x, t, sde.T)
    ours = takes_numbers(sde) and getattr(step.score_fn, "sde", sde) is sde
    return at if at is not None and ours and t.dtype == torch.float32 else t


def _fused(rsde: Any) -> bool:
    """Whether the reverse process is known by coefficients."""
    return type(rsde) is ReverseSDE and is_affine(rsde.forward)


def _update(
    step: Predictor | Corrector, x: Tensor, out: Tensor | None, p: Any, q: Any, n: Any, draw: Draw | None = None
) -> Any:
    """``x_mean = p x + q out``, ``x = x_mean + n z`` with a draw of noise, by default the next: ``(x, x_mean)``."""
    draw = noise.normal(x) if draw is None else draw
    if not step.wants_mean:
        return ops.affine_next(x, out, p, q, n, draw), None
    mean, after = ops.affine_noise(x, out, p, q, n, draw)
    return after, mean


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(Predictor):
    """Euler-Maruyama with step T/N (Song et al. 2021, eq. 6 and section 4.1; with probability_flow eq. 13)."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._step(x, t, -self.rsde.T / self.rsde.N)

    def step_to(self, x: Tensor, t: float, earlier: float) -> tuple[Tensor, Tensor]:
        """The step from ``t`` to ``earlier``."""
        t, earlier = check_step(t, earlier, self.sde.T)
        return self._step(x, time_vector(t, x), earlier - t)

    def _step(self, x: Tensor, t: Tensor, dt: float) -> tuple[Tensor, Tensor]:
        at = _times(self, x, t)
        if _fused(self.rsde):
            f, out, q, g = self.rsde.sde_terms(x, t, at)
            return _update(self, x, out, 1.0 + f * dt, q * dt, g * math.sqrt(-dt))
        drift, diffusion = self.rsde.sde(x, t)
        return _update(self, x, drift, 1.0, dt, diffusion * math.sqrt(-dt))


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(Predictor):
    """The reverse of the forward SDE's own discretisation (Song et al. 2021, eq. 46; with probability_flow
    appendix D.3)."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        at = _times(self, x, t)
        if _fused(self.rsde):
            f, out, q, n = self.rsde.discrete_terms(x, t, at)
            return _update(self, x, out, 1.0 - f, -q, n)
        step, n = self.rsde.discretize(x, t)
        return _update(self, x, step, 1.0, -1.0, n)

    def step_to(self, x: Tensor, t: float, earlier: float) -> tuple[Tensor, Tensor]:
        """The same for one step of the forward process from ``earlier`` to ``t``, ``a x + b z``: exact, not that of
        ``discretize``."""
        a, b, out, k = _transition(self, x, t, earlier)
        return _update(self, x, out, 2.0 - a, -self.rsde.score_factor(b) * k, 0.0 if self.rsde.probability_flow else b)


@register_predictor(name="ancestral_sampling")
class AncestralSamplingPredictor(Predictor):
    """Ancestral sampling of DDPM (VP) and its counterpart for SMLD (VE) (Song et al. 2021, eq. 4 and
    eq. 47).

    Raises:
        NotImplementedError: another SDE.
        AssertionError: probability_flow, which it does not have.
    """

    def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False) -> None:
        super().__init__(sde, score_fn, probability_flow)
        if not isinstance(recognised(sde), (sde_lib.VPSDE, sde_lib.VESDE)):
            raise NotImplementedError(
                f"sde: ancestral sampling is known for VPSDE and VESDE, got {type(sde).__name__}."
            )
        if probability_flow:
            raise AssertionError("probability_flow: ancestral sampling has no probability flow. Use reverse_diffusion.")

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        is_ve = isinstance(recognised(self.sde), sde_lib.VESDE)
        return self.vesde_update_fn(x, t) if is_ve else self.vpsde_update_fn(x, t)

    def vpsde_update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`update_fn` for a VP SDE."""
        at = _times(self, x, t)
        sde: Any = recognised(self.sde)
        sde.require_discrete(at, strictly=True)
        beta = sde.discrete_beta(at)
        out, k = score_terms(self.score_fn, x, t, at)
        p = 1.0 / sqrt(1.0 - beta)
        return _update(self, x, out, p, beta * p * k, sqrt(beta))

    def vesde_update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`update_fn` for a VE SDE."""
        at = _times(self, x, t)
        sigma, below = recognised(self.sde).adjacent_sigmas(at)  # type: ignore[attr-defined]
        out, k = score_terms(self.score_fn, x, t, at)
        gain = sigma**2 - below**2
        return _update(self, x, out, 1.0, gain * k, sqrt(below**2 * gain / sigma**2))

    def step_to(self, x: Tensor, t: float, earlier: float) -> tuple[Tensor, Tensor]:
        """The same for one step of the forward process from ``earlier`` to ``t``: ``alpha_i = (m_t / m_earlier)^2``,
        or ``sigma_i = s_t`` and ``sigma_{i-1} = s_earlier``."""
        a, b, out, k = _transition(self, x, t, earlier)
        sde = recognised(self.sde)
        if isinstance(sde, sde_lib.VESDE):
            sigma, below = sde.transition(0.0, t)[1], sde.transition(0.0, earlier)[1] if earlier > 0 else 0.0
            return _update(self, x, out, 1.0, b**2 * k, below * b / sigma)
        return _update(self, x, out, 1.0 / a, b**2 / a * k, b)


@register_predictor(name="none")
class NonePredictor(Predictor):
    """Leaves the state as it is."""

    def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False) -> None:
        pass

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def step_to(self, x: Tensor, t: float, earlier: float) -> tuple[Tensor, Tensor]:
        return x, x


def _transition(predictor: Predictor, x: Tensor, t: float, earlier: float) -> tuple[float, float, Tensor, Any]:
    """``a, b`` of the forward process from ``earlier`` to ``t``, and the score ``k out`` at ``t``."""
    t, earlier = check_step(t, earlier, predictor.sde.T)
    require_transition(predictor)
    times = time_vector(t, x)
    at = _times(predictor, x, times)
    sde: Any = recognised(predictor.sde)
    return *sde.transition(earlier, t), *score_terms(predictor.score_fn, x, times, at)


def require_transition(predictor: Any) -> None:
    """ValueError where a predictor would need the transition of an SDE that does not say what it is."""
    if isinstance(predictor, (ReverseDiffusionPredictor, AncestralSamplingPredictor)) and not _fused(predictor.rsde):
        raise ValueError(
            f"grid: {type(predictor).__name__} expects an affine SDE whose marginal and reverse follow from its "
            f"coefficients, got {type(predictor.sde).__name__}. euler_maruyama takes any SDE."
        )


# ---- correctors ----


class Corrector(abc.ABC):
    """Langevin-like steps at a fixed time.

    Args:
        sde: the forward SDE.
        score_fn: ``score_fn(x, t)``.
        snr: signal-to-noise ratio that sets the step size.
        n_steps: steps a call, from 0 on.
    """

    wants_mean = True

    def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int) -> None:
        recognised(sde)
        self.sde, self.score_fn = sde, score_fn
        self.snr, self.n_steps = check_corrector(snr, n_steps)

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, x_mean)``: states ``(B, *)`` with and without the noise of the last step; ``t`` is ``(B,)``."""

    def _alpha(self, t: Any) -> Any:
        """The factor of the step size: alpha of the discrete VP process, else 1."""
        sde = recognised(self.sde)
        if isinstance(sde, UnknownSDE):
            raise NotImplementedError(f"sde: this corrector has no step size for {type(self.sde).__name__}.")
        return sde.discrete_alpha(t) if isinstance(sde, (sde_lib.VPSDE, sde_lib.subVPSDE)) else 1.0


def _norm_ratio(squares: Tensor, other_squares: Tensor) -> Any:
    """Of norms averaged over the batch."""
    return squares.sqrt().mean() / other_squares.sqrt().mean()


@register_corrector(name="langevin")
class LangevinCorrector(Corrector):
    """Langevin dynamics, ``x_mean = x + e score, x = x_mean + sqrt(2 e) z`` with ``e = 2 alpha (snr |z| / |score|)^2``,
    the norms averaged over the batch (Song et al. 2021, eq. 2, algorithms 4 and 5). alpha of a VP process is 1 -
    beta_i, as upstream has it."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        at = _times(self, x, t)
        x_mean, alpha = x, self._alpha(at)
        for _ in range(self.n_steps):
            out, k = score_terms(self.score_fn, x, t, at)
            draw, noise_squares = ops.squares_of_noise(noise.normal(x), x)
            score_squares = ops.score_loss(out, k, None, 1.0)
            by_torch = isinstance(at, Tensor) or derived(score_squares)  # a number has no derivative
            norm_ratio = _norm_ratio if by_torch else host.norm_ratio
            ratio = self.snr * norm_ratio(noise_squares, score_squares)
            step = 2.0 * alpha * ratio * ratio
            x, x_mean = _update(self, x, out, 1.0, step * k, sqrt(2.0 * step), draw)
        return x, x_mean


@register_corrector(name="ald")
class AnnealedLangevinDynamics(Corrector):
    """Annealed Langevin dynamics of NCSN: ``e = 2 alpha (snr std(t))^2`` (Song and Ermon 2019)."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        at = _times(self, x, t)
        x_mean = x
        sde = recognised(self.sde)
        std = sde.marginal_coefficients(at)[1] if is_affine(sde) else sde.marginal_prob(x, t)[1]
        step = 2.0 * self._alpha(at) * (self.snr * std) ** 2
        n = sqrt(2.0 * step)
        for _ in range(self.n_steps):
            out, k = score_terms(self.score_fn, x, t, at)
            x, x_mean = _update(self, x, out, 1.0, step * k, n)
        return x, x_mean


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """Leaves the state as it is."""

    def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int) -> None:
        pass

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x
