"""Arrays recorded from upstream score_sde_pytorch (README.md beside this file), and how tests read them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoresde_ext import sde_lib

Case = dict[str, Any]
FOLDER = Path(__file__).parent
EPS32 = torch.finfo(torch.float32).eps


@functools.cache
def arrays(section: str) -> dict[str, Tensor]:
    """Every array of a section.  Shared by all tests: do not write into them."""
    with np.load(FOLDER / f"{section}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@functools.cache
def cases(section: str) -> dict[str, Case]:
    """A section's cases by name: every parameter upstream was run with."""
    return {case["case"]: case for case in json.loads((FOLDER / f"{section}.json").read_text())}


def every_case(section: str, where: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    """Parametrise a test by `name`, one test for each case of the section that satisfies `where`."""
    return pytest.mark.parametrize("name", [name for name, case in cases(section).items() if where(case)])


def recorded(section: str, name: str, array: str) -> Tensor:
    """What upstream returned."""
    return arrays(section)[f"{name}/{array}"]


def expected(section: str, name: str, array: str) -> Tensor:
    """What upstream returns once its 1 - exp(...) cancels no digits; most arrays are as recorded.

    "A" was run with exact marginal std, "B" with sub-VP's diffusion exact too; each holds only the arrays that change.
    """
    exact = arrays("exact")
    for variant in ("B", "A"):
        if (found := exact.get(f"{section}/{variant}/{name}/{array}")) is not None:
            return found
    return recorded(section, name, array)


def rounding(section: str) -> dict[str, Case]:
    """By case of "ode" or "likelihood": every nfe rounding alone can lead to, and how far results then lie apart."""
    return json.loads((FOLDER / "exact.json").read_text())[section]


def make_sde(case: Case) -> sde_lib.SDE:
    classes = {"vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE, "ve": sde_lib.VESDE}
    return classes[case["kind"]](case["p0"], case["p1"], N=case["N"])


def make_network(case: Case) -> nn.Module:
    classes = {"gauss": networks.GaussianModel, "mix": networks.MixtureModel}
    return classes[case["model"]](case["label_mode"], case["p0"], case["p1"], case["N"], **case["model_args"])


def to_unit_range(x: Tensor) -> Tensor:
    """The inverse scaler of the recorded runs, "(x+1)/2" in the json."""
    return (x + 1) / 2


def assert_rounding(actual: Tensor, wanted: Tensor, roundings: float, scale: float | Tensor | None = None) -> None:
    """|actual - wanted| <= roundings * 2^-23 * scale, element by element.

    `scale` is the size of the numbers the results were computed from: by default each sample's own largest |wanted|.
    """
    __tracebackhide__ = True
    assert actual.shape == wanted.shape, f"shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}"
    if scale is None:
        scale = wanted.abs() if wanted.ndim <= 1 else wanted.abs().flatten(1).amax(1)
    bound = roundings * EPS32 * torch.as_tensor(scale, dtype=torch.float64)
    bound = bound.reshape(-1, *[1] * (wanted.ndim - 1)) if bound.ndim == 1 else bound
    excess = (actual.double() - wanted.double()).abs() / bound.clamp(min=1e-30)
    worst = excess.max().item()
    assert worst <= 1, f"{worst * roundings:.3g} roundings apart, {roundings:g} allowed (nan: not a number)"
