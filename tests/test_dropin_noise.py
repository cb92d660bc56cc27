"""Where random numbers come from: torch's generator, explicit streams, or tensors handed in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import GaussianModel
from torch import Tensor

from scoresde_ext import controllable_generation, likelihood, losses, noise, sampling, sde_lib

N, SHAPE = 6, (5, 3, 2, 2)
SDES = {
    "vp": (sde_lib.VPSDE(0.1, 5.0, N), GaussianModel("vp_cont", 0.1, 5.0, N, mu=0.3, s=0.5)),
    "subvp": (sde_lib.subVPSDE(0.1, 5.0, N), GaussianModel("subvp_cont", 0.1, 5.0, N, mu=0.3, s=0.5)),
    "ve": (sde_lib.VESDE(0.01, 50.0, N), GaussianModel("ve_cont", 0.01, 50.0, N, mu=0.3, s=0.5)),
}
every_kind = pytest.mark.parametrize("kind", SDES)


def identity(x: Any) -> Any:
    return x


def pc(kind: str, shape: tuple[int, ...] = SHAPE, corrector: str = "ald") -> Tensor:
    sde, network = SDES[kind]
    sampler = sampling.get_pc_sampler(
        sde, shape, sampling.ReverseDiffusionPredictor, sampling.get_corrector(corrector), identity, snr=0.16,
        continuous=True, device="cpu",
    )  # fmt: skip
    return sampler(network)[0]


def ode(kind: str) -> Tensor:
    sde, network = SDES[kind]
    return sampling.get_ode_sampler(sde, SHAPE, identity, rtol=1e-3, atol=1e-3, device="cpu")(network)[0]


def inpaint(kind: str) -> Tensor:
    sde, network = SDES[kind]
    inpainter = controllable_generation.get_pc_inpainter(
        sde, sampling.EulerMaruyamaPredictor, sampling.LangevinCorrector, identity, 0.16, continuous=True
    )
    return inpainter(network, torch.ones(SHAPE), torch.eye(2).expand(SHAPE))


def colorize(kind: str) -> Tensor:
    sde, network = SDES[kind]
    colorizer = controllable_generation.get_pc_colorizer(
        sde, sampling.EulerMaruyamaPredictor, sampling.LangevinCorrector, identity, 0.16, continuous=True
    )
    return colorizer(network, torch.ones(SHAPE))


def sde_loss(kind: str) -> Tensor:
    sde, network = SDES[kind]
    return losses.get_sde_loss_fn(sde, False)(network, torch.ones(SHAPE))


def bits(kind: str) -> Tensor:
    """Rolled channels have no diagonal: what Hutchinson's estimate makes of their divergence is epsilon's doing."""
    sde, _ = SDES[kind]
    likelihood_fn = likelihood.get_likelihood_fn(sde, identity, rtol=1e-3, atol=1e-3)
    return likelihood_fn(lambda x, labels: x.roll(1, dims=1), torch.ones(SHAPE))[0]


RUNS: dict[str, Callable[[str], Tensor]] = {f.__name__: f for f in (pc, ode, inpaint, colorize, sde_loss, bits)}


# --- torch.manual_seed ------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("run", RUNS)
def test_manual_seed_decides(kind: str, run: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(RUNS[run](kind))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@every_kind
@pytest.mark.parametrize("run", RUNS)
def test_runs_follow_one_another(kind: str, run: str) -> None:
    """Two runs after one seed differ, and leave the generator in the same state every time."""
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        first, second = RUNS[run](kind), RUNS[run](kind)
        assert not torch.equal(first, second)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_manual_seed_decides_discrete_loss(kind: str) -> None:
    sde = SDES[kind][0]
    loss_fn = (losses.get_ddpm_loss_fn if kind == "vp" else losses.get_smld_loss_fn)(sde, False)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(loss_fn(lambda x, labels: x, torch.ones(SHAPE)))
    assert results[0] == results[1] != results[2]


@every_kind
@pytest.mark.parametrize("shape", [(7,), (5, 3), SHAPE], ids=str)
def test_prior_is_torch_randn(kind: str, shape: tuple[int, ...]) -> None:
    sde = SDES[kind][0]
    torch.manual_seed(5)
    z = sde.prior_sampling(shape)
    torch.manual_seed(5)
    assert torch.equal(z, torch.randn(*shape) * (50 if kind == "ve" else 1))


@every_kind
@pytest.mark.parametrize("run", ["pc", "ode"])
def test_samplers_start_from_the_prior(kind: str, run: str) -> None:
    """The prior is drawn first, exactly as prior_sampling draws it."""
    sde, network = SDES[kind]
    seen: list[Tensor] = []

    def model(x: Tensor, labels: Tensor) -> Tensor:
        seen.append(x.clone())
        return network(x, labels)

    sampler = {
        "pc": lambda: sampling.get_pc_sampler(
            sde, SHAPE, sampling.ReverseDiffusionPredictor, None, identity, snr=0.16, continuous=True, device="cpu"
        ),
        "ode": lambda: sampling.get_ode_sampler(sde, SHAPE, identity, rtol=1e-2, atol=1e-2, device="cpu"),
    }[run]()
    torch.manual_seed(5)
    sampler(model)
    torch.manual_seed(5)
    assert torch.equal(seen[0], sde.prior_sampling(SHAPE))


# --- replay -----------------------------------------------------------------------------------------------------------


def zeros(n: int, *shape: int) -> list[Tensor]:
    return [torch.zeros(shape or SHAPE) for _ in range(n)]


def test_replay_of_too_few_tensors() -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)replay"), noise.replay(zeros(2 * N)):
        pc("vp")


def test_replay_of_too_many_tensors() -> None:
    with pytest.raises((RuntimeError, ValueError), match="1"), noise.replay(zeros(2 * N + 2)):
        pc("vp")


def test_replay_of_wrong_shapes() -> None:
    draws = zeros(2 * N + 1)
    draws[3] = torch.zeros(5, 12)
    with pytest.raises((RuntimeError, ValueError), match=r"5, 12") as error, noise.replay(draws):
        pc("vp")
    assert "5, 3, 2, 2" in str(error.value)


def test_replay_of_wrong_kind() -> None:
    """Labels and signs are integers: a fraction where upstream drew one is a mistake in the order of draws."""
    loss_fn = losses.get_ddpm_loss_fn(SDES["vp"][0], False)
    floats = [torch.full((5,), 0.5), *zeros(1)]
    with pytest.raises((RuntimeError, ValueError, TypeError), match=r"int64|integer"), noise.replay(floats):
        loss_fn(lambda x, labels: x, torch.ones(SHAPE))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float32])
def test_replay_of_whole_numbers(dtype: torch.dtype) -> None:
    """Rademacher's 0 and 1 count as integers in whatever dtype they were stored."""
    signs = (torch.arange(60).reshape(SHAPE) % 2).to(dtype)
    likelihood_fn = likelihood.get_likelihood_fn(SDES["vp"][0], identity, rtol=1e-2, atol=1e-2)
    results = []
    for stored in (signs, signs.long()):
        with noise.replay([stored]):
            results.append(likelihood_fn(lambda x, labels: x.roll(1, dims=1), torch.ones(SHAPE))[0])
    assert torch.equal(*results)


