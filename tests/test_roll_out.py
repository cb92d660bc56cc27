"""One sampler called again and again, as in a roll-out: noise of its own for every call; and samplers as values, which
are copied and pickled."""

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoresde_ext import controllable_generation, likelihood, noise, sampling, sde_lib, stochastic

B, D = 1000, 3
VP = sde_lib.VPSDE(0.1, 5.0, 20)


def same(x: Any) -> Any:
    return x


class Normal(nn.Module):
    """Data N(0, I): the score is -x at every time, of which VP networks return -std times."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return x * VP.marginal_coefficients(labels / 999)[1][:, None].to(x.dtype)


def data(n: int = B) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3))


class Filling:
    """An inpainter or colorizer with what it works on."""

    def __init__(self, fill: Any, *given: Tensor) -> None:
        self.fill, self.given = fill, given

    def __call__(self, model: Any, **options: Any) -> Tensor:
        return self.fill(model, *self.given, **options)


Make = Callable[[noise.Seeds], Callable[..., Any]]
LANGEVIN = (sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, same, 0.1)
ODE = functools.partial(sampling.get_ode_sampler, VP, (B, D), same, device="cpu", rtol=1e-2, atol=1e-2)
SDE = functools.partial(stochastic.get_sde_sampler, VP, (B, D), same, device="cpu")
MAKERS: dict[str, Make] = {
    "pc": lambda seeds: sampling.get_pc_sampler(
        VP, (B, D), *LANGEVIN, continuous=True, device="cpu", seeds=seeds
    ),
    "RK45": lambda seeds: ODE(seeds=seeds),
    "unipc": lambda seeds: ODE(method="unipc", control="per_sample", seeds=seeds),
    "SDE": lambda seeds: SDE(steps=4, seeds=seeds),
    "adaptive SDE": lambda seeds: SDE(method="adaptive", rtol=0.1, atol=0.1, seeds=seeds),
    "inpainter": lambda seeds: Filling(
        controllable_generation.get_pc_inpainter(VP, *LANGEVIN, continuous=True, seeds=seeds),
        0 * data(), torch.tensor([1.0, 0.0, 0.0]),
    ),
    "colorizer": lambda seeds: Filling(
        controllable_generation.get_pc_colorizer(VP, *LANGEVIN, continuous=True, seeds=seeds), data()
    ),
    "likelihood": lambda seeds: functools.partial(
        likelihood.get_likelihood_fn(VP, same, "Gaussian", rtol=1e-2, atol=1e-2, seeds=seeds), data=data()
    ),
}  # fmt: skip
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@every_maker
def test_every_draw_has_noise_of_its_own(make: Make) -> None:
    sampler, model = make(7), Normal()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = of(sampler(model))
        drawn = [of(sampler(model, draw=k)) for k in (0, 1, 2, 1)]
    assert torch.equal(drawn[0], first) and torch.equal(drawn[3], drawn[1])
    # What is known is the same: one column of the inpainter's, and the gray of the colorizer's.
    shown = [(v - v.mean(1, keepdim=True))[:, 1:] for v in drawn[:3]] if isinstance(sampler, Filling) else drawn[:3]
    if not isinstance(sampler, functools.partial):
        assert max(abs(correlation(shown[i], shown[j])) for i, j in ((0, 1), (0, 2), (1, 2))) < 0.15
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


@every_maker
def test_a_second_call_with_the_same_noise_is_said_once(make: Make) -> None:
    sampler, model = make((7, range(B))), Normal()
    sampler(model)
    with pytest.warns(UserWarning, match=r"^seeds: this sampler was called before.* draw=0, 1, \.\.\.") as said:
        for _ in range(3):
            again = sampler(model)
    assert torch.equal(of(again), of(make(7)(model)))
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = make(None)
        sampler(model), sampler(model), sampler(model, draw=3)  # draws anew by itself


def test_no_warning_where_nothing_is_drawn() -> None:
    ode, exact = ODE(seeds=0), likelihood.get_likelihood_fn(VP, same, "exact", rtol=1e-2, atol=1e-2, seeds=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            ode(Normal(), data())
            exact(Normal(), data(2))
        streamed = ODE(seeds=0, control="per_sample")
        for _ in range(2):
            next(iter(streamed.stream(Normal(), B)))


@pytest.mark.parametrize("how", ["draw", "context"])
@pytest.mark.parametrize("name", ["pc", "RK45", "SDE"])
def test_a_roll_out_is_a_random_walk(name: str, how: str) -> None:
    """The sum of 16 increments N(0, 1) has variance 16. With one noise for all it has 256."""
    steps, model = 16, Normal()
    sampler = MAKERS[name](0 if how == "draw" else None)
    y = torch.zeros(B, D)
    with noise.seeds(0, range(B)), warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(steps):
            y = y + of(sampler(model, **({"draw": k} if how == "draw" else {})))
    assert (y.var() / steps - 1).abs() < 0.15


def test_draws_of_a_stream_and_of_one_sample() -> None:
    """Sample i is the same in any batch, whichever draw it is."""
    whole = ODE(control="per_sample", seeds=5)
    right = whole.solve(Normal(), draw=3).y
    for group in whole.stream(Normal(), B, draw=3):
        assert torch.equal(group.y, right[group.rows])
    one = sampling.get_ode_sampler(VP, (1, D), same, device="cpu", control="per_sample", rtol=1e-2, atol=1e-2,
                                   seeds=(5, [11]))  # fmt: skip
    assert torch.equal(one(Normal(), draw=3)[0], right[11:12])


@pytest.mark.parametrize("draw", [-1, 2**64, 1.0, "1", True], ids=str)
def test_wrong_draws(draw: Any) -> None:
    with pytest.raises(ValueError, match="^draw: expected the number of a draw"):
        ODE(seeds=0)(Normal(), draw=draw)


def test_large_seeds_and_draws() -> None:
    keys = set()
    for seed in (0, -1, 2**64 - 2, -(2**63)):
        for draw in (0, 1, 2**64 - 1):
            with noise.seeded(seed, 1, draw):
                keys.add(noise.normal_tensor(torch.zeros(1, 4)).sum().item())
    assert len(keys) == 12


# --- samplers as values -----------------------------------------------------------------------------------------------


@every_maker
def test_samplers_are_copied_and_pickled(make: Make) -> None:
    sampler, model = make(7), Normal()
    right = of(sampler(model))
    for other in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler), copy.copy(sampler)):
        assert torch.equal(of(other(model, draw=0)), right)


def test_samplers_without_a_scaler_are_pickled() -> None:
    sampler = sampling.get_ode_sampler(VP, (2, D), None, device="cpu", rtol=1e-2, atol=1e-2, seeds=7)
    other = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(of(other(Normal())), of(sampler(Normal())))


def test_captured_loops_are_not_copied() -> None:
    sampler = ODE(seeds=7)
    sampler.cache.kept["a key"] = lambda: None  # type: ignore[assignment]
    for other in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
        assert not other.cache.kept and other.cache.most == sampler.cache.most
