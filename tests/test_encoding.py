"""Latent codes and back, and what lies between two of them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import GaussianModel, MixtureModel, per_sample
from torch import Tensor, nn

from scoresde_ext import encoding, sampling, sde_lib
from scoresde_ext.integrate import SolverError, Status

SDES: dict[str, tuple[sde_lib.AffineSDE, str, float, float]] = {
    "vp": (sde_lib.VPSDE(0.1, 20.0), "vp_cont", 0.1, 20.0),
    "subvp": (sde_lib.subVPSDE(0.1, 20.0), "subvp_cont", 0.1, 20.0),
    "ve": (sde_lib.VESDE(0.01, 50.0), "ve_cont", 0.01, 50.0),
}
every_kind = pytest.mark.parametrize("kind", SDES)
EPS = 1e-3
MU, SPREAD = 0.5, 0.25
SOLVERS: dict[str, dict[str, Any]] = {
    "RK45": {},
    "DOP853 by sample": {"method": "DOP853", "control": "per_sample"},
    "RK45 in the angle": {"coordinate": "angle"},
    "unipc": {"method": "unipc", "order": 4, "control": "per_sample"},
}


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian(kind: str) -> nn.Module:
    _, label_mode, p0, p1 = SDES[kind]
    return GaussianModel(label_mode, p0, p1, 1000, MU, SPREAD)


def mixture(kind: str) -> nn.Module:
    _, label_mode, p0, p1 = SDES[kind]
    return MixtureModel(label_mode, p0, p1, 1000, [[1.0, 0.5], [-0.75, 0.25]], [0.25, 0.5], [0.5, 0.5])


def moved(kind: str, x: Tensor, t: float, to: float) -> Tensor:
    """For Gaussian data the flow scales about the mean, by the ratio of the standard deviations of p_t."""
    (m, s), (m1, s1) = (SDES[kind][0].marginal_coefficients(v) for v in (t, to))
    ratio = math.sqrt((m1**2 * SPREAD**2 + s1**2) / (m**2 * SPREAD**2 + s**2))
    return m1 * MU + ratio * (x - m * MU)


def never(x: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("evaluated")


# --- encode and decode ------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("solver", SOLVERS)
def test_codes_of_gaussian_data(kind: str, solver: str) -> None:
    sde, x, tight = SDES[kind][0], normals(5, 2, 3), {"rtol": 1e-8, "atol": 1e-8, "eps": EPS}
    z = encoding.encode(sde, gaussian(kind), x, **tight, **SOLVERS[solver])
    wanted = moved(kind, x, EPS, sde.T)
    assert z.dtype == torch.float64
    # Relative to the largest code: local errors of 1e-8 in some hundred steps.
    assert (z - wanted).abs().max() < 1e-6 * wanted.abs().max()
    back = encoding.decode(sde, gaussian(kind), wanted, **tight, **SOLVERS[solver])
    assert (back - x).abs().max() < 1e-6 * x.abs().max()


@every_kind
@pytest.mark.parametrize("solver", SOLVERS)
def test_there_and_back(kind: str, solver: str) -> None:
    """To the tolerances' error, which falls with them."""
    sde, network, x, errors = SDES[kind][0], mixture(kind), normals(5, 2), []
    for tolerance in (1e-4, 1e-7):
        options: dict[str, Any] = {"eps": EPS, "rtol": tolerance, "atol": tolerance, **SOLVERS[solver]}
        back = encoding.decode(sde, network, encoding.encode(sde, network, x, **options), **options)
        errors.append((back - x).abs().max().item())
    assert errors[1] < 1e-4  # the flow to the data spreads what lies between the components: 1e3 tolerances
    assert errors[1] < 0.1 * errors[0]


def test_sampler_takes_codes() -> None:
    sde, network, x = SDES["vp"][0], mixture("vp"), normals(4, 2, dtype=torch.float32)
    z = encoding.encode(sde, network, x)
    assert z.dtype == torch.float32
    sampler = sampling.get_ode_sampler(sde, x.shape, lambda v: v, device="cpu")
    assert torch.equal(encoding.decode(sde, network, z), sampler(network, z)[0])


@pytest.mark.parametrize("method", ["rk4", "unipc"])
def test_fixed_steps(method: str) -> None:
    """Equal steps, and steps of a grid that runs the way of the integration."""
    sde, x, calls = SDES["vp"][0], normals(4, 3), []

    def network(x: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels[0].item() / 999)
        return gaussian("vp")(x, labels)

    times = [EPS, *(EPS ** (1 - i / 60) for i in range(1, 60)), 1.0]
    wanted = moved("vp", x, EPS, 1.0)
    z = encoding.encode(sde, network, x, eps=EPS, method=method, grid=times)
    assert (z - wanted).abs().max() < 1e-2 * wanted.abs().max()
    assert calls[0] == pytest.approx(EPS)
    back = encoding.decode(sde, network, wanted, eps=EPS, method=method, grid=times[::-1])
    assert (back - x).abs().max() < 1e-2 * x.abs().max()
    calls.clear()
    coordinate, stages = ("angle", 4) if method == "rk4" else ("t", 1)
    z = encoding.encode(sde, network, x, eps=EPS, method=method, coordinate=coordinate, steps=50)
    assert len(calls) == 50 * stages
    assert (z - wanted).abs().max() < 3e-2 * wanted.abs().max()  # UniPC's first step is of first order


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.dropout(self.weight * x)


