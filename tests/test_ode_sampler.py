"""``get_ode_sampler``: its keywords, its seeds, its statuses, and what a network's precision allows."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import SDES, CosineSDE
from networks import GaussianModel, MixtureModel
from torch import Tensor, nn

from scoresde_ext.integrate import Solution, SolverError, Status
from scoresde_ext.sampling import get_ode_sampler
from scoresde_ext.sde_lib import SDE, VESDE, VPSDE, subVPSDE

SHAPE = (4, 3, 2, 2)
MODELS: dict[str, tuple[SDE, tuple[str, float, float, int]]] = {
    "vp": (VPSDE(), ("vp_cont", 0.1, 20, 1000)),
    "subvp": (subVPSDE(), ("subvp_cont", 0.1, 20, 1000)),
    "ve": (VESDE(), ("ve_cont", 0.01, 50, 1000)),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def to_unit(x: Tensor) -> Tensor:
    """From the network's range [-1, 1] to [0, 1]."""
    return (x + 1) / 2


def model_of(kind: str) -> nn.Module:
    return MixtureModel(*MODELS[kind][1], [-0.6, 0.6], [0.3, 0.3], [0.5, 0.5])


def sampler_of(kind: str = "vp", shape: tuple[int, ...] = SHAPE, scaler: Any = to_unit, **options: Any) -> Any:
    return get_ode_sampler(MODELS[kind][0], shape, scaler, device="cpu", **options)


def latent(kind: str = "vp", shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape) * (50 if kind == "ve" else 1)


class Spoiled(nn.Module):
    """A network of which some calls are changed: ``spoil(out, t, call)`` returns the output."""

    def __init__(self, spoil: Callable[[Tensor, Tensor, int], Any], kind: str = "vp") -> None:
        super().__init__()
        self.network, self.spoil, self.states = model_of(kind), spoil, []

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        self.states.append(x)
        return self.spoil(self.network(x, labels).clone(), labels, len(self.states))


def nan_in_row_1(below: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    def spoil(out: Tensor, labels: Tensor, call: int) -> Tensor:
        if labels[1] < 999 * below:
            out[1, 0] = math.nan
        return out

    return spoil


# --- keywords ---------------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "as upstream": {},
    "per sample": {"control": "per_sample"},
    "angle": {"coordinate": "angle"},
    "angle, per sample": {"coordinate": "angle", "control": "per_sample"},
    "RK23": {"method": "RK23"},
    "DOP853": {"method": "DOP853", "control": "per_sample"},
    "unipc": {"method": "unipc"},
    "unipc 4, per sample": {"method": "unipc", "order": 4, "control": "per_sample"},
    "unipc in steps": {"method": "unipc", "steps": 60},
    "dpmpp_2m in steps": {"method": "dpmpp_2m", "steps": 300},
    "heun in steps": {"method": "heun", "coordinate": "angle", "steps": 200},
    "unipc on a grid": {"method": "unipc", "grid": [1.0, *(0.96**i for i in range(1, 150)), 1e-3]},
}


@every_model
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_keywords(mode: dict[str, Any], kind: str) -> None:
    """All are ways to the same samples. The call and ``solve`` are one."""
    z, model = latent(kind), model_of(kind)
    right, _ = sampler_of(kind, method="DOP853", rtol=1e-10, atol=1e-10)(model.double(), z.double())
    x, nfe = sampler_of(kind, **mode)(model.float(), z)
    assert x.shape == SHAPE and x.dtype == torch.float32 and type(nfe) is int
    assert (x - right).abs().max() < 1e-3
    solution = sampler_of(kind, **mode).solve(model, z)
    assert isinstance(solution, Solution) and solution.success and solution.nfe == nfe
    assert torch.equal(solution.y, x) and (solution.t == 1e-3).all()
    if "steps" in mode:
        assert nfe == mode["steps"] * (2 if mode["method"] == "heun" else 1)


@every_model
def test_without_keywords_as_before(kind: str) -> None:
    """The defaults are joint RK45 in t, at 1e-5."""
    z, model = latent(kind), model_of(kind)
    x, nfe = sampler_of(kind)(model, z)
    said, nfe_said = sampler_of(kind, method="RK45", rtol=1e-5, atol=1e-5, control="joint", coordinate="t")(model, z)
    assert torch.equal(x, said) and nfe == nfe_said


