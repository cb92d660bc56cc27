"""Inpainting and colorization with an unconditional network (Song et al. 2021, appendices I.2, I.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import noise, sampling
from .callers import say_no_gradient, untraced
from .checks import as_it_is, check_array, check_corrector, check_eps, check_flags, check_scaler, check_state
from .foreign import recognised
from .models import utils as mutils
from .ode import InverseScaler
from .reference import rows
from .sampling import (
    NoneCorrector,
    NonePredictor,
    PCLoop,
    shared_corrector_update_fn,
    shared_predictor_update_fn,
)
from .sde_lib import SDE

__all__ = [
    "NoneCorrector",
    "NonePredictor",
    "get_pc_colorizer",
    "get_pc_inpainter",
    "mutils",
    "shared_corrector_update_fn",
    "shared_predictor_update_fn",
]


class _Known:
    """What is known of the data: replaces it in the state after every step, noised to the step's time."""

    def __init__(
        self,
        sde: SDE,
        data: Tensor,
        mask: Tensor,
        decouple: Callable[[Tensor], Tensor],
        couple: Callable[[Tensor], Tensor],
    ) -> None:
        self.sde, self.data, self.mask, self.decouple, self.couple = sde, data, mask, decouple, couple

    def start(self, prior: Tensor) -> Tensor:
        """The known part of the data, and the prior elsewhere. (Upstream masks the prior before it decouples it.)"""
        return self.couple(self.decouple(self.data) * self.mask + self.decouple(prior * (1.0 - self.mask)))

    def merge(self, x: Tensor, known: Tensor) -> Tensor:
        """The known part of ``known``, which is decoupled already, and the rest of ``x``."""
        return self.couple(self.decouple(x) * (1.0 - self.mask) + known * self.mask)

    def put(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The state with the known part at time t, noisy and as its mean. As upstream, the unknown part is the noisy
        one in both."""
        known = self.decouple(self.data)
        mean, std = recognised(self.sde).marginal_prob(known, t)
        noisy = mean + noise.normal_tensor(x) * rows(std, x)
        return self.merge(x, noisy), self.merge(x, mean)


def _broadcasts(mask: Tensor, data: Tensor) -> bool:
    sizes = zip(reversed(mask.shape), reversed(data.shape), strict=False)
    return mask.dim() <= data.dim() and all(m in (1, d) for m, d in sizes)


# Gray is the first coordinate of an orthonormal basis of colour space; the other two are found by QR from the gray
# axis.
def _colour_basis() -> Tensor:
    axes = torch.eye(3, dtype=torch.float64)
    axes[:, 0] = 1.0
    basis, upper = torch.linalg.qr(axes)
    return basis * torch.sign(upper.diagonal())


def get_pc_inpainter(
    sde: SDE,
    predictor: type | None,
    corrector: type | None,
    inverse_scaler: InverseScaler | None,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
    *,
    seeds: noise.Seeds = None,
    grid: Sequence[float] | Tensor | None = None,
    progress: bool = False,
) -> Inpainter:
    """``inpainter(model, data, mask, draw=None)`` -> images ``(B, *)``: fills in where ``mask`` is 0 and keeps ``data``
    where it is 1.

    Arguments and errors as in :func:`scoresde_ext.sampling.get_pc_sampler` (eps is smaller by default); ``mask`` has
    the shape of ``data`` or broadcasts to it. With a ``grid``, the known part is at the time to which the predictor
    stepped, and at eps in the end. Where ``mask`` is exactly 0, ``data`` is never looked at and may be NaN.

    Use a corrector. The predictor alone does not let the unknown part see enough of the known one, and its law is
    biased. Example: two Gaussian values of variance 1 and correlation 0.9, the exact score, VPSDE with N = 1000, the
    first known to be 1.5. The second then has the mean 1.35 and the standard deviation 0.44. ``reverse_diffusion``
    alone gives 0.94 and 0.56; with one step of ``langevin``, snr 0.16, it is 1.33 and 0.44.
    """
    steps = (predictor, corrector, snr, n_steps, probability_flow, continuous)
    return Inpainter(sde, steps, inverse_scaler, denoise, eps, seeds, grid, progress)


def get_pc_colorizer(
    sde: SDE,
    predictor: type | None,
    corrector: type | None,
    inverse_scaler: InverseScaler | None,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-5,
    *,
    seeds: noise.Seeds = None,
    grid: Sequence[float] | Tensor | None = None,
    progress: bool = False,
) -> Colorizer:
    """``colorizer(model, gray, draw=None)`` -> images ``(B, 3, H, W)`` for gray images stored in three equal channels.

    Arguments and errors as in :func:`get_pc_inpainter`.
    """
    steps = (predictor, corrector, snr, n_steps, probability_flow, continuous)
    return Colorizer(sde, steps, inverse_scaler, denoise, eps, seeds, grid, progress)


class _Filler:
    """Predictor-corrector sampling of what is not known of the data."""

    def __init__(
        self,
        sde: SDE,
        steps: tuple[type | None, type | None, float, int, bool, bool],
        inverse_scaler: InverseScaler | None,
        denoise: bool,
        eps: float,
        seeds: noise.Seeds,
        grid: Sequence[float] | Tensor | None,
        progress: bool,
    ) -> None:
        predictor, corrector, snr, n_steps, probability_flow, continuous = steps
        recognised(sde)
        scaled, eps = check_scaler(inverse_scaler), check_eps(eps, sde.T)
        snr, n_steps = check_corrector(snr, n_steps)
        sampling.check_classes(predictor, corrector)
        check_flags(probability_flow=probability_flow, continuous=continuous, denoise=denoise, progress=progress)
        self.times = sampling.check_grid(grid, sde, predictor, eps, continuous)
        self.steps = predictor, corrector, snr, n_steps, probability_flow, continuous
        self.sde, self.inverse_scaler, self.denoise, self.eps = sde, scaled, denoise, eps
        self.draws, self.progress = noise.Draws(seeds), progress

    def _fill(self, model: Any, known: _Known, draw: int | None) -> Tensor:
        data = known.data
        say_no_gradient("data", data)
        with torch.no_grad(), self.draws(len(data), draw):
            loop = PCLoop(self.sde, model, *self.steps)
            prior = noise.prior(self.sde, data.shape, data.device).to(data.dtype)
            x = x_mean = known.start(prior)
            with noise.run(data.device):
                for visit in loop.visits(x, self.eps, self.times, self.progress):
                    x, x_mean = known.put(loop.correct(x, visit.t)[0], visit.t)
                    x, x_mean = known.put(visit.predict(x)[0], visit.after)
            result = sampling.check_finite(x_mean if self.denoise else x, "Controllable generation")
            return self.inverse_scaler(result)


class Inpainter(_Filler):
    """What :func:`get_pc_inpainter` returns."""

    @untraced
    def __call__(self, model: Any, data: Tensor, mask: Tensor, *, draw: int | None = None) -> Tensor:
        check_array("data", data)
        check_state("mask", mask)
        if not _broadcasts(mask, data) or mask.device != data.device:
            raise ValueError(
                f"mask: expected the shape and device of data, {tuple(data.shape)} on {data.device}, "
                f"got {tuple(mask.shape)} on {mask.device}."
            )
        mask = mask.to(data.dtype)
        data = torch.where(mask == 0, 0.0, data)  # what is unknown may be NaN
        check_state("data", data)
        return self._fill(model, _Known(self.sde, data, mask, as_it_is, as_it_is), draw)


class Colorizer(_Filler):
    """What :func:`get_pc_colorizer` returns."""

    @untraced
    def __call__(self, model: Any, gray: Tensor, *, draw: int | None = None) -> Tensor:
        check_state("gray", gray)
        if gray.dim() < 2 or gray.shape[1] != 3:
            raise ValueError(f"gray: expected images of three equal channels, (B, 3, H, W), got {tuple(gray.shape)}.")
        basis = _COLOUR_BASIS.to(gray.device, gray.dtype)
        mask = torch.zeros_like(gray)
        mask[:, 0] = 1.0

        def decouple(x: Tensor) -> Tensor:
            return torch.einsum("bi...,ij->bj...", x, basis)

        def couple(x: Tensor) -> Tensor:
            return torch.einsum("bi...,ij->bj...", x, basis.T)

        return self._fill(model, _Known(self.sde, gray, mask, decouple, couple), draw)


_COLOUR_BASIS = _colour_basis()
