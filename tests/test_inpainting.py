"""Inpainting where data are missing, and the law of what it fills in."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde_ext import controllable_generation, sampling, sde_lib

SDE = sde_lib.VPSDE(0.1, 10.0, 20)
DATA = torch.linspace(-1.0, 1.0, 24).reshape(4, 3, 2)
MASK = (torch.arange(24).reshape(4, 3, 2) % 3 != 0).float()


def network(x: Tensor, labels: Tensor) -> Tensor:
    return torch.tanh(x)


def inpaint(data: Tensor, mask: Tensor, corrector: Any = sampling.AnnealedLangevinDynamics, **options: Any) -> Tensor:
    fill = controllable_generation.get_pc_inpainter(
        SDE, sampling.ReverseDiffusionPredictor, corrector, None, 0.16, continuous=True, seeds=0, **options
    )
    return fill(network, data, mask)


@pytest.mark.parametrize("missing", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("shape", ["the data's", "one for all samples"])
def test_what_the_mask_hides_is_never_looked_at(missing: float, shape: str) -> None:
    mask = MASK if shape == "the data's" else MASK[:1]
    holes = DATA.masked_fill(mask == 0, missing)
    assert torch.equal(inpaint(holes, mask), inpaint(DATA * mask, mask))


def test_only_a_mask_of_exactly_zero_hides() -> None:
    """A part of the data counts where the mask is between 0 and 1."""
    mask = MASK.clone()
    mask[1, 0, 0] = 1e-3
    with pytest.raises(ValueError, match="data: expected finite values, got NaN or Inf in sample 1"):
        inpaint(DATA.masked_fill(MASK == 0, math.nan).index_fill(0, torch.tensor([0, 2, 3]), 0.0), mask)
    assert inpaint(DATA.masked_fill(mask == 0, math.nan), mask).isfinite().all()


def test_missing_values_that_are_asked_for_are_named() -> None:
    data = DATA.clone()
    data[2, 1, 0] = math.nan
    assert MASK[2, 1, 0] == 1
    with pytest.raises(ValueError, match="data: expected finite values, got NaN or Inf in sample 2"):
        inpaint(data, MASK)


def test_a_mask_of_another_dtype_leaves_the_data_theirs() -> None:
    filled = inpaint(DATA, MASK.double())
    assert filled.dtype == torch.float32 and torch.equal(filled, inpaint(DATA, MASK))


def test_the_colorizer_takes_no_missing_values() -> None:
    colorizer = controllable_generation.get_pc_colorizer(
        SDE, sampling.ReverseDiffusionPredictor, None, None, 0.16, continuous=True
    )
    gray = torch.zeros(2, 3, 2, 2)
    gray[1] = math.nan
    with pytest.raises(ValueError, match="gray: expected finite values, got NaN or Inf in sample 1"):
        colorizer(network, gray)


@pytest.mark.parametrize(
    ("corrector", "mean", "std"),
    [(None, 0.94, 0.56), (sampling.LangevinCorrector, 1.33, 0.44)],
    ids=["none", "langevin"],
)
def test_the_law_of_what_is_filled_in(corrector: Any, mean: float, std: float) -> None:
    """The numbers of the documentation: given 1.5, the other of two values with correlation 0.9 is N(1.35, 0.19)."""
    sde, size = sde_lib.VPSDE(), 1000
    variances, axes = torch.linalg.eigh(torch.tensor([[1.0, 0.9], [0.9, 1.0]]))

    def exact(x: Tensor, labels: Tensor) -> Tensor:
        m, s = (c[:1] for c in sde.marginal_coefficients(labels / 999))
        return s * (x @ axes / (m * m * variances + s * s)) @ axes.T

    fill = controllable_generation.get_pc_inpainter(
        sde, sampling.ReverseDiffusionPredictor, corrector, None, 0.16, continuous=True, seeds=0
    )
    second = fill(exact, torch.tensor([1.5, math.nan]).repeat(size, 1), torch.tensor([1.0, 0.0]))[:, 1]
    assert second.mean().item() == pytest.approx(mean, abs=4 * std / size**0.5)
    assert second.std().item() == pytest.approx(std, abs=4 * std / (2 * size) ** 0.5)
