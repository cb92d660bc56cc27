"""Calibrated grids: better than what they start from, on samples they have not seen; saved, loaded and refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import SDES, gaussian
from torch import Tensor

from scoresde_ext import noise, sampling, sde_lib
from scoresde_ext.sampling import Grid, calibrate_grid

MEANS = torch.tensor([[1.5, 0.0, -1.0], [-1.0, 1.0, 0.5], [0.0, -1.5, 1.0]], dtype=torch.float64)
SPREAD = 0.2


def mixture_network(sde: sde_lib.AffineSDE) -> Any:
    """Three Gaussians in three dimensions, with the labels and the output of upstream's networks."""
    exploding = isinstance(sde, sde_lib.VESDE)

    def network(x: Tensor, labels: Tensor) -> Tensor:
        m, s = (torch.ones_like(labels), labels) if exploding else sde.marginal_coefficients(labels / 999)
        variance = ((m * SPREAD) ** 2 + s**2)[:, None]
        apart = x.double()[:, None] - m[:, None, None] * MEANS
        weight = torch.softmax(-apart.square().sum(-1) / (2 * variance), 1)
        score = -(weight[..., None] * apart).sum(1) / variance
        return (score if exploding else -score * s[:, None]).to(x.dtype)

    return network


@pytest.fixture(scope="module")
def vp_grid() -> Grid:
    sde = sde_lib.VPSDE()
    return calibrate_grid(sde, mixture_network(sde), (1, 3), nfe=12, samples=32, device="cpu")


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_better_than_even_steps(name: str) -> None:
    """Steps even in the angle are what needs no calibration. Samples of another seed than the calibration's."""
    sde = SDES[name]
    network = mixture_network(sde)
    grid = calibrate_grid(sde, network, (1, 3), nfe=12, samples=32, device="cpu")
    assert grid.nfe == 12 and grid.times[0] == 1.0 and grid.times[-1] == 1e-3
    with noise.seeds(99, range(64)):
        z = noise.prior(sde, (64, 3), "cpu").double()
    common: dict[str, Any] = {"device": "cpu", "method": "unipc"}

    def samples(**options: Any) -> Tensor:
        sampler = sampling.get_ode_sampler(sde, (64, 3), lambda x: x, **common, **options)
        solution = sampler.solve(network, z)
        assert solution.nfe == 12 or "rtol" in options
        return solution.y

    right = samples(rtol=1e-9, atol=1e-9, order=4)
    calibrated, even = (
        (samples(**o) - right).square().mean().sqrt() for o in ({"grid": grid}, {"steps": 12, "order": 4})
    )
    assert calibrated < 0.5 * even
    # The error it states is that of 32 other samples.
    assert 0.2 < grid.rms_held_out / calibrated < 5


def test_save_and_load(vp_grid: Grid, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    vp_grid.save(path)
    assert Grid.load(path) == Grid.load(path, sde_lib.VPSDE(N=7)) == vp_grid
    assert [p.name for p in tmp_path.iterdir()] == ["grid.json"]


@pytest.mark.parametrize("other", [sde_lib.subVPSDE(), sde_lib.VESDE(), sde_lib.VPSDE(beta_max=19.0)], ids=type)
def test_another_sde_is_refused(vp_grid: Grid, other: sde_lib.AffineSDE, tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    vp_grid.save(path)
    with pytest.raises(
        ValueError, match=f"grid: expected the SDE it was calibrated for, VPSDE.*{type(other).__name__}"
    ):
        Grid.load(path, other)
    sampler = sampling.get_ode_sampler(other, (2, 3), lambda x: x, device="cpu", method="unipc", grid=vp_grid)
    with pytest.raises(ValueError, match="grid: expected"):
        sampler(mixture_network(other))


@pytest.mark.parametrize(
    "change", [{"times": [1.0]}, {"times": [0.1, 0.5]}, {"order": 7}, {"format": "other"}, {"log_snr": None}], ids=str
)
def test_what_is_no_grid_is_refused(vp_grid: Grid, change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    vp_grid.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"path: expected a grid written by Grid\.save"):
        Grid.load(path)


def test_arguments(vp_grid: Grid) -> None:
    sde = sde_lib.VPSDE()

    def never(x: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError("the network was called")

    for name, value in (("nfe", 4), ("nfe", 10.0), ("order", 0), ("order", 5), ("samples", 1), ("eps", 2.0)):
        with pytest.raises(ValueError, match=f"^{name}:"):
            calibrate_grid(sde, never, (1, 3), **({"nfe": 10, "device": "cpu"} | {name: value}))
    with pytest.raises(ValueError, match="calibrated for method='unipc'"):
        sampling.get_ode_sampler(sde, (2, 3), lambda x: x, device="cpu", grid=vp_grid)(never)


def test_same_seed_same_grid() -> None:
    sde = SDES["own"]
    grids = [calibrate_grid(sde, gaussian(sde), (1, 2), nfe=6, samples=4, seed=s, device="cpu") for s in (3, 3, 4)]
    assert grids[0] == grids[1] != grids[2]
    assert dataclasses.replace(grids[0], rms=0.0) != grids[0]
