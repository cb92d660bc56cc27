"""Continuous batching: what a sample gets is what it gets alone, to the bit, and the slots are never empty."""

from typing import Any

import pytest
import torch
from flows import ADAPTIVE, SDES, Network, arithmetic, flow_of, mixture, prior
from torch import Tensor

from scoresde_ext import sampling
from scoresde_ext.integrate import Solution, Status, Stream, solve, stream
from scoresde_ext.sde_lib import AffineSDE
from scoresde_ext.stochastic import get_sde_sampler

SPAN = (1.0, 0.01)
PER_SAMPLE = {name: mode for name, mode in ADAPTIVE.items() if mode["control"] == "per_sample"}
every_mode = pytest.mark.parametrize("mode", PER_SAMPLE.values(), ids=PER_SAMPLE)


def options_of(mode: dict[str, Any]) -> dict[str, Any]:
    return {"rtol": 1e-3, "atol": 1e-3} | {name: value for name, value in mode.items() if name != "control"}


def spread_out(sde: AffineSDE, batch: int, size: int = 16) -> Tensor:
    """Rows of unlike difficulty."""
    return prior(sde, batch, size) * torch.linspace(0.0, 2.0, batch, dtype=torch.float64)[:, None]


def gathered(found: Stream, whole: Any) -> list[int]:
    """Checks that the stream gives every row of ``whole`` once, as it is there. Returns the sizes of the groups."""
    seen, sizes = [], []
    for group in found:
        for name in ("y", "t", "status", "evaluations"):
            mine, its = getattr(group, name), getattr(whole, name)[group.rows]
            assert torch.equal(mine.nan_to_num(-7), its.nan_to_num(-7)), name
        seen += group.rows.tolist()
        sizes.append(len(group.rows))
    assert sorted(seen) == list(range(len(whole.status)))
    return sizes


def solved(network: Network, y0: Tensor, mode: dict[str, Any], **more: Any) -> Solution:
    return solve(
        flow_of(SDES["vp"], network), SPAN, y0, control="per_sample", on_failure="status", **options_of(mode), **more
    )


@pytest.mark.parametrize("slots", [3, 50])
@every_mode
def test_the_bits_are_those_of_a_solve(mode: dict[str, Any], slots: int) -> None:
    sde = SDES["vp"]
    y0 = spread_out(sde, 13)
    found = stream(flow_of(sde, mixture(sde)), SPAN, lambda a, b: y0[a:b], len(y0), slots, **options_of(mode))
    gathered(found, solved(mixture(sde), y0, mode))
    assert found.taken == len(y0) and found.needed <= found.computed


@every_mode
def test_failures_free_their_slots(mode: dict[str, Any]) -> None:
    """Rows that are NaN from the start, or become so, or run out of steps."""
    y0 = spread_out(SDES["vp"], 23)
    y0[[1, 6, 7, 8, 22], 3] = 50.0

    def network(x: Tensor, t: Tensor) -> Tensor:
        spoilt = (x[:, 3].abs() > 30) & (t < 0.9)
        return torch.where(spoilt[:, None], torch.nan, arithmetic(x, t))

    whole = solved(network, y0, mode, max_steps=12)
    assert {int(s) for s in whole.status} >= {Status.NOT_FINITE}
    found = stream(
        flow_of(SDES["vp"], network), SPAN, lambda a, b: y0[a:b], 23, 3, max_steps=12, **options_of(mode)
    )  # fmt: skip
    gathered(found, whole)


