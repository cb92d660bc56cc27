"""Moving averages: half precision, networks that move, freeze or thaw, and what is refused."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoresde_ext import losses, sde_lib
from scoresde_ext.models.ema import ExponentialMovingAverage

HALF = (torch.bfloat16, torch.float16)


def weight(value: float, dtype: torch.dtype = torch.float32, trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.full((4,), value, dtype=dtype), requires_grad=trained)


def set_to(p: nn.Parameter, value: float) -> None:
    with torch.no_grad():
        p.fill_(value)


def first(values: list[Tensor]) -> list[float]:
    return [v[0].item() for v in values]


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_averages_of_half_precision_move(dtype: torch.dtype) -> None:
    """(1 - 0.9999) times a difference of 0.1 is below their rounding: the average is kept in float32."""
    p = weight(0.9, dtype)
    start = p[0].item()
    average = ExponentialMovingAverage([p], 0.9999, use_num_updates=False)
    set_to(p, 1.0)
    for _ in range(500):
        average.update([p])
    wanted = 1 - (1 - start) * 0.9999**500
    assert average.shadow_params[0].dtype == torch.float32
    torch.testing.assert_close(average.shadow_params[0], torch.full((4,), wanted), rtol=1e-5, atol=0)
    average.copy_to([p])
    assert p.dtype == dtype
    assert torch.equal(p.detach(), torch.full((4,), wanted).to(dtype))


def test_a_float32_average_aliases_nothing() -> None:
    p = weight(1.0)
    average = ExponentialMovingAverage([p], 0.9)
    set_to(p, 3.0)
    assert first(average.shadow_params) == [1.0]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_old_states_of_half_precision_load(dtype: torch.dtype) -> None:
    average = ExponentialMovingAverage([weight(0.0, dtype)], 0.9)
    average.load_state_dict({"decay": np.float64(0.5), "num_updates": 7, "shadow_params": [torch.ones(4, dtype=dtype)]})
    assert average.shadow_params[0].dtype == torch.float32
    assert (average.decay, type(average.decay), average.num_updates) == (0.5, float, 7)
    assert first(average.shadow_params) == [1.0]


@pytest.mark.parametrize(
    ("before", "after", "kept_in"),
    [
        (torch.float32, torch.float64, torch.float64), (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32), (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_averages_follow_the_dtype(before: torch.dtype, after: torch.dtype, kept_in: torch.dtype) -> None:
    net = nn.Linear(1, 1, bias=False).to(before)
    set_to(net.weight, 0.0)
    average = ExponentialMovingAverage(net.parameters(), 0.5, use_num_updates=False)
    net.to(after)
    average.copy_to(net.parameters())
    set_to(net.weight, 1.0)
    average.update(net.parameters())
    assert average.shadow_params[0].dtype == kept_in
    assert average.shadow_params[0].item() == 0.5
    average.copy_to(net.parameters())
    assert net.weight.dtype == after and net.weight.item() == 0.5


# --- devices ----------------------------------------------------------------------------------------------------------


def test_averages_on_another_device() -> None:
    net = nn.Linear(2, 2)
    average = ExponentialMovingAverage(net.parameters(), 0.9)
    average.store(net.parameters())
    net.to("meta")  # stands for any other
    with pytest.raises(
        ValueError, match=r"parameters: expected the device of the averages, cpu, got meta.*\.to\('meta'\)"
    ):
        average.update(net.parameters())
    assert average.num_updates == 0
    assert average.to("meta") is average
    average.update(net.parameters())
    assert {t.device.type for t in [*average.shadow_params, *average.collected_params]} == {"meta"}


# --- parameters that freeze and thaw ----------------------------------------------------------------------------------


def test_a_parameter_that_is_frozen_later_keeps_its_average() -> None:
    """By position it would take its neighbour's."""
    weights = [weight(0.0), weight(10.0), weight(20.0, trained=False)]
    average = ExponentialMovingAverage(weights, 0.5, use_num_updates=False)
    weights[0].requires_grad_(False)
    for p, value in zip(weights, (1.0, 12.0, 22.0), strict=True):
        set_to(p, value)
    average.update(weights)
    assert first(average.shadow_params) == [0.5, 11.0]
    average.copy_to(weights)
    assert first(weights) == [0.5, 11.0, 22.0]


