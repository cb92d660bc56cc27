"""The log-SNR log(m / s) as a second clock: exact at small times, and its inverse."""

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde_ext import sde_lib


class Cosine(sde_lib.AffineSDE):
    """m = cos(theta), s = sin(theta): a user's own, on a time of its own length."""

    speed = 0.9 * math.pi / 4

    @property
    def T(self) -> float:
        return 2.0

    def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(self.speed * t), torch.sin(self.speed * t)

    def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.speed * torch.tan(self.speed * t)
        return -slope, torch.sqrt(2 * slope)


class SearchedVP(sde_lib.VPSDE):
    """A class outside the module: no formula is taken for granted."""


class SearchedVE(sde_lib.VESDE):
    """Its log-SNR is finite at t = 0, and linear."""


class Cliff(sde_lib.AffineSDE):
    """The log-SNR falls by 8 within a few hundredths of the time: Newton's method overshoots from either side."""

    def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.exp(t + 4 * torch.tanh(100 * (t - 0.4)))

    def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = 1 + 400 / torch.cosh(100 * (t - 0.4)).square()
        return torch.zeros_like(t), self.marginal_coefficients(t)[1] * torch.sqrt(2 * slope)


FORMULAS = [sde_lib.VPSDE(), sde_lib.VPSDE(1.0, 1.0), sde_lib.subVPSDE(), sde_lib.VESDE(), sde_lib.VESDE(0.01, 348.0)]
SEARCHED = [Cosine(10), SearchedVP(), SearchedVE(), Cliff(10)]


def name(sde: Any) -> str:
    return f"{type(sde).__name__}-{'-'.join(str(v) for v in vars(sde).values() if isinstance(v, float))}"


every_sde = pytest.mark.parametrize("sde", [*FORMULAS, *SEARCHED], ids=name)


def times(sde: sde_lib.AffineSDE, n: int = 501) -> Tensor:
    return (1e-5 * (sde.T / 1e-5) ** torch.linspace(0, 1, n, dtype=torch.float64)).clamp(max=sde.T)


def exact(sde: Any, t: float) -> float:
    """log(m / s) with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        u = Decimal(t)
        if isinstance(sde, sde_lib.VESDE):
            low, high = Decimal(sde.sigma_min).ln(), Decimal(sde.sigma_max).ln()
            return float(-(low + u * (high - low)))
        b0, b1 = Decimal(sde.beta_0), Decimal(sde.beta_1)
        log_mean = -u * u * (b1 - b0) / 4 - u * b0 / 2
        variance = 1 - (2 * log_mean).exp()
        return float(log_mean - variance.ln() * (1 if isinstance(sde, sde_lib.subVPSDE) else Decimal("0.5")))


@pytest.mark.parametrize("sde", [*FORMULAS, SearchedVP()], ids=name)
def test_is_exact(sde: Any) -> None:
    """A relative error e of m / s is an error e of its logarithm: a few roundings, also at small times."""
    t = times(sde, 101)
    right = torch.tensor([exact(sde, v) for v in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sde_lib.log_snr(sde, t), right, rtol=4e-16, atol=1e-15)
    floats = torch.tensor([sde_lib.log_snr(sde, v) for v in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(floats, right, rtol=4e-16, atol=1e-15)


@every_sde
def test_inverse(sde: Any) -> None:
    """Two roundings of t, and what the roundings of the log-SNR l stand for: dt = dl 2 s^2 / g^2."""
    t = times(sde)
    log_snr = sde.log_snr(t)
    (_, s), (_, g) = sde.marginal_coefficients(t), sde.sde_coefficients(t)
    slope = 0.5 * (g / s) ** 2
    rounding = 2.0**-52
    bound = rounding * (4 * t + 8 * log_snr.abs().clamp(min=1.0) / slope)
    assert ((sde.time_at(log_snr) - t).abs() <= bound).all()
    floats = torch.tensor([sde.time_at(v) for v in log_snr.tolist()[::25]], dtype=torch.float64)
    assert ((floats - t[::25]).abs() <= bound[::25]).all()
    if not isinstance(sde, sde_lib.VESDE | Cliff):  # where s(0) > 0, the log-SNR knows t to no more than 1e-16 / t
        assert (bound < 1e-13 * t).all()


@every_sde
def test_ends_and_shapes(sde: Any) -> None:
    """Beyond what [0, T] reaches, the end; NaN stays NaN; any shape, and no value depends on its neighbours."""
    assert sde.time_at(-60.0) == sde.T and isinstance(sde.time_at(-60.0), float)
    assert 0 <= sde.time_at(60.0) < 1e-20
    assert math.isnan(sde.time_at(math.nan))
    log_snr = sde.log_snr(times(sde, 12))
    t = sde.time_at(log_snr.reshape(3, 4))
    assert t.shape == (3, 4)
    assert sde.time_at(log_snr[:0]).shape == (0,)
    mixed = torch.cat([log_snr, torch.tensor([math.nan, 60.0, -60.0, 0.0], dtype=torch.float64)])
    # Not bit for bit: a vectorised exp rounds otherwise at the end of an array.
    torch.testing.assert_close(sde.time_at(mixed)[:12], t.flatten(), rtol=1e-10, atol=0)
    assert sde.time_at(mixed)[12].isnan()


def test_at_zero() -> None:
    assert sde_lib.VPSDE().log_snr(0.0) == math.inf
    assert Cosine(10).log_snr(0.0) == math.inf
    assert sde_lib.VPSDE().log_snr(torch.zeros(1, dtype=torch.float64)) == math.inf
    assert SearchedVE().log_snr(0.0) == pytest.approx(math.log(100))


def test_a_log_snr_that_rises_is_refused() -> None:
    class Rises(Cosine):
        speed = 1.2 * math.pi  # beyond pi the sine falls

        def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return torch.ones_like(t), torch.sin(self.speed * t).abs()

    with pytest.raises(ValueError, match="sde: expected a log-SNR .* that falls as t grows, but that of Rises"):
        Rises(10).time_at(0.5)
    with pytest.raises(ValueError, match=r"sde: expected a log-SNR that falls as t grows, but sigma is always 0\.5"):
        sde_lib.VESDE(0.5, 0.5).time_at(0.5)