def test_network_is_used_not_trained() -> None:
    model, x = Dropping(), normals(4, 3, dtype=torch.float32)
    samples = encoding.interpolate(SDES["vp"][0], model, x, x.flip(0), 2)
    assert not model.training
    assert not samples.requires_grad
    torch.testing.assert_close(samples[0], x, rtol=0, atol=1e-3)  # no dropout; solved to 1e-5


def row_wise(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A score of nothing, by additions, products and quotients: these round alike at any place in a batch."""

    def network(x: Tensor, labels: Tensor) -> Tensor:
        labels = per_sample(labels.to(x.dtype), x)
        if kind == "ve":
            return -(x + 0.2 * x.flip(1) / (1 + x * x)) / (1 + labels * labels)
        return 0.1 * x + 0.2 * x.flip(1) / (1 + x * x) * labels / (1 + labels)

    return network


@every_kind
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    sde, model, options = SDES[kind][0], row_wise(kind), {"control": "per_sample", "rtol": 1e-4, "atol": 1e-4}
    a, b = normals(13, 3, dtype=torch.float32), normals(13, 3, seed=1, dtype=torch.float32)
    codes = encoding.encode(sde, model, a, **options)
    between = encoding.interpolate(sde, model, a, b, 3, **options)
    for ids in ([4], [12, 0, 5], list(reversed(range(13)))):
        assert torch.equal(encoding.encode(sde, model, a[ids], **options), codes[ids])
        part = encoding.interpolate(sde, model, a[ids], b[ids], 3, **options)
        assert torch.equal(part, between[:, ids])


# --- failures ---------------------------------------------------------------------------------------------------------


def nan_for_large(x: Tensor, labels: Tensor) -> Tensor:
    """NaN in samples that have a value above 50."""
    return torch.where(per_sample(x.abs().flatten(1).amax(1) > 50, x), math.nan, 0.1 * x)


def test_failed_samples_are_named_and_the_others_finished() -> None:
    sde, x = SDES["vp"][0], normals(4, 3)
    x[1] = 100.0
    with pytest.raises(SolverError, match=r"sample 1\b.*NaN") as raised:
        encoding.encode(sde, nan_for_large, x, control="per_sample")
    z = encoding.encode(sde, nan_for_large, x, control="per_sample", on_failure="status")
    others = [0, 2, 3]
    healthy = encoding.encode(sde, nan_for_large, x[others], control="per_sample")
    assert raised.value.solution is not None
    assert raised.value.solution.status.tolist() == [0, Status.NOT_FINITE, 0, 0]
    for codes in (raised.value.solution.y, z):
        assert codes[1].isnan().all()
        assert torch.equal(codes[others], healthy)
    with pytest.raises(ValueError, match=r"latents.*sample 1\b"):
        encoding.decode(sde, never, z)


def test_interpolation_says_where_it_failed() -> None:
    sde, a, b = SDES["vp"][0], normals(3, 2), normals(3, 2, seed=1)
    b[1] = 100.0
    with pytest.raises(SolverError, match=r"encoding a and b.*sample 4\b"):
        encoding.interpolate(sde, nan_for_large, a, b)
    seen: list[float] = []

    def breaks_on_the_way_back(x: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels[0].item())
        down = max(seen) > 998 and labels[0] < 500
        return torch.full_like(x, math.nan) if down else 0.1 * x

    with pytest.raises(SolverError, match=r"decoding.*NaN"):
        encoding.interpolate(sde, breaks_on_the_way_back, a, a)


@pytest.mark.parametrize(
    ("argument", "options"),
    [("eps", {"eps": 0.0}), ("eps", {"eps": 1.0}), ("rtol", {"rtol": -1.0}), ("method", {"method": "RK99"}),
     ("control", {"control": "each"}), ("coordinate", {"coordinate": "s"}), ("order", {"method": "unipc", "order": 5})],
    ids=str,
)  # fmt: skip
def test_bad_arguments(argument: str, options: dict[str, Any]) -> None:
    sde, x = SDES["vp"][0], normals(4, 3)
    for call in (
        lambda: encoding.encode(sde, never, x, **options),
        lambda: encoding.decode(sde, never, x, **options),
        lambda: encoding.interpolate(sde, never, x, x, **options),
    ):
        with pytest.raises(ValueError, match=rf"\b{argument}\b"):
            call()


@pytest.mark.parametrize(
    "bad", [torch.ones(3, 3).long(), torch.tensor(1.0), torch.full((2, 2), math.nan), [1.0]], ids=str
)
def test_bad_data(bad: Any) -> None:
    sde, x = SDES["vp"][0], normals(4, 3)
    for name, call in (
        ("data", lambda: encoding.encode(sde, never, bad)),
        ("latents", lambda: encoding.decode(sde, never, bad)),
        ("a", lambda: encoding.interpolate(sde, never, bad, x)),
        ("b", lambda: encoding.interpolate(sde, never, x, bad)),
    ):
        with pytest.raises(ValueError, match=rf"\b{name}:"):
            call()


@pytest.mark.parametrize("b", [normals(3, 3), normals(4, 3).float(), normals(4, 3, 1)], ids=["batch", "dtype", "shape"])
def test_ends_have_to_match(b: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\bb:"):
        encoding.interpolate(SDES["vp"][0], never, normals(4, 3), b)


@pytest.mark.parametrize("weights", [1, 0, True, [], [0.5, 1.5], [-0.1], [math.nan], ["half"], None, 0.5], ids=str)
def test_bad_weights(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"\bweights\b"):
        encoding.interpolate(SDES["vp"][0], never, normals(4, 3), normals(4, 3), weights)


# --- interpolation ----------------------------------------------------------------------------------------------------


@every_kind
def test_interpolation_of_gaussian_data(kind: str) -> None:
    """Along the great circle of the codes, which are known."""
    sde, a, b = SDES[kind][0], normals(3, 2, 4), normals(3, 2, 4, seed=1)
    options: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8, "eps": EPS}
    samples = encoding.interpolate(sde, gaussian(kind), a, b, [0.0, 0.3, 1.0], **options)
    assert samples.shape == (3, 3, 2, 4)
    z_a, z_b = (moved(kind, v, EPS, sde.T) for v in (a, b))
    cosine = nn.functional.cosine_similarity(z_a.flatten(1), z_b.flatten(1))
    theta = per_sample(cosine.acos(), a)
    middle = (torch.sin(0.7 * theta) * z_a + torch.sin(0.3 * theta) * z_b) / torch.sin(theta)
    for actual, wanted in zip(samples, (a, moved(kind, middle, sde.T, EPS), b), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)  # solved to 1e-8, there and back


@pytest.mark.parametrize(
    "weights", [5, [0.0, 0.25, 0.5, 0.75, 1.0], torch.linspace(0, 1, 5)], ids=["n", "list", "tensor"]
)
def test_weights(weights: Any) -> None:
    sde, a, b = SDES["vp"][0], normals(2, 3), normals(2, 3, seed=1)
    loose: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    samples = encoding.interpolate(sde, gaussian("vp"), a, b, weights, **loose)
    assert torch.equal(samples, encoding.interpolate(sde, gaussian("vp"), a, b, [i / 4 for i in range(5)], **loose))
    assert samples.shape == (5, 2, 3)


def test_slerp_turns_at_constant_speed() -> None:
    a = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 2.0, 0.0], [0.0, -1.5, 1.5 * math.sqrt(3)]], dtype=torch.float64)  # 90 and 120 degrees on
    for w in (0.1, 0.5, 0.8):
        angles = [w * math.pi / 2, w * math.pi * 2 / 3]
        wanted = torch.tensor(
            [[2 * math.cos(angles[0]), 2 * math.sin(angles[0]), 0.0],
             [0.0, 3 * math.cos(angles[1]), 3 * math.sin(angles[1])]], dtype=torch.float64,
        )  # fmt: skip
        torch.testing.assert_close(encoding.slerp(a, b, w), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 3, 4), (6, 1), (6,), (0, 3), (6, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slerp_ends_are_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = normals(*shape, dtype=dtype), normals(*shape, seed=1, dtype=dtype)
    assert torch.equal(encoding.slerp(a, b, 0.0), a)
    assert torch.equal(encoding.slerp(a, b, 1.0), b)


def test_slerp_on_a_line_is_linear() -> None:
    a = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[1.0, 2.0], [3.0, 6.0], [-1.0, -2.0], [1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(encoding.slerp(a, b, 0.25), 0.75 * a + 0.25 * b)
    opposite = encoding.slerp(torch.tensor([[2.0], [2.0]]), torch.tensor([[-1.0], [1.0]]), 0.5)
    torch.testing.assert_close(opposite, torch.tensor([[0.5], [1.5]]))


def test_slerp_keeps_the_prior() -> None:
    """Means of independent codes are codes, of any scale."""
    a, b = normals(4000, 64), normals(4000, 64, seed=1)
    middle = encoding.slerp(a, b, 0.5)
    torch.testing.assert_close(encoding.slerp(50 * a, 50 * b, 0.5), 50 * middle, rtol=1e-13, atol=1e-13)
    # 256,000 numbers: their mean square is 1 to sqrt(2 / 256000) = 0.003, 5 deviations; the cosine of two codes is
    # sqrt(1/64) off, which counts to the second order alone: 0.02 at most
    assert abs(middle.square().mean().item() - 1) < 0.015 + 0.02
    assert abs((0.5 * (a + b)).square().mean().item() - 1) > 0.4  # a linear mean is not