def test_a_frozen_network_is_evaluated_with_its_averages() -> None:
    net = nn.Linear(3, 3)
    average = ExponentialMovingAverage(net.parameters(), 0.5)
    trained = [p.detach().clone() for p in net.parameters()]
    for shadow in average.shadow_params:
        shadow.add_(1.0)
    net.requires_grad_(False)
    seen = []

    def forward(x: Tensor, labels: Tensor) -> Tensor:
        seen.extend(p.clone() for p in net.parameters())
        return net(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return forward(x, labels)

    losses.get_step_fn(sde_lib.VPSDE(), False)({"model": Model(), "ema": average}, torch.zeros(2, 3))
    torch.testing.assert_close(seen, [p + 1 for p in trained])
    assert all(map(torch.equal, net.parameters(), trained))


@pytest.mark.parametrize("method", ["update", "copy_to"])
def test_a_parameter_that_thaws_is_refused(method: str) -> None:
    """It has no average: it would be left as it is, without a word."""
    weights = [weight(0.0), weight(10.0, trained=False), weight(20.0)]
    average = ExponentialMovingAverage(weights, 0.5)
    weights[1].requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"parameters: number 1, of shape \(4,\), was frozen when the average was made"
    ):
        getattr(average, method)(weights)
    assert first(average.shadow_params) == [0.0, 20.0] and average.num_updates == 0


def test_all_parameters_or_the_trained_ones() -> None:
    weights = [weight(0.0), weight(10.0, trained=False)]
    for made_from in (weights, weights[:1]):
        for given in (weights, weights[:1]):
            set_to(weights[0], 0.0)
            average = ExponentialMovingAverage(made_from, 0.5, use_num_updates=False)
            set_to(weights[0], 1.0)
            average.update(iter(given))
            assert first(average.shadow_params) == [0.5]


# --- what is refused --------------------------------------------------------------------------------------------------


def average_of_two() -> tuple[ExponentialMovingAverage, list[nn.Parameter]]:
    weights = [nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))]
    return ExponentialMovingAverage(weights, 0.9), weights


REFUSED: dict[str, tuple[Callable[[ExponentialMovingAverage, list[nn.Parameter]], object], str]] = {
    "fewer": (lambda a, w: a.update(w[:1]), "parameters: expected the 2 tensors that are averaged, got 1"),
    "shapes": (
        lambda a, w: a.update(w[::-1]),
        r"parameters: expected the shapes that are averaged, \(3, 3\) for number 0, got \(3,\)",
    ),
    "shapes that would broadcast": (
        lambda a, w: a.copy_to([w[0], nn.Parameter(torch.zeros(3, 3))]), r"\(3,\) for number 1, got \(3, 3\)"
    ),
    "never stored": (lambda a, w: a.restore(w), r"parameters: expected store\(parameters\) before restore"),
    "another state": (
        lambda a, w: a.load_state_dict(a.state_dict() | {"shadow_params": [torch.ones(3)]}),
        "shadow_params: expected the 2 tensors that are averaged, got 1",
    ),
    "its decay": (lambda a, w: a.load_state_dict(a.state_dict() | {"decay": 2.0}), r"decay: expected .* got 2\.0"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_refused(wrong: str) -> None:
    call, message = REFUSED[wrong]
    average, weights = average_of_two()
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(ValueError, match=message):
        call(average, weights)
    torch.testing.assert_close(average.state_dict(), before, rtol=0, atol=0)


def test_a_decay_that_is_set_later_counts() -> None:
    p = weight(0.0)
    average = ExponentialMovingAverage([p], 0.9, use_num_updates=False)
    set_to(p, 1.0)
    average.decay = 0.25
    average.update([p])
    assert first(average.shadow_params) == [0.75]
    average.decay = 1.5
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], got 1\.5"):
        average.update([p])
    assert first(average.shadow_params) == [0.75]


def test_a_module_is_not_its_parameters() -> None:
    with pytest.raises(TypeError, match=r"parameters: expected model.parameters\(\), got the module Linear"):
        ExponentialMovingAverage(nn.Linear(2, 2), 0.9)  # type: ignore[arg-type]