def test_leftovers_do_not_hide_an_error() -> None:
    with pytest.raises(ZeroDivisionError), noise.replay(zeros(1)):
        _ = 1 / 0


def test_replay_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), noise.replay(zeros(1)):
        _ = 1 / 0
    torch.manual_seed(1)
    assert torch.equal(SDES["vp"][0].prior_sampling((3,)), (torch.manual_seed(1), torch.randn(3))[1])


def test_replay_casts_floats_to_the_state() -> None:
    with noise.replay(torch.zeros(2 * N + 1, *SHAPE, dtype=torch.float64)):
        assert pc("vp").dtype == torch.float32


def test_replay_takes_any_iterable_once() -> None:
    stacked = torch.randn(2 * N + 1, *SHAPE)
    results = []
    for tensors in (stacked, list(stacked), (z for z in stacked)):
        with noise.replay(tensors):
            results.append(pc("vp"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_replay_leaves_its_tensors_alone() -> None:
    draws = [torch.randn(SHAPE) for _ in range(2 * N + 1)]
    copies = [z.clone() for z in draws]
    with noise.replay(draws):
        pc("ve")
    assert all(torch.equal(z, copy) for z, copy in zip(draws, copies, strict=True))


# --- seeds ------------------------------------------------------------------------------------------------------------


@every_kind
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    """Sample number i is the same alone, in any batch, at any place in it."""
    with noise.seeds(7, [0, 1, 2, 3, 4]):
        batch = pc(kind)
    for i in range(5):
        with noise.seeds(7, [i]):
            assert torch.equal(pc(kind, (1, *SHAPE[1:]))[0], batch[i])
    with noise.seeds(7, torch.tensor([4, 2, 9])):
        others = pc(kind, (3, *SHAPE[1:]))
    assert torch.equal(others[:2], batch[[4, 2]])
    with noise.seeds(8, [0, 1, 2, 3, 4]):
        assert not torch.isclose(pc(kind), batch).any()


def test_latent_code_does_not_depend_on_its_batch() -> None:
    """The adaptive solver shares its steps among a batch; where a sample starts it does not share."""
    sde, network = SDES["ve"]
    starts = []
    for ids in ([0, 1, 2, 3, 4], [3]):
        seen: list[Tensor] = []

        def model(x: Tensor, labels: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.clone())
            return network(x, labels)

        with noise.seeds(7, ids):
            sampling.get_ode_sampler(sde, (len(ids), *SHAPE[1:]), identity, rtol=1e-2, atol=1e-2, device="cpu")(model)
        starts.append(seen[0])
    assert torch.equal(starts[1][0], starts[0][3])


def test_streams_are_independent() -> None:
    sde = SDES["vp"][0]
    with noise.seeds(7, range(2000)):
        first, second = sde.prior_sampling((2000, 3)), sde.prior_sampling((2000, 3))
    both = torch.cat([first, second], 1)
    # 2000 samples: a mean is 0 to 1 / sqrt(2000) = 0.022, a correlation likewise; 5 deviations
    assert both.mean(0).abs().max() < 0.11
    assert (both.T.corrcoef() - torch.eye(6)).abs().max() < 0.11
    assert (both.std(0) - 1).abs().max() < 0.08


def test_seeds_do_not_touch_torchs_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with noise.seeds(7, range(5)):
        pc("vp")
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_loss_under_seeds_is_the_mean_of_its_samples(kind: str) -> None:
    sde, network = SDES[kind]
    loss_fn = losses.get_sde_loss_fn(sde, False)
    data = torch.randn(SHAPE)
    with noise.seeds(7, range(5)):
        whole = loss_fn(network, data)
    parts = []
    for i in range(5):
        with noise.seeds(7, [i]):
            parts.append(loss_fn(network, data[i : i + 1]))
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-6, atol=0)


def test_wrong_number_of_ids() -> None:
    with pytest.raises(ValueError, match=r"\bids\b"), noise.seeds(7, [0, 1]):
        pc("vp")


@pytest.mark.parametrize("ids", [[0.5, 1.0], torch.zeros(2, 2, dtype=torch.int64), torch.tensor(3)], ids=str)
def test_bad_ids(ids: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"\bids\b"), noise.seeds(7, ids):
        SDES["vp"][0].prior_sampling((2, 3))