def test_order_changes_unipc() -> None:
    z, model = latent(), model_of("vp")
    found = [sampler_of(method="unipc", order=order, steps=10)(model, z)[0] for order in (1, 2, 3, 4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_keywords_are_keyword_only() -> None:
    """Upstream's nine arguments stay where they are."""
    with pytest.raises(TypeError, match="positional"):
        get_ode_sampler(VPSDE(), SHAPE, to_unit, False, 1e-5, 1e-5, "RK45", 1e-3, "cpu", "joint")  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 5, "grid": [1.0, 1e-3]},
        {"method": "dpmpp_2m"},
        {"grid": [1.0, 0.5]},
        {"grid": [1e-3, 1.0]},
        {"control": "all"},
        {"coordinate": "angle", "method": "unipc"},
        {"order": 5, "method": "unipc"},
        {"max_steps": 0},
        {"on_failure": "ignore"},
        {"method": "BDF", "steps": 5},
        {"method": "Radau", "control": "per_sample"},
        {"seeds": "7"},
        {"seeds": (7, [0, 1])},
        {"seeds": 1.5},
        {"rtol": 1e-9, "atol": 1e-9},
    ],
    ids=str,
)
def test_refused_before_any_evaluation(options: dict[str, Any]) -> None:
    model = Spoiled(lambda out, t, call: out)
    with pytest.raises(ValueError):
        sampler_of(**options)(model, latent())
    assert not model.states


@pytest.mark.parametrize("options", [{"coordinate": "angle"}, {"method": "unipc"}, {"method": "dpmpp_2m", "steps": 9}])
def test_sdes_that_are_not_affine(options: dict[str, Any]) -> None:
    """Said by name, before any evaluation."""

    class Bent(VPSDE):
        def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            drift, diffusion = super().sde(x, t)
            return drift - 0.1 * x.tanh(), diffusion

    model = Spoiled(lambda out, t, call: out)
    with pytest.raises(ValueError, match="affine SDE.*Bent"):
        get_ode_sampler(Bent(), SHAPE, to_unit, device="cpu", **options)(model, latent())
    assert not model.states
    assert get_ode_sampler(Bent(), SHAPE, to_unit, device="cpu")(model, latent())[0].isfinite().all()


def test_a_user_s_affine_sde() -> None:
    sde = SDES["own"]
    assert isinstance(sde, CosineSDE)

    def model(x: Tensor, t: Tensor) -> Tensor:  # the score of N(0, 1) data, whose flow stands still
        return -x

    z = torch.randn(SHAPE)
    for options in ({}, {"coordinate": "angle"}, {"method": "unipc"}, {"method": "unipc", "control": "per_sample"}):
        x, _ = get_ode_sampler(sde, SHAPE, lambda x: x, device="cpu", **options)(model, z)
        torch.testing.assert_close(x, z, rtol=0, atol=2e-3)


# --- seeds ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("method", ["RK45", "unipc"])
def test_seeds_make_samples_their_own(method: str, kind: str) -> None:
    """Sample b is stream ``ids[b]``, whatever the batch, its order and torch's generator."""
    model = GaussianModel(*MODELS[kind][1], 0.3, 0.5)

    def sample(ids: list[int], seed: int = 7) -> Tensor:
        options: dict[str, Any] = {"method": method, "control": "per_sample", "seeds": (seed, ids)}
        # 16 elements a sample and more: torch's vectorised functions then treat every row alike
        return sampler_of(kind, (len(ids), 4, 4, 4), **options)(network, None)[0]

    def network(x: Tensor, labels: Tensor) -> Tensor:
        """The labels as an array as large as x."""
        wide = labels.reshape(-1, 1, 1, 1).expand(x.shape).reshape(-1)
        return model(x.reshape(-1, 1), wide).reshape(x.shape)

    torch.manual_seed(1)
    all_of_them = sample([0, 1, 2, 3, 4])
    torch.manual_seed(2)
    assert torch.equal(sample([0, 1, 2, 3, 4]), all_of_them)
    assert torch.equal(sample([3, 0, 4]), all_of_them[[3, 0, 4]])
    assert torch.equal(sample([2]), all_of_them[[2]])
    assert not torch.equal(sample([2], seed=8), all_of_them[[2]])
    assert all_of_them.std(0).min() > 0
    assert torch.equal(
        sampler_of(kind, (5, 4, 4, 4), method=method, control="per_sample", seeds=7)(network)[0], all_of_them
    )


