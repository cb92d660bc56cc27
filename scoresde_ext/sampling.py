"""Samplers: predictor-corrector (Song et al. 2021, appendix G) and probability-flow ODE (section 4.3).

Every update is ``mean = p x + q out; x = mean + n z`` with one coefficient a sample, which is one kernel. Predictors
and correctors written for upstream work too: they are made once a run, and whatever they return is taken.
"""

from __future__ import annotations

import abc
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import integrate, noise, ops, sde_lib
from .checks import (
    bad_rows,
    check_corrector,
    check_eps,
    check_inputs,
    check_latent,
    check_shape,
    check_tolerances,
    name_rows,
)
from .integrate import SolverError, Terms, time_vector
from .models import utils as mutils
from .sde_lib import SDE, ReverseSDE, at_time, is_affine, score_terms

ScoreFn = Callable[[Tensor, Tensor], Tensor]
InverseScaler = Callable[[Tensor], Tensor]

_PREDICTORS: dict[str, type] = {}
_CORRECTORS: dict[str, type] = {}


def register_predictor(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: registers a predictor under ``name`` or its class name; ValueError where the name is taken."""
    return mutils.register_in(_PREDICTORS, "predictor", cls, name)


def register_corrector(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: registers a corrector under ``name`` or its class name; ValueError where the name is taken."""
    return mutils.register_in(_CORRECTORS, "corrector", cls, name)


def get_predictor(name: str) -> type:
    """The predictor registered under ``name``; KeyError if there is none."""
    return _PREDICTORS[name]


def get_corrector(name: str) -> type:
    """The corrector registered under ``name``; KeyError if there is none."""
    return _CORRECTORS[name]


# ---- predictors ----


class Predictor(abc.ABC):
    """One step of the reverse-time SDE.

    Args:
        sde: the forward SDE.
        score_fn: ``score_fn(x, t)``.
        probability_flow: step along the probability-flow ODE instead, without noise.
    """

    def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False) -> None:
        self.sde = sde
        self.rsde = sde.reverse(score_fn, probability_flow)
        self.score_fn = score_fn

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, x_mean)`` one step earlier: states ``(B, *)`` with and without the noise of this step; ``t`` is
        ``(B,)``."""


def _update(x: Tensor, out: Tensor | None, p: Any, q: Any, n: Any) -> tuple[Tensor, Tensor]:
    """``x_mean = p x + q out``, ``x = x_mean + n z`` with the next draw of noise: ``(x, x_mean)``."""
    mean, after = ops.affine_noise(x, out, p, q, n, noise.normal(x))
    return after, mean


@register_predictor(name="euler_maruyama")
class EulerMaruyamaPredictor(Predictor):
    """Euler-Maruyama with step T/N (Song et al. 2021, eq. 6 and section 4.1; with probability_flow eq. 13)."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.sde.T)
        dt = -self.rsde.T / self.rsde.N
        if type(self.rsde) is ReverseSDE and is_affine(self.sde):
            f, out, q, g = self.rsde.sde_terms(x, t)
            return _update(x, out, 1.0 + f * dt, q * dt, g * math.sqrt(-dt))
        drift, diffusion = self.rsde.sde(x, t)
        return _update(x, drift, 1.0, dt, diffusion * math.sqrt(-dt))


