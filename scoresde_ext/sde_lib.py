"""Stochastic differential equations of score-based generative models (Song et al. 2021, "Score-Based Generative
Modeling through SDEs").

``SDE`` is upstream's abstract class. ``AffineSDE`` is an SDE ``dx = f(t) x dt + g(t) dw``: p(x_t | x_0) is then
Gaussian with mean ``m(t) x_0`` and standard deviation ``s(t)``, and everything that is done with it runs in the fused
kernels. A subclass gives these numbers::

    class Mine(AffineSDE):
        def marginal_coefficients(self, t):  # m, s
        def sde_coefficients(self, t):       # f, g

``t`` is a tensor of shape ``(B,)``, and so are the coefficients. (The classes of this module take Python floats as
well.) Data have shape ``(B, *)``.

A program may bring SDEs of its own copy of upstream's module: :mod:`scoresde_ext.foreign` says how each is read.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import ops
from .checks import check_flags, check_inputs, of_values, real, transformed, whole
from .reference import rows

Time = TypeVar("Time", Tensor, float)


def exp(v: Time) -> Time:
    return v.exp() if isinstance(v, Tensor) else math.exp(v)


def expm1(v: Time) -> Time:
    return v.expm1() if isinstance(v, Tensor) else math.expm1(v)


def asinh(v: Time) -> Time:
    return v.asinh() if isinstance(v, Tensor) else math.asinh(v)


def log1p(v: Time) -> Time:
    return v.log1p() if isinstance(v, Tensor) else math.log1p(v)


def sqrt(v: Time) -> Time:
    return v.sqrt() if isinstance(v, Tensor) else math.sqrt(v)


def check_steps(N: Any) -> int:
    return whole("N", N, 1, expected="a whole number of steps")


class SDE(abc.ABC):
    """An SDE ``dx = drift(x, t) dt + diffusion(t) dw`` on [0, T], discretised in ``N`` steps."""

    def __init__(self, N: int) -> None:
        self.N: int = check_steps(N)

    @property
    @abc.abstractmethod
    def T(self) -> float:
        """End time."""

    @abc.abstractmethod
    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift ``(B, *)`` and diffusion ``(B,)`` at states ``x`` and times ``t`` ``(B,)``. The classes of this module
        raise ValueError for another shape, dtype or device of either, and for a time outside [0, T]; so do
        :meth:`marginal_prob` and :meth:`discretize`."""

    @abc.abstractmethod
    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``(B, *)`` and standard deviation ``(B,)`` of p(x_t | x_0 = x)."""

    @abc.abstractmethod
    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        """A sample of p_T, on the CPU."""

    @abc.abstractmethod
    def prior_logp(self, z: Tensor) -> Tensor:
        """log p_T(z) of each sample, ``(B,)``, in nats."""

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``x_{i+1} = x_i + f + G z_i``: f ``(B, *)`` and G ``(B,)``. Here Euler-Maruyama with step T/N."""
        dt = self.T / self.N
        drift, diffusion = self.sde(x, t)
        return drift * dt, diffusion * math.sqrt(dt)

    def reverse(self, score_fn: Callable[[Tensor, Tensor], Tensor], probability_flow: bool = False) -> ReverseSDE:
        """The reverse-time SDE (Song et al. 2021, eq. 6), or the probability-flow ODE (eq. 13)."""
        return ReverseSDE(self, score_fn, probability_flow)