def test_seeds_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    sampler_of(seeds=3)(model_of("vp"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    a, _ = sampler_of()(model_of("vp"))
    torch.manual_seed(5)
    b, _ = sampler_of()(model_of("vp"))
    assert torch.equal(a, b) and not torch.equal(a, sampler_of()(model_of("vp"))[0])


def test_a_latent_comes_before_seeds() -> None:
    z = latent()
    assert torch.equal(sampler_of(seeds=3)(model_of("vp"), z)[0], sampler_of()(model_of("vp"), z)[0])


# --- failures ---------------------------------------------------------------------------------------------------------

FAILING = {
    "joint": {},
    "per sample": {"control": "per_sample"},
    "angle": {"coordinate": "angle"},
    "unipc": {"method": "unipc"},
    "unipc, per sample": {"method": "unipc", "control": "per_sample"},
    "steps": {"method": "heun", "steps": 30},
    "unipc in steps": {"method": "unipc", "steps": 20},
}


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("mode", FAILING.values(), ids=FAILING)
def test_partial_solution(mode: dict[str, Any], denoise: bool) -> None:
    """In the range of the data, NaN where a sample failed; no network is shown what failed."""
    z, others = latent(), [0, 2, 3]
    model = Spoiled(nan_in_row_1(0.1))
    with pytest.raises(SolverError, match=r"sample 1 at t = (1|0\.\d+): NaN or Inf") as error:
        sampler_of(**mode, denoise=denoise)(model, z)
    solution = error.value.solution
    assert isinstance(solution, Solution)
    assert solution.status.tolist() == [0, Status.NOT_FINITE, 0, 0] and solution.y[1].isnan().all()
    joint = mode.get("control", "joint") == "joint" and "steps" not in mode
    rows, shape = (others, (3, *SHAPE[1:])) if joint else ([0, 1, 2, 3], SHAPE)
    clean, _ = sampler_of(**mode, shape=shape, denoise=denoise)(model_of("vp"), z[rows])
    # exp in the network: a row's last digit depends on its place
    torch.testing.assert_close(solution.y[others], clean[:3] if joint else clean[others], rtol=1e-5, atol=1e-5)
    assert 0 < solution.y[others].mean() < 1  # to_unit was applied, once
    if denoise:
        assert model.states[-1].isfinite().all()
    asked = sampler_of(**mode, denoise=denoise, on_failure="status").solve(Spoiled(nan_in_row_1(0.1)), z)
    assert torch.equal(asked.y.nan_to_num(9), solution.y.nan_to_num(9)) and asked.message == solution.message
    samples, nfe = sampler_of(**mode, denoise=denoise, on_failure="status")(Spoiled(nan_in_row_1(0.1)), z)
    assert torch.equal(samples.nan_to_num(9), solution.y.nan_to_num(9)) and nfe == solution.nfe


@pytest.mark.parametrize("mode", FAILING.values(), ids=FAILING)
def test_denoising_that_fails(mode: dict[str, Any]) -> None:
    """NaN in the last evaluation alone is a failure as any other."""
    z = latent()
    last = sampler_of(**mode)(model_of("vp"), z)[1] + 1

    def spoil(out: Tensor, labels: Tensor, call: int) -> Tensor:
        if call == last:
            out[2] = math.nan
        return out

    with pytest.raises(SolverError, match="sample 2 at t = 0.001") as error:
        sampler_of(**mode, denoise=True)(Spoiled(spoil), z)
    solution = error.value.solution
    assert solution.status.tolist() == [0, 0, Status.NOT_FINITE, 0] and solution.y[2].isnan().all()
    clean = sampler_of(**mode, denoise=True)(model_of("vp"), z)[0]
    assert torch.equal(solution.y[[0, 1, 3]], clean[[0, 1, 3]])
    asked = sampler_of(**mode, denoise=True, on_failure="status").solve(Spoiled(spoil), z)
    assert asked.status.tolist() == [0, 0, Status.NOT_FINITE, 0]


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("mode", FAILING.values(), ids=FAILING)
def test_a_network_that_raises_from_some_call_on(mode: dict[str, Any], denoise: bool) -> None:
    def spoil(out: Tensor, labels: Tensor, call: int) -> Tensor:
        if call >= 8:
            raise KeyError("gone")
        return out

    with pytest.raises(SolverError, match="KeyError: 'gone'") as error:
        sampler_of(**mode, denoise=denoise)(Spoiled(spoil), latent())
    assert isinstance(error.value.__cause__, KeyError)
    assert (error.value.solution.status == Status.RAISED).all() and error.value.solution.y.isnan().all()
    asked = sampler_of(**mode, denoise=denoise, on_failure="status").solve(Spoiled(spoil), latent())
    assert (asked.status == Status.RAISED).all()


def test_max_steps() -> None:
    with pytest.raises(SolverError, match="max_steps = 3") as error:
        sampler_of(max_steps=3)(model_of("vp"), latent())
    assert (error.value.solution.status == Status.MAX_STEPS).all()


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """Silent where there is no terminal."""
    for progress in (False, True):
        sampler_of(progress=progress)(model_of("vp"), latent())
    assert capsys.readouterr() == ("", "")


# --- precision of the network -----------------------------------------------------------------------------------------


class Low(nn.Module):
    """Parameters and outputs of this precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.network = nn.Parameter(torch.ones((), dtype=dtype)), model_of("vp")

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        assert x.dtype == self.scale.dtype
        return self.network(x.float(), labels).to(self.scale.dtype) * self.scale


def solved(model: nn.Module, **options: Any) -> tuple[Tensor, int, list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        x, nfe = sampler_of(**options)(model, latent())
    return x, nfe, caught


FLOORS = {torch.bfloat16: 1e-3, torch.float16: 1e-4}


@pytest.mark.parametrize("dtype", FLOORS, ids=str)
@pytest.mark.parametrize("mode", [{}, {"control": "per_sample"}, {"method": "unipc"}, {"coordinate": "angle"}], ids=str)
def test_tolerance_floor(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """One warning, and the evaluations of a solve at the floor."""
    floor = FLOORS[dtype]
    x, nfe, caught = solved(Low(dtype), **mode, rtol=1e-6, atol=1e-6)
    assert [str(w.message).startswith(f"rtol, atol: held at {floor:g} (got 1e-06 and 1e-06)") for w in caught] == [True]
    assert caught[0].filename == __file__  # the line that asked for it
    at_floor, nfe_at_floor, none = solved(Low(dtype), **mode, rtol=floor, atol=floor)
    assert not none and nfe == nfe_at_floor and torch.equal(x, at_floor)
    _, more, none = solved(Low(torch.float32), **mode, rtol=1e-6, atol=1e-6)
    assert not none and more > nfe
    _, fewer, none = solved(Low(dtype), **mode, rtol=1e-2, atol=1e-2)
    assert not none and fewer < nfe
    assert (x - solved(Low(torch.float32), **mode)[0]).abs().max() < 0.05


def test_no_floor_where_tolerances_are_not_used() -> None:
    for mode in ({"method": "unipc", "steps": 9}, {"method": "heun", "steps": 9}):
        assert not solved(Low(torch.bfloat16), **mode)[2]


def test_autocast_counts_too() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, caught = solved(model_of("vp"))
    assert [("held at 0.001" in str(w.message), "bfloat16" in str(w.message)) for w in caught] == [(True, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_warning_in_full_precision(dtype: torch.dtype) -> None:
    for options in ({}, {"rtol": 1e-6, "atol": 1e-6}, {"method": "unipc"}, {"denoise": True}):
        assert not solved(model_of("vp").to(dtype), **options)[2]