@register_predictor(name="reverse_diffusion")
class ReverseDiffusionPredictor(Predictor):
    """The reverse of the forward SDE's own discretisation (Song et al. 2021, eq. 46; with probability_flow
    appendix D.3)."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.sde.T)
        if type(self.rsde) is ReverseSDE and is_affine(self.sde):
            f, out, q, n = self.rsde.discrete_terms(x, t)
            return _update(x, out, 1.0 - f, -q, n)
        step, n = self.rsde.discretize(x, t)
        return _update(x, step, 1.0, -1.0, n)


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
        if not isinstance(sde, (sde_lib.VPSDE, sde_lib.VESDE)):
            raise NotImplementedError(
                f"sde: ancestral sampling is known for VPSDE and VESDE, got {type(sde).__name__}."
            )
        if probability_flow:
            raise AssertionError("probability_flow: ancestral sampling has no probability flow. Use reverse_diffusion.")

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.sde.T)
        out, k = score_terms(self.score_fn, x, t)
        if isinstance(self.sde, sde_lib.VESDE):
            sigma, below = self.sde.adjacent_sigmas(t)
            gain = sigma**2 - below**2
            return _update(x, out, 1.0, gain * k, torch.sqrt(below**2 * gain / sigma**2))
        assert isinstance(self.sde, sde_lib.VPSDE)
        beta = self.sde.discrete_beta(t)
        p = 1.0 / torch.sqrt(1.0 - beta)
        return _update(x, out, p, beta * p * k, torch.sqrt(beta))


@register_predictor(name="none")
class NonePredictor(Predictor):
    """Leaves the state as it is."""

    def __init__(self, sde: SDE, score_fn: ScoreFn, probability_flow: bool = False) -> None:
        pass

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


# ---- correctors ----


class Corrector(abc.ABC):
    """Langevin-like steps at a fixed time.

    Args:
        sde: the forward SDE.
        score_fn: ``score_fn(x, t)``.
        snr: signal-to-noise ratio that sets the step size.
        n_steps: steps a call, from 0 on.
    """

    def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int) -> None:
        self.sde, self.score_fn, self.snr, self.n_steps = sde, score_fn, snr, n_steps

    @abc.abstractmethod
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, x_mean)``: states ``(B, *)`` with and without the noise of the last step; ``t`` is ``(B,)``."""

    def _alpha(self, t: Tensor) -> Any:
        """The factor of the step size: alpha of the discrete VP process, else 1."""
        return self.sde.discrete_alpha(t) if isinstance(self.sde, (sde_lib.VPSDE, sde_lib.subVPSDE)) else 1.0


@register_corrector(name="langevin")
class LangevinCorrector(Corrector):
    """Langevin dynamics, ``x_mean = x + e score, x = x_mean + sqrt(2 e) z`` with ``e = 2 alpha (snr |z| / |score|)^2``,
    the norms averaged over the batch (Song et al. 2021, eq. 2, algorithms 4 and 5). alpha of a VP process is 1 -
    beta_i, as upstream has it."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.sde.T)
        x_mean, alpha = x, self._alpha(t)
        for _ in range(self.n_steps):
            out, k = score_terms(self.score_fn, x, t)
            draw = noise.normal(x)
            score_norm = ops.score_loss(out, k, None, 1.0).sqrt().mean()
            noise_norm = ops.score_loss(x, None, 1.0, 1.0, draw).sqrt().mean()
            step = 2.0 * alpha * (self.snr * noise_norm / score_norm) ** 2
            x_mean, x = ops.affine_noise(x, out, 1.0, step * k, torch.sqrt(2.0 * step), draw)
        return x, x_mean


@register_corrector(name="ald")
class AnnealedLangevinDynamics(Corrector):
    """Annealed Langevin dynamics of NCSN: ``e = 2 alpha (snr std(t))^2`` (Song and Ermon 2019)."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.sde.T)
        x_mean = x
        std = self.sde.marginal_coefficients(t)[1] if is_affine(self.sde) else self.sde.marginal_prob(x, t)[1]
        step = 2.0 * self._alpha(t) * (self.snr * std) ** 2
        n = torch.sqrt(2.0 * step)
        for _ in range(self.n_steps):
            out, k = score_terms(self.score_fn, x, t)
            x, x_mean = _update(x, out, 1.0, step * k, n)
        return x, x_mean


@register_corrector(name="none")
class NoneCorrector(Corrector):
    """Leaves the state as it is."""

    def __init__(self, sde: SDE, score_fn: ScoreFn, snr: float, n_steps: int) -> None:
        pass

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


# ---- one step as a function ----


