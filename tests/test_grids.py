"""Calibrated grids: better than what they start from, on samples they have not seen; saved, loaded and refused."""

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


def mixture_network(sde: sde_lib.AffineSDE, means: Tensor = MEANS) -> Any:
    """Gaussians about ``means``, with the labels and the output of upstream's networks."""
    exploding = isinstance(sde, sde_lib.VESDE)

    def network(x: Tensor, labels: Tensor) -> Tensor:
        m, s = (torch.ones_like(labels), labels) if exploding else sde.marginal_coefficients(labels / 999)
        variance = ((m * SPREAD) ** 2 + s**2)[:, None]
        apart = x.double()[:, None] - m[:, None, None] * means
        weight = torch.softmax(-apart.square().sum(-1) / (2 * variance), 1)
        score = -(weight[..., None] * apart).sum(1) / variance
        return (score if exploding else -score * s[:, None]).to(x.dtype)

    return network


@pytest.fixture(scope="module")
def vp_grid() -> Grid:
    sde = sde_lib.VPSDE()
    return calibrate_grid(sde, mixture_network(sde), (1, 3), nfe=12, samples=32, device="cpu")


def solved(sde: sde_lib.AffineSDE, network: Any, z: Tensor, **options: Any) -> Tensor:
    sampler = sampling.get_ode_sampler(sde, z.shape, lambda x: x, device="cpu", method="unipc", **options)
    solution = sampler.solve(network, z)
    assert "grid" not in options or solution.nfe == options["grid"].nfe
    return solution.y


def prior(sde: sde_lib.SDE, seed: int, ids: range) -> Tensor:
    with noise.seeds(seed, ids):
        return noise.prior(sde, (len(ids), 3), "cpu")


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_better_than_even_steps(name: str) -> None:
    """Steps even in the angle are what needs no calibration; times alone gain something, fitted coefficients more.
    Samples of another seed than the calibration's."""
    sde, z = SDES[name], prior(SDES[name], 99, range(64)).double()
    network = mixture_network(sde)
    right = solved(sde, network, z, rtol=1e-9, atol=1e-9, order=4)

    def median(**options: Any) -> float:
        return (solved(sde, network, z, **options) - right).square().mean(1).sqrt().median().item()

    theory, fitted = (
        median(grid=calibrate_grid(sde, network, (1, 3), nfe=12, samples=32, device="cpu", coefficients=c))
        for c in ("theory", "fitted")
    )
    assert fitted < 0.3 * theory
    assert theory < 0.7 * median(steps=12, order=3)


@pytest.mark.parametrize("coefficients", ["theory", "fitted"])
def test_stated_errors(coefficients: str) -> None:
    """Those of the samples that were fitted to, streams 0 to 31 of the seed, and of the next 32."""
    sde = sde_lib.VPSDE()
    network = mixture_network(sde)
    grid = calibrate_grid(sde, network, (1, 3), nfe=8, samples=32, seed=5, device="cpu", coefficients=coefficients)
    assert (grid.fitted is None) == (coefficients == "theory")
    errors = []
    for ids in (range(32), range(32, 64)):
        z = prior(sde, 5, ids)
        right = solved(sde, network, z.double(), rtol=1e-9, atol=1e-9, order=4)
        errors.append(solved(sde, network, z, grid=grid) - right)
    assert [grid.rms, grid.rms_held_out] == pytest.approx([rms(e) for e in errors], rel=0.01)
    assert grid.median_held_out == pytest.approx(errors[1].square().mean(1).sqrt().median().item(), rel=0.01)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_two_fitted_steps_are_exact_where_the_flow_is_linear(name: str) -> None:
    """For one Gaussian about 0, x_{i+1} is a multiple of x_i, which the coefficients can say and theory's do not."""
    sde, z = SDES[name], prior(SDES[name], 99, range(16))
    network = mixture_network(sde, torch.zeros(1, 3, dtype=torch.float64))
    right = solved(sde, network, z.double(), rtol=1e-9, atol=1e-9, order=4)
    fitted, theory = (
        rms(solved(sde, network, z, grid=grid) - right)
        for grid in (
            calibrate_grid(sde, network, (1, 3), nfe=2, samples=8, device="cpu", coefficients=c)
            for c in ("fitted", "theory")
        )
    )
    assert fitted < 1e-5 < 1e-2 < theory


def test_auto_takes_the_better_one() -> None:
    """Fitted coefficients, unless the samples are too few to tell: three in one dimension are fewer equations than
    there are coefficients."""
    sde = sde_lib.VPSDE()
    for dimensions, samples, fits in ((3, 16, True), (1, 3, False)):
        network = mixture_network(sde, MEANS[:, :dimensions])
        auto, theory, fitted = (
            calibrate_grid(sde, network, (1, dimensions), nfe=24, samples=samples, device="cpu", coefficients=c)
            for c in ("auto", "theory", "fitted")
        )
        assert theory.times == fitted.times
        assert auto == (fitted if fits else theory)


def test_a_saved_grid_is_for_all_to_read(vp_grid: Grid, tmp_path: Path) -> None:
    """As any file that a program opens: what it may be is the user's umask alone."""
    vp_grid.save(tmp_path / "grid.json")
    (tmp_path / "other").touch()
    assert (tmp_path / "grid.json").stat().st_mode == (tmp_path / "other").stat().st_mode


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
    "change",
    [
        {"times": [1.0]},
        {"times": [0.1, 0.5]},
        {"order": 7},
        {"format": "other"},
        {"log_snr": None},
        {"fitted": [[1.0, 2.0]]},
        {"fitted": 3},
        {"more": 1},
    ],
    ids=str,
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

    for name, value in (
        ("nfe", 0),
        ("nfe", 10.0),
        ("order", 0),
        ("order", 5),
        ("samples", 1),
        ("eps", 2.0),
        ("coefficients", "guessed"),
    ):
        with pytest.raises(ValueError, match=f"^{name}:"):
            calibrate_grid(sde, never, (1, 3), **({"nfe": 10, "device": "cpu"} | {name: value}))
    with pytest.raises(ValueError, match="calibrated for method='unipc'"):
        sampling.get_ode_sampler(sde, (2, 3), lambda x: x, device="cpu", grid=vp_grid)(never)


def test_same_seed_same_grid() -> None:
    sde = SDES["own"]
    grids = [calibrate_grid(sde, gaussian(sde), (1, 2), nfe=6, samples=4, seed=s, device="cpu") for s in (3, 3, 4)]
    assert grids[0] == grids[1] != grids[2]