def test_several_parts() -> None:
    y0 = (torch.linspace(0.1, 2.0, 9)[:, None].expand(9, 2), torch.linspace(1, 5, 9))

    def f(t: Tensor, ys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return ys[1][:, None] * ys[0] / (1 + ys[0] ** 2), -ys[1] * t

    whole = solve(f, (0.0, 3.0), y0, "RK45", control="per_sample")
    for group in stream(f, (0.0, 3.0), lambda a, b: (y0[0][a:b], y0[1][a:b]), 9, 4, "RK45"):
        for mine, its in zip(group.y, whole.y, strict=True):
            assert torch.equal(mine, its[group.rows])


@pytest.mark.parametrize("method", ["unipc", "RK45"])
def test_occupancy(method: str) -> None:
    """On a mixture spread out in difficulty, slots are full nearly all the time, and the evaluations are fewer than
    those of waiting for the slowest by the spread: the mean over the batches' largest, to what the end costs."""
    sde, slots = SDES["vp"], 32
    y0 = spread_out(sde, 16 * slots)[torch.randperm(16 * slots)]
    flow, options = flow_of(sde, mixture(sde)), {"method": method, "rtol": 1e-4, "atol": 1e-4}
    found = stream(flow, SPAN, lambda a, b: y0[a:b], len(y0), slots, **options)
    evaluations = torch.cat([group.evaluations for group in found]).double()
    waiting = [solve(flow, SPAN, part, control="per_sample", **options) for part in y0.split(slots)]
    predicted = evaluations.mean() / torch.stack([s.evaluations.max() for s in waiting]).double().mean()
    assert found.needed == evaluations.sum()
    assert found.needed / found.computed >= 0.95
    ratio = found.computed / sum(s.nfe * slots for s in waiting)
    assert predicted <= ratio <= predicted / 0.95 and ratio < 0.95


def test_what_the_network_raises_is_handed_on() -> None:
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 9:
            raise MemoryError("no more")
        return arithmetic(x, t)

    y0 = spread_out(SDES["vp"], 9)
    with pytest.raises(MemoryError, match="no more"):
        list(stream(flow_of(SDES["vp"], network), SPAN, lambda a, b: y0[a:b], 9, 4))


def test_the_end_takes_fewer_slots() -> None:
    """Once nothing waits, half-empty batches are cut."""
    sizes = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return arithmetic(x, t)

    y0 = spread_out(SDES["vp"], 64)
    list(stream(flow_of(SDES["vp"], network), SPAN, lambda a, b: y0[a:b], 64, 16, "unipc", rtol=1e-4, atol=1e-4))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 16 and sizes[-1] <= 4


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("method", ["RK45", "unipc"])
def test_ode_sampler(method: str, denoise: bool) -> None:
    """With streams of noise by id; the last step is computed for as many at a time as there are slots."""
    sizes = []

    def network(x: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(x))
        return arithmetic(x, labels / 999) * (1 + labels[:, None] / 999)

    sampler = sampling.get_ode_sampler(
        SDES["vp"],
        (19, 16),
        lambda x: 0.5 * x,
        denoise,
        1e-3,
        1e-3,
        method,
        device="cpu",
        control="per_sample",
        seeds=(5, range(40, 59)),
    )
    whole = sampler.solve(network)
    sizes.clear()
    groups = gathered(sampler.stream(network, 4), whole)
    assert max(sizes) == 4
    if denoise:
        assert groups == [4, 4, 4, 4, 3]


def test_sde_sampler() -> None:
    def network(x: Tensor, labels: Tensor) -> Tensor:
        return x / (1 + 0.2 * x * x)

    sampler = get_sde_sampler(
        SDES["vp"], (17, 16), lambda x: x + 1, method="adaptive", device="cpu", seeds=(3, torch.arange(17) * 5)
    )
    gathered(sampler.stream(network, 5), sampler.solve(network))


def test_arguments() -> None:
    flow, y0 = flow_of(SDES["vp"], arithmetic), spread_out(SDES["vp"], 3)
    for name, options in (("control", {"control": "joint"}), ("steps", {"steps": 3}), ("t_eval", {"t_eval": [0.5]})):
        with pytest.raises(ValueError, match=f"^{name}: a stream"):
            stream(flow, SPAN, lambda a, b: y0[a:b], 3, 2, **options)
    for name, options in (("count", {"count": -1, "slots": 2}), ("slots", {"count": 3, "slots": 0})):
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number"):
            stream(flow, SPAN, lambda a, b: y0[a:b], **options)
    assert list(stream(flow, SPAN, lambda a, b: y0[a:b], 0, 2)) == []
    joint = sampling.get_ode_sampler(SDES["vp"], (4, 2), lambda x: x, device="cpu")
    with pytest.raises(ValueError, match="control: a stream expects"):
        joint.stream(lambda x, labels: x, 2)
    fixed = get_sde_sampler(SDES["vp"], (4, 2), lambda x: x, device="cpu")
    with pytest.raises(ValueError, match="method: a stream expects"):
        list(fixed.stream(lambda x, labels: x, 2))