def shared_predictor_update_fn(
    x: Tensor, t: Tensor, sde: SDE, model: Any, predictor: type | None, probability_flow: bool, continuous: bool
) -> tuple[Tensor, Tensor]:
    """One predictor step of ``model``; None is the predictor that does nothing. Returns ``(x, x_mean)``."""
    score_fn = mutils.get_score_fn(sde, model, train=False, continuous=continuous)
    return (predictor or NonePredictor)(sde, score_fn, probability_flow).update_fn(x, t)


def shared_corrector_update_fn(
    x: Tensor, t: Tensor, sde: SDE, model: Any, corrector: type | None, continuous: bool, snr: float, n_steps: int
) -> tuple[Tensor, Tensor]:
    """The corrector steps of ``model``; None is the corrector that does nothing. Returns ``(x, x_mean)``."""
    score_fn = mutils.get_score_fn(sde, model, train=False, continuous=continuous)
    return (corrector or NoneCorrector)(sde, score_fn, snr, n_steps).update_fn(x, t)


# ---- samplers ----


def check_finite(x: Tensor, what: str) -> Tensor:
    """No silent wrong answer: NaN or Inf at the end of a loop is an error that names the samples."""
    if not x.isfinite().all():
        rows = name_rows(bad_rows(x))
        raise SolverError(f"{what} ended with NaN or Inf in {rows}. The network or the step size (snr, N) is at fault.")
    return x