class ReverseSDE(SDE):
    """``dx = (drift - g^2 score) dt + g dw`` backwards in time; with ``probability_flow`` the score counts half and
    there is no noise."""

    def __init__(
        self, forward: SDE, score_fn: Callable[[Tensor, Tensor], Tensor], probability_flow: bool = False
    ) -> None:
        check_flags(probability_flow=probability_flow)
        self.forward, self.score_fn, self.probability_flow = forward, score_fn, probability_flow

    @property
    def T(self) -> float:
        return self.forward.T

    @property
    def N(self) -> int:  # type: ignore[override]
        return self.forward.N

    def score_factor(self, g: Any) -> Any:
        """What the score is multiplied by in the drift: -g^2, or half of it along the probability flow."""
        return (-0.5 if self.probability_flow else -1.0) * g * g

    def sde_terms(self, x: Tensor, t: Tensor, at: Any = None) -> tuple[Any, Tensor, Any, Any]:
        """``(f, out, q, g)`` with drift f x + q out and diffusion g, where the forward SDE is affine; ``out`` is the
        raw network output where it can be. ``at`` is the number that all times are, if they are one: coefficients then
        are numbers."""
        at = t if at is None else at
        f, g = self.forward.sde_coefficients(at)  # type: ignore[attr-defined]
        out, k = score_terms(self.score_fn, x, t, at)
        return f, out, self.score_factor(g) * k, 0.0 if self.probability_flow else g

    def discrete_terms(self, x: Tensor, t: Tensor, at: Any = None) -> tuple[Any, Tensor, Any, Any]:
        """``(f, out, q, G)`` with ``x_i = x_{i+1} - (f x + q out) + G z``; ``at`` as above."""
        at = t if at is None else at
        f, noise = self.forward.discrete_coefficients(at)  # type: ignore[attr-defined]
        out, k = score_terms(self.score_fn, x, t, at)
        return f, out, self.score_factor(noise) * k, 0.0 if self.probability_flow else noise

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        check_inputs(x, t, self.T)
        if is_affine(self.forward):
            f, out, q, diffusion = self.sde_terms(x, t)
            return ops.affine(x, out, f, q), diffusion
        drift, diffusion = self.forward.sde(x, t)
        drift = drift + rows(self.score_factor(diffusion), x) * self.score_fn(x, t)
        return drift, 0.0 if self.probability_flow else diffusion

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.T)
        if is_affine(self.forward):
            f, out, q, noise = self.discrete_terms(x, t)
            return ops.affine(x, out, f, q), noise if isinstance(noise, Tensor) else torch.zeros_like(t)
        step, noise = self.forward.discretize(x, t)
        step = step + rows(self.score_factor(noise), x) * self.score_fn(x, t)
        return step, torch.zeros_like(noise) if self.probability_flow else noise

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward.marginal_prob(x, t)

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        return self.forward.prior_sampling(shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        return self.forward.prior_logp(z)


def score_terms(
    score_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, at: Any = None
) -> tuple[Tensor, Any]:
    """``(out, k)`` with score = k out: the raw output of the network and its coefficient for the score functions that
    ``models.utils.get_score_fn`` makes, else the score itself and 1. ``at`` is the number that all times are, if they
    are one: k then is a number."""
    terms = getattr(score_fn, "terms", None)
    return (score_fn(x, t), 1.0) if terms is None else terms(x, t, t if at is None else at)


class AffineSDE(SDE):
    """An SDE ``dx = f(t) x dt + g(t) dw``, given by its coefficients; ``f = d log m / dt``, ``g^2 = d s^2 / dt - 2 f
    s^2``.

    A subclass gives :meth:`marginal_coefficients` and :meth:`sde_coefficients`; ``t`` is float32 or float64 ``(B,)``
    and so are the results. (The integrator asks with one float64 time on the CPU: compute from ``t`` and numbers
    alone.) The prior is N(0, 1): override ``prior_sampling`` and ``prior_logp`` where s(T) is another.
    """

    @property
    def T(self) -> float:
        return 1

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__.pop("_tables", None)  # what was kept may follow from this attribute

    @abc.abstractmethod
    def marginal_coefficients(self, t: Any) -> tuple[Any, Any]:
        """``m(t), s(t)``: p(x_t | x_0) = N(m x_0, s^2)."""

    @abc.abstractmethod
    def sde_coefficients(self, t: Any) -> tuple[Any, Any]:
        """``f(t), g(t)``: drift f x, diffusion g."""

    def discrete_coefficients(self, t: Any) -> tuple[Any, Any]:
        """``f, G`` of ``x_{i+1} = x_i + f x_i + G z_i``. Here Euler-Maruyama with step T/N."""
        f, g = self.sde_coefficients(t)
        dt = self.T / self.N
        return f * dt, g * math.sqrt(dt)

    def transition(self, earlier: float, later: float) -> tuple[float, float]:
        """``a, b`` with p(x_later | x_earlier) = N(a x_earlier, b^2), in double precision. Time 0 is the data, m = 1
        and s = 0, also where s(0) is above 0."""
        earlier, later = real("earlier", earlier), real("later", later)
        m, s = at_time(self.marginal_coefficients, self, later)
        m0, s0 = at_time(self.marginal_coefficients, self, earlier) if earlier > 0 else (1.0, 0.0)
        a = m / m0
        return a, math.sqrt(max(s * s - (a * s0) ** 2, 0.0))

    def log_snr(self, t: Any) -> Any:
        """``log(m / s)``, half the logarithm of the signal-to-noise ratio, which falls as t grows: a float for a float,
        a tensor like ``t`` for a tensor ``(B,)``."""
        if isinstance(t, Tensor):
            m, s = self.marginal_coefficients(t)
            return (m / s).log()
        m, s = at_time(self.marginal_coefficients, self, real("t", t))
        return math.log(m / s) if s > 0 else math.inf

    def time_at(self, log_snr: Any) -> Any:
        """The time in [0, T] at which :meth:`log_snr` has this value, or the end next to it: a float for a float, a
        tensor like ``log_snr`` for a float64 tensor of any shape.

        The SDEs of this module have a formula. For others it is found by Newton's method, which takes the derivative
        from :meth:`sde_coefficients`.

        Raises:
            ValueError: the log-SNR does not fall as t grows.
        """
        if not isinstance(log_snr, Tensor):
            log_snr = real("log_snr", log_snr, "a number", lambda v: True)  # of NaN it is NaN
        if takes_numbers(self):  # a subclass may have other coefficients
            t = self._time_at(log_snr)
            return t.clamp(0.0, self.T) if isinstance(t, Tensor) else min(max(t, 0.0), float(self.T))
        if isinstance(log_snr, Tensor):
            return self._search_time(log_snr.flatten()).reshape(log_snr.shape)
        return float(self._search_time(torch.tensor([log_snr], dtype=torch.float64)))

    def _time_at(self, log_snr: Any) -> Any:
        raise NotImplementedError

    def _search_time(self, log_snr: Tensor) -> Tensor:
        """Newton's method in log t, of which the log-SNR is nearly a linear function at small t, within a bracket that
        is halved where Newton's method would leave it, and now and then, should it crawl. A value that is found stays
        as it is while others are sought: none depends on its neighbours."""
        early, late = self._bracket(log_snr)
        t, found = late, torch.zeros_like(log_snr, dtype=torch.bool)
        for i in range(256 if log_snr.is_cpu else 64):
            excess = self.log_snr(t) - log_snr
            early, late = torch.where(excess > 0, t, early), torch.where(excess < 0, t, late)
            (_, s), (_, g) = self.marginal_coefficients(t), self.sde_coefficients(t)
            slope = -0.5 * (g / s).square()  # of the log-SNR: f - (g^2 + 2 f s^2) / (2 s^2)
            newton, middle = t * torch.exp(-excess / (t * slope)), 0.5 * (early + late)
            good = (newton >= early) & (newton <= late) & (newton > 0) & (i % 4 < 3)
            following = torch.where(good, newton, middle)
            # Newton's error is squared at each step: below 1e-8, the step found the last digit.
            at_end = torch.where(good, (newton - t).abs() <= 1e-8 * t, late - early <= 1e-15 * late)
            t, found = torch.where(found, t, following), found | at_end
            if t.is_cpu and of_values(lambda v: bool(v.all()), found):  # elsewhere that would wait for the device
                break
        return torch.where(log_snr.isnan(), log_snr, t)

    def _bracket(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours in a table of times between which the log-SNR takes these values."""
        if log_snr.is_cpu or transformed():
            table = self._falling().to(log_snr.device)
        else:  # made and looked at once
            kept = self.__dict__.setdefault("_tables", {})
            key = "falling", log_snr.device, log_snr.dtype
            if key not in kept:
                kept[key] = self._falling().to(log_snr.device, log_snr.dtype)
            table = kept[key]
        times, rising = table
        index = torch.searchsorted(rising[1:-1].contiguous(), -log_snr)
        return times[index], times[index + 1]

    def _falling(self) -> Tensor:
        """``(2, 66)``: 0, times up to T and T again; and minus the log-SNR at the inner ones."""
        times = self.T * (torch.arange(1, 65, dtype=torch.float64) / 64) ** 4
        table = self.log_snr(times)
        falls = table.diff() < 0
        if not bool(falls.all()):
            t = times[int((~falls).nonzero()[0])]
            raise ValueError(
                f"sde: expected a log-SNR log(m / s) that falls as t grows, but that of {type(self).__name__} does "
                f"not after t = {t:g}."
            )
        columns = torch.stack([times, -table])
        return torch.cat([torch.zeros_like(columns[:, :1]), columns, columns[:, -1:]], 1)

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.T)
        f, g = self.sde_coefficients(t)
        return rows(f, x) * x, g

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.T)
        m, s = self.marginal_coefficients(t)
        return rows(m, x) * x, s

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        check_inputs(x, t, self.T)
        f, noise = self.discrete_coefficients(t)
        return rows(f, x) * x, noise

    def _index(self, t: Any) -> Any:
        """Row of the discrete tables at times ``t``; at a number, that of a float32 tensor."""
        if not isinstance(t, Tensor):
            return int(np.float32(t) * np.float32(self.N - 1) / np.float32(self.T))
        return (t * (self.N - 1) / self.T).long()

    def table(self, name: str, like: Tensor) -> Tensor:
        """The table of the discrete process that is the attribute ``name``, in the dtype of ``like`` and on its device:
        it is moved there once."""
        table = self._checked_table(name)
        if table.device == like.device or torch.compiler.is_compiling() or transformed():
            return table.to(like.device, like.dtype)
        kept = self.__dict__.setdefault("_tables", {})
        key = name, like.device, like.dtype
        if key not in kept or kept[key][0] is not table or kept[key][1] != table._version:
            kept[key] = table, table._version, table.to(like.device, like.dtype)
        return kept[key][2]

    def row(self, name: str, t: Any) -> Any:
        """The entries of a table of the discrete process at times ``t``: a number for a number."""
        if isinstance(t, Tensor):
            return self.table(name, t)[self._index(t)]
        return self._checked_table(name)[self._index(t)].item()

    def _checked_table(self, name: str) -> Tensor:
        return getattr(self, name)

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        return _normal_logp(z, 1.0)


def at_time(coefficients: Callable[[Any], tuple[Any, ...]], sde: AffineSDE, t: float) -> tuple[float, ...]:
    """``coefficients(t)`` of one time for all samples, in double precision. The SDEs of this module compute with
    floats, which is an order of magnitude faster than with tensors of one element; a user's own class is handed a
    tensor."""
    if takes_numbers(sde):
        return coefficients(t)
    return tuple(float(c) for c in coefficients(torch.tensor([t], dtype=torch.float64)))


def log_snr(sde: AffineSDE, t: Any) -> Any:
    """:meth:`AffineSDE.log_snr` of ``sde``."""
    return sde.log_snr(t)


# Names as tuples, and looked up one by one: so torch.compile can follow, of any version.
_AFFINE_METHODS = ("sde", "marginal_prob", "discretize")


def is_affine(sde: Any) -> TypeGuard[AffineSDE]:
    """Whether the coefficients of ``sde`` say everything: an AffineSDE none of whose derived methods was replaced."""
    if type(sde) not in PROCESSES and not (
        isinstance(sde, AffineSDE)
        and all(getattr(type(sde), name) is getattr(AffineSDE, name) for name in _AFFINE_METHODS)
    ):
        return False
    return not any(name in sde.__dict__ for name in _AFFINE_METHODS)


def _normal_logp(z: Tensor, std: float) -> Tensor:
    n = math.prod(z.shape[1:])
    return -n / 2.0 * math.log(2 * math.pi * std**2) - z.square().reshape(z.shape[0], n).sum(1) / (2 * std**2)


class Tabulated(AffineSDE):
    """An SDE with the tables of a discrete process. They follow from its parameters, also when one of these is set
    later: ``sde.N = 100`` makes other tables.

    The first table may be set too, to values of the user's own: the other tables then follow from it, and the
    parameters cannot be changed any more. What would make the tables contradict each other is refused: another table
    (ValueError), or writing into one (ValueError when it is next used).
    """

    PARAMETERS: ClassVar[tuple[str, ...]]
    TABLES: ClassVar[tuple[str, ...]]  # the first one, and those that follow from it
    _own_table = False

    @abc.abstractmethod
    def _first_table(self, *parameters: Any) -> Tensor:
        """Of these values of ``PARAMETERS``; ValueError where one is wrong."""

    def _tables_from(self, first: Tensor) -> tuple[Tensor, ...]:
        """All ``TABLES``; ValueError where no process has this first one."""
        return (first,)

    def __setattr__(self, name: str, value: Any) -> None:
        known = vars(self)
        if name in self.TABLES and name in known:
            self._set_table(name, value)
            return
        if name in self.PARAMETERS:
            value = check_steps(value) if name == "N" else real(name, value)
        parameters = [value if n == name else getattr(self, n, None) for n in self.PARAMETERS]
        follows = name in self.PARAMETERS and None not in parameters and not (name in known and known[name] == value)
        if follows:
            if self._own_table:
                raise ValueError(
                    f"{name}: {self.TABLES[0]} was set by hand and would not follow {name} = {value!r}. Make another "
                    f"{type(self).__name__}."
                )
            with torch.inference_mode(False):  # tensors that count how often they are written to
                tables = self._tables_from(self._first_table(*parameters))
        super().__setattr__(name, value)
        if follows:
            known.update(zip(self.TABLES, tables, strict=True))

    def _set_table(self, name: str, value: Tensor) -> None:
        old = vars(self)[name]
        if not isinstance(value, Tensor) or value.shape != old.shape or value.dtype != old.dtype:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a tensor {old.dtype} {tuple(old.shape)}, got {got}.")
        with torch.inference_mode(False):
            value = value.detach().clone()
            unchanged = torch.allclose(value.cpu(), old.cpu(), rtol=1e-5, atol=0.0, equal_nan=True)
            if unchanged:  # on another device, perhaps
                super().__setattr__(name, value)
            elif name == self.TABLES[0]:
                tables = self._tables_from(value)
                super().__setattr__("_own_table", True)
                vars(self).update(zip(self.TABLES, tables, strict=True))
            else:
                raise ValueError(
                    f"{name}: follows from {self.TABLES[0]}, and the values given do not. Set {self.TABLES[0]} first."
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What was unpickled counts as written to.
        vars(self).update(state | {name: state[name].clone() for name in self.TABLES})

    def _checked_table(self, name: str) -> Tensor:
        table: Tensor = getattr(self, name)
        if not torch.compiler.is_compiling() and table._version:
            raise ValueError(
                f"{name}: was written to, which the rest of {type(self).__name__} would not follow. Set "
                f"{self.TABLES[0]} to another tensor."
            )
        return table


class _DiscreteVP(Tabulated):
    """The discrete noise scale that VP and sub-VP share (Ho et al. 2020)."""

    PARAMETERS = ("beta_0", "beta_1", "N")
    TABLES = ("discrete_betas", "alphas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_1m_alphas_cumprod")

    beta_0: float
    beta_1: float
    discrete_betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_1m_alphas_cumprod: Tensor

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000) -> None:
        super().__init__(N)
        self.beta_0, self.beta_1 = real("beta_min", beta_min), real("beta_max", beta_max)

    def _first_table(self, beta_min: float, beta_max: float, N: int) -> Tensor:
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(
                f"beta_min, beta_max: expected 0 < beta_min <= beta_max < inf, got {beta_min} and {beta_max}."
            )
        return torch.linspace(beta_min / N, beta_max / N, N)

    def _tables_from(self, first: Tensor) -> tuple[Tensor, ...]:
        alphas = 1.0 - first
        products = torch.cumprod(alphas, dim=0)
        return first, alphas, products, torch.sqrt(products), torch.sqrt(1.0 - products)

    def require_discrete(self, t: Any = None, strictly: bool = False) -> None:
        """ValueError where the discrete process does not exist at times ``t`` (None: at one of its N times), because
        N is too small for beta_max: no beta_i may be above 1, nor, ``strictly``, 1."""
        if self.beta_1 < self.N and not self._own_table:
            return
        betas = torch.as_tensor(
            self._checked_table("discrete_betas") if t is None else super().row("discrete_betas", t)
        )
        if bool((betas >= 1 if strictly else betas > 1).any()):
            raise ValueError(
                f"N: the discrete process of {type(self).__name__} expects N > beta_max, so that every beta_i, "
                f"at most beta_max / N, is below 1, got N = {self.N} and beta_max = {self.beta_1}. Raise N, or use "
                "what is continuous: euler_maruyama without corrector, or an ODE sampler."
            )

    def row(self, name: str, t: Any) -> Any:
        self.require_discrete(t)
        return super().row(name, t)

    def discrete_beta(self, t: Any) -> Any:
        """beta of the discrete process at times ``t``."""
        return self.row("discrete_betas", t)

    def discrete_alpha(self, t: Any) -> Any:
        """alpha = 1 - beta of the discrete process at times ``t``."""
        return self.row("alphas", t)

    def beta(self, t: Time) -> Time:
        return self.beta_0 + t * (self.beta_1 - self.beta_0)

    def log_mean(self, t: Time) -> Time:
        """log m(t) = - 1/2 of the integral of beta."""
        return -0.25 * t * t * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def _time_at_log_mean(self, log_mean: Time) -> Time:
        """The root of the quadratic :meth:`log_mean`, in the form that does not cancel."""
        slope = self.beta_1 - self.beta_0
        return -4.0 * log_mean / (self.beta_0 + sqrt(self.beta_0**2 - 4.0 * slope * log_mean))


class VPSDE(_DiscreteVP):
    """Variance preserving: dx = -beta(t)/2 x dt + sqrt(beta(t)) dw (Song et al. 2021, eq. 11; with
    this beta eq. 32, its transition kernel eq. 33).

    Args:
        beta_min, beta_max: beta(0) and beta(1).
        N: discretisation steps; above beta_max where the discrete process is used (ValueError there).

    The parameters are the attributes ``beta_0 beta_1 N``, and may be set later: all that follows from them, the tables
    included, follows.

    Raises:
        ValueError: not 0 < beta_min <= beta_max < inf, or N not a positive whole number.
    """

    def marginal_coefficients(self, t: Any) -> tuple[Any, Any]:
        log_mean = self.log_mean(t)
        return exp(log_mean), sqrt(-expm1(2.0 * log_mean))

    def _time_at(self, log_snr: Any) -> Any:
        return self._time_at_log_mean(-0.5 * log1p(exp(-2.0 * log_snr)))

    def sde_coefficients(self, t: Any) -> tuple[Any, Any]:
        beta = self.beta(t)
        return -0.5 * beta, sqrt(beta)

    def discrete_coefficients(self, t: Any) -> tuple[Any, Any]:
        """DDPM: x_{i+1} = sqrt(alpha_i) x_i + sqrt(beta_i) z_i (Ho et al. 2020; Song et al. 2021,
        eq. 10)."""
        return sqrt(self.discrete_alpha(t)) - 1.0, sqrt(self.discrete_beta(t))


class subVPSDE(_DiscreteVP):
    """Sub-variance preserving: VP's drift, g^2 = beta(t) (1 - exp(-2 integral of beta)) (Song et al. 2021, eq. 12;
    its transition kernel eq. 34). Arguments and errors are those of VPSDE; discretised by Euler-Maruyama."""

    def marginal_coefficients(self, t: Any) -> tuple[Any, Any]:
        log_mean = self.log_mean(t)
        return exp(log_mean), -expm1(2.0 * log_mean)

    def _time_at(self, log_snr: Any) -> Any:
        # m / (1 - m^2) = e^l, so that m = sqrt(1 + r^2) - r = exp(-asinh r) with r = e^-l / 2
        return self._time_at_log_mean(-1.0 * asinh(0.5 * exp(-1.0 * log_snr)))

    def sde_coefficients(self, t: Any) -> tuple[Any, Any]:
        beta = self.beta(t)
        return -0.5 * beta, sqrt(-beta * expm1(4.0 * self.log_mean(t)))


class VESDE(Tabulated):
    """Variance exploding: dx = sigma(t) sqrt(2 log(sigma_max / sigma_min)) dw, sigma(t) geometric (Song et al. 2021,
    eq. 9; with this sigma eq. 30, its transition kernel eq. 31). The prior is N(0, sigma_max^2).

    Args:
        sigma_min, sigma_max: sigma(0) and sigma(1).
        N: discretisation steps.

    Raises:
        ValueError: not 0 < sigma_min <= sigma_max < inf, or N not a positive whole number.
    """

    PARAMETERS = ("sigma_min", "sigma_max", "N")
    TABLES = ("discrete_sigmas",)

    sigma_min: float
    sigma_max: float
    discrete_sigmas: Tensor

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50, N: int = 1000) -> None:
        super().__init__(N)
        self.sigma_min, self.sigma_max = real("sigma_min", sigma_min), real("sigma_max", sigma_max)

    def _first_table(self, sigma_min: float, sigma_max: float, N: int) -> Tensor:
        if not 0 < sigma_min <= sigma_max < math.inf:
            raise ValueError(
                f"sigma_min, sigma_max: expected 0 < sigma_min <= sigma_max < inf, got {sigma_min} and {sigma_max}."
            )
        return torch.exp(torch.linspace(math.log(sigma_min), math.log(sigma_max), N))

    def sigma(self, t: Time) -> Time:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def marginal_coefficients(self, t: Any) -> tuple[Any, Any]:
        return (torch.ones_like(t) if isinstance(t, Tensor) else 1.0), self.sigma(t)

    def _time_at(self, log_snr: Any) -> Any:
        if self.sigma_min == self.sigma_max:
            raise ValueError(f"sde: expected a log-SNR that falls as t grows, but sigma is always {self.sigma_min}.")
        return (-log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)

    def sde_coefficients(self, t: Any) -> tuple[Any, Any]:
        zero = torch.zeros_like(t) if isinstance(t, Tensor) else 0.0
        return zero, self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def discrete_coefficients(self, t: Any) -> tuple[Any, Any]:
        """SMLD: x_{i+1} = x_i + sqrt(sigma_i^2 - sigma_{i-1}^2) z_i, with sigma_{-1} = 0 (Song and Ermon 2019; Song
        et al. 2021, eq. 8)."""
        sigma, below = self.adjacent_sigmas(t)
        return (torch.zeros_like(t) if isinstance(t, Tensor) else 0.0), sqrt(sigma**2 - below**2)

    def adjacent_sigmas(self, t: Any) -> tuple[Any, Any]:
        """The discrete sigma at times ``t`` and the next smaller one, 0 below the first."""
        index = self._index(t)
        if not isinstance(t, Tensor):
            sigmas = self._checked_table("discrete_sigmas")
            sigma, below = (sigmas[i].item() for i in (index, max(index - 1, 0)))
            return sigma, below if index > 0 else 0.0
        sigmas = self.table("discrete_sigmas", t)
        return sigmas[index], torch.where(index == 0, torch.zeros_like(t), sigmas[(index - 1).clamp(min=0)])

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z: Tensor) -> Tensor:
        return _normal_logp(z, self.sigma_max)


PROCESSES: dict[type, tuple[str, str, str]] = {
    VPSDE: ("vp", "beta_0", "beta_1"),
    subVPSDE: ("subvp", "beta_0", "beta_1"),
    VESDE: ("ve", "sigma_min", "sigma_max"),
}


_METHODS = tuple(
    sorted({name for cls in PROCESSES for name in dir(cls) if name[0] != "_" and callable(getattr(cls, name))})
)


def takes_numbers(sde: Any) -> bool:
    """Whether coefficients may be asked for at a Python float: of the classes of this module, not of their
    subclasses."""
    return type(sde) in PROCESSES


def perturbation(sde: AffineSDE, u: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Times ``t = eps + (T - eps) u``, and m and s there: ``(B,)`` each. One kernel for the SDEs of this module as they
    are: as small tensors, the times of a small batch cost as much as its data."""
    known = PROCESSES.get(type(sde))
    if known is None or any(name in sde.__dict__ for name in _METHODS):  # an object may have a method of its own
        t = u * (sde.T - eps) + eps
        return t, *sde.marginal_coefficients(t)
    process, *names = known
    return ops.marginal(u, eps, sde.T, process, *(getattr(sde, name) for name in names))