class PCLoop:
    """Predictor and corrector of one run: made once, with one score function."""

    def __init__(
        self,
        sde: SDE,
        model: Any,
        predictor: type | None,
        corrector: type | None,
        snr: float,
        n_steps: int,
        probability_flow: bool,
        continuous: bool,
    ) -> None:
        score_fn = mutils.get_score_fn(sde, model, train=False, continuous=continuous)
        self.predictor = (predictor or NonePredictor)(sde, score_fn, probability_flow)
        self.corrector = (corrector or NoneCorrector)(sde, score_fn, snr, n_steps)

    def predict(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _with_torch_draws(self.predictor, x, t)

    def correct(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _with_torch_draws(self.corrector, x, t)


def _with_torch_draws(step: Predictor | Corrector, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    if type(step).__module__ == __name__:
        return step.update_fn(x, t)
    with noise.torch_draws():  # a class of the user's own may call torch.randn_like
        return step.update_fn(x, t)


def times_of(sde: SDE, eps: float, device: torch.device | str) -> Tensor:
    """The N times of a predictor-corrector run, from T to eps."""
    return torch.linspace(sde.T, eps, sde.N, device=device)


def bar(times: Tensor, progress: bool) -> Any:
    """The times one by one, with a progress bar on a terminal where asked for."""
    return tqdm(times, disable=None if progress else True, unit="step")


def get_pc_sampler(
    sde: SDE,
    shape: Sequence[int],
    predictor: type | None,
    corrector: type | None,
    inverse_scaler: InverseScaler,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str = "cuda",
    *,
    progress: bool = False,
) -> Callable[[Any], tuple[Tensor, int]]:
    """``sampler(model)`` -> ``(samples, N (n_steps + 1))``: predictor-corrector sampling (Song et al. 2021, algorithm
    1).

    Args:
        sde: the forward SDE; its N is the number of steps.
        shape: ``(B, *)``.
        predictor, corrector: classes, see :func:`get_predictor`; None does nothing.
        inverse_scaler: maps the network's data range to the samples' range.
        snr: signal-to-noise ratio of the corrector.
        n_steps: corrector steps a predictor step.
        probability_flow: predictor along the ODE.
        continuous: whether the network was trained on continuous times.
        denoise: return the last mean, without its noise (appendix G).
        eps: last time.
        device: where to sample.
        progress: a progress bar on a terminal.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: a sample ended as NaN or Inf.
    """
    shape = check_shape(shape)
    check_eps(eps, sde.T)
    check_corrector(snr, n_steps)

    def pc_sampler(model: Any) -> tuple[Tensor, int]:
        with torch.no_grad():
            loop = PCLoop(sde, model, predictor, corrector, snr, n_steps, probability_flow, continuous)
            x = x_mean = noise.prior(sde, shape, device)
            with noise.run(x.device):
                for t in bar(times_of(sde, eps, x.device), progress):
                    vec_t = t.expand(len(x))
                    x, x_mean = loop.correct(x, vec_t)
                    x, x_mean = loop.predict(x, vec_t)
            result = check_finite(x_mean if denoise else x, "Predictor-corrector sampling")
            return inverse_scaler(result), sde.N * (n_steps + 1)

    return pc_sampler


class ProbabilityFlow:
    """The probability-flow ODE ``dx/dt = drift - g^2 score / 2`` (Song et al. 2021, eq. 13) as a right-hand side for
    the integrator."""

    def __init__(self, sde: SDE, score_fn: mutils.ScoreFunction) -> None:
        self.sde, self.score_fn = sde, score_fn
        self.rsde = sde.reverse(score_fn, probability_flow=True)
        # A user's SDE may have replaced reverse(): then only its own drift says what is meant.
        self.fused = is_affine(sde) and type(self.rsde) is ReverseSDE and self.rsde.score_fn is score_fn

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        """``f, q`` with the derivative f x + q out."""
        f, g = self.sde.sde_coefficients(t)  # type: ignore[attr-defined]
        return f, self.rsde.score_factor(g) * self.score_fn.coefficient(t)

    def coefficients_at(self, t: float) -> tuple[float, ...]:
        return at_time(self.coefficients, self.sde, t)  # type: ignore[arg-type]

    def terms(self, t: float, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        (x,) = ys
        times = time_vector(t, x)
        if self.fused:
            return (Terms(self.score_fn.network(x, self.score_fn.labels(times)).to(x.dtype), *self.coefficients_at(t)),)
        return (Terms(self.rsde.sde(x, times)[0].to(x.dtype)),)


def get_ode_sampler(
    sde: SDE,
    shape: Sequence[int],
    inverse_scaler: InverseScaler,
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Any = "RK45",
    eps: float = 1e-3,
    device: torch.device | str = "cuda",
    *,
    progress: bool = False,
) -> Callable[..., tuple[Tensor, int]]:
    """``sampler(model, z=None)`` -> ``(samples, nfe)``: the probability-flow ODE from T to eps (Song et al. 2021,
    section 4.3, eq. 13).

    Args:
        sde: the forward SDE.
        shape: ``(B, *)``.
        inverse_scaler: maps the network's data range to the samples' range.
        denoise: end with one noise-free step of the reverse-diffusion predictor at eps (not counted).
        rtol, atol: tolerances, with scipy's meaning.
        method: ``RK23 RK45 DOP853``, or an adaptive :class:`integrate.Tableau`, run on the device; another name or
            ``OdeSolver`` class of scipy's runs there, slowly.
        eps: last time.
        device: where to sample.
        progress: a progress bar on a terminal.

    ``z`` is the state at T, ``(B, *)``, float32 or float64 and kept so; None draws it from the prior.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: the integration failed; ``.solution`` holds what was reached (None where scipy integrated).
    """
    shape = check_shape(shape)
    check_eps(eps, sde.T)
    check_tolerances(rtol, atol)

    def ode_sampler(model: Any, z: Tensor | None = None) -> tuple[Tensor, int]:
        with torch.no_grad():
            score_fn = mutils.get_score_fn(sde, model, train=False, continuous=True)
            if z is None:
                z = noise.prior(sde, shape, device)
            else:
                check_latent(z, shape, device)
            x, nfe = solve_ode(ProbabilityFlow(sde, score_fn), (sde.T, eps), (z,), method, rtol, atol, progress)
            result = x[0]
            if denoise:
                predictor = ReverseDiffusionPredictor(sde, score_fn, probability_flow=False)
                result = predictor.update_fn(result, time_vector(eps, result))[1]
            return inverse_scaler(result), nfe

    return ode_sampler


def solve_ode(
    drift: Any,
    t_span: tuple[float, float],
    ys: tuple[Tensor, ...],
    method: Any,
    rtol: float,
    atol: float,
    progress: bool,
) -> tuple[tuple[Tensor, ...], int]:
    """Our integrator for the adaptive methods it has, scipy for the others: ``(final parts, nfe)``."""
    if method in integrate.ADAPTIVE or (isinstance(method, integrate.Tableau) and method.errors):
        solution = integrate.solve(drift, t_span, ys, method, rtol=rtol, atol=atol, progress=progress)
        return solution.y, solution.nfe
    return _solve_with_scipy(drift, t_span, ys, method, rtol, atol)


@functools.cache
def _warn_slow(method: str) -> None:
    warnings.warn(
        f"method {method} is scipy's alone: every evaluation copies the state to numpy and back. "
        "RK23, RK45 and DOP853 stay on the device.",
        stacklevel=5,
    )


def _solve_with_scipy(
    drift: Any, t_span: tuple[float, float], ys: tuple[Tensor, ...], method: Any, rtol: float, atol: float
) -> tuple[tuple[Tensor, ...], int]:
    from scipy import integrate as scipy_integrate

    if not isinstance(method, type) and method not in ("Radau", "BDF", "LSODA"):
        raise ValueError(
            f"method: expected RK23, RK45, DOP853, Radau, BDF, LSODA or an OdeSolver class, got {method!r}."
        )
    _warn_slow(str(method))
    sizes = [y.numel() for y in ys]

    def unpack(flat: Any) -> tuple[Tensor, ...]:
        parts = torch.from_numpy(flat).split(sizes)
        return tuple(part.reshape(y.shape).to(y.device, y.dtype) for part, y in zip(parts, ys, strict=True))

    def pack(parts: Sequence[Tensor]) -> Any:
        return torch.cat([part.detach().reshape(-1).double().cpu() for part in parts]).numpy()

    def derivative(t: float, flat: Any) -> Any:
        state = unpack(flat)
        slopes = [ops.affine(y, term.out, term.f, term.q) for y, term in zip(state, drift.terms(t, state), strict=True)]
        packed = pack(slopes)
        if not math.isfinite(packed.sum()):
            rows = name_rows(bad_rows(*slopes))
            raise SolverError(f"The integration stopped: NaN or Inf in {rows} at t = {t:.6g}.")
        return packed

    solution = scipy_integrate.solve_ivp(derivative, t_span, pack(ys), method=method, rtol=rtol, atol=atol)
    if not solution.success:
        raise SolverError(
            f"The integration by scipy's {method} stopped at t = {solution.t[-1]:.6g}: {solution.message}"
        )
    return unpack(solution.y[:, -1].copy()), solution.nfev


def get_sampling_fn(
    config: Any, sde: SDE, shape: Sequence[int], inverse_scaler: InverseScaler, eps: float
) -> Callable[..., tuple[Tensor, int]]:
    """The sampler that ``config.sampling`` asks for (``method`` 'pc' or 'ode', in any case); ValueError for another
    method."""
    sampling = config.sampling
    method = sampling.method.lower()
    if method == "ode":
        return get_ode_sampler(
            sde, shape, inverse_scaler, denoise=sampling.noise_removal, eps=eps, device=config.device
        )
    if method == "pc":
        return get_pc_sampler(
            sde=sde,
            shape=shape,
            predictor=get_predictor(sampling.predictor.lower()),
            corrector=get_corrector(sampling.corrector.lower()),
            inverse_scaler=inverse_scaler,
            snr=sampling.snr,
            n_steps=sampling.n_steps_each,
            probability_flow=sampling.probability_flow,
            continuous=config.training.continuous,
            denoise=sampling.noise_removal,
            eps=eps,
            device=config.device,
        )
    raise ValueError(f"config.sampling.method: expected 'pc' or 'ode', got {sampling.method!r}.")
