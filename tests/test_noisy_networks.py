"""A network that answers otherwise each time it is asked the same: the step control takes that for errors. It is found
out and named, and other networks are not asked once more for it."""

import math
import warnings
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from networks import MixtureModel
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde_ext import graphs, integrate, likelihood, sampling, sde_lib, stochastic

VP, SHAPE = sde_lib.VPSDE(), (4, 3)
MODES: dict[str, dict[str, Any]] = {
    "RK45": {},
    "RK45, per sample": {"control": "per_sample"},
    "RK45 in the angle": {"coordinate": "angle"},
    "DOP853": {"method": "DOP853"},
    "UniPC": {"method": "unipc"},
    "UniPC, per sample": {"method": "unipc", "order": 4, "control": "per_sample"},
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)
WARNING = r"^Two evaluations of the same state and time differ by .* Dropout is on, .* use fixed steps \(steps=\.\.\.\)"


class Counted(nn.Module):
    """A mixture's score, with a noise of this share; and how often it was asked."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.network, self.noise, self.calls = (
            MixtureModel("vp_cont", 0.1, 20, 1000, [-0.8, 0.8], [0.3, 0.3], [0.5, 0.5]),
            noise,
            0,
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        out = self.network(x, labels)
        return out * (1 + self.noise * torch.randn_like(out)) if self.noise else out


def sampler_of(options: dict[str, Any], **more: Any) -> Any:
    return sampling.get_ode_sampler(VP, SHAPE, lambda x: x, device="cpu", **{"max_steps": 60, **options, **more})


@every_mode
def test_a_noisy_network_is_named(options: dict[str, Any]) -> None:
    """In a warning at the caller's line, and in what is said where max_steps are not enough; also of those samples
    alone."""
    sampler = sampler_of(options, on_failure="status", denoise=True)
    with pytest.warns(UserWarning, match=WARNING) as said:
        solution = sampler.solve(Counted(0.01))
    assert [warning.filename for warning in said] == [__file__]
    assert (solution.status == integrate.Status.MAX_STEPS).all()
    assert "Two evaluations of the same state and time differ. Dropout is on" in solution.message
    with pytest.raises(integrate.SolverError, match="max_steps = 60 attempted steps .* Dropout is on"), pytest.warns():
        sampler_of(options).solve(Counted(0.01))


@every_mode
def test_it_is_named_before_the_end(options: dict[str, Any]) -> None:
    network, after = Counted(0.01), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integrate.run, "warn", lambda _: after.append(network.calls))
        nfe = sampler_of(options, on_failure="status", max_steps=200).solve(network).nfe
    assert len(after) == 1 and after[0] < nfe and network.calls == nfe + 2  # the two are not counted


class Kinks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0.9 * x + 0.3 * self.layers(torch.cat([x, labels[:, None] / 999], 1))


@pytest.mark.parametrize("kind", [Counted, Kinks])
@every_mode
def test_other_networks_are_not_asked_once_more(options: dict[str, Any], kind: Any) -> None:
    network, calls = kind(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tolerance in (1e-3, 1e-5, 1e-6):
            calls.clear()
            solution = sampler_of(options, rtol=tolerance, atol=tolerance, max_steps=1000).solve(network)
            assert len(calls) == solution.nfe


def test_a_failure_for_another_reason() -> None:
    """The network is asked, and found to be without noise."""
    network = Counted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = sampler_of({}, on_failure="status", max_steps=5).solve(network)
    assert "max_steps = 5" in solution.message and "Dropout" not in solution.message
    assert network.calls == solution.nfe + 2


def test_dropout_that_is_left_on() -> None:
    """functional.dropout does not know of evaluation mode. Also where there are many steps and few rejected ones."""
    linear = nn.Linear(3, 3)

    def network(x: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * x + 0.1 * F.dropout(linear(x), 0.5)  # training=True is the default

    with pytest.warns(UserWarning, match=WARNING):
        sampler_of({"method": "RK23"}, on_failure="status", max_steps=300).solve(network)
    with pytest.warns(UserWarning, match=WARNING):
        likelihood.get_likelihood_fn(VP, lambda x: x, max_steps=100, on_failure="status")(network, torch.randn(SHAPE))
    sde = stochastic.get_sde_sampler(
        VP,
        SHAPE,
        lambda x: x,
        method="adaptive",
        rtol=1e-3,
        atol=1e-3,
        max_steps=100,
        device="cpu",
        on_failure="status",
    )
    with pytest.warns(UserWarning, match=WARNING):
        sde(network)
    with pytest.warns(UserWarning, match=WARNING):  # a function, and a failure
        integrate.solve(
            lambda t, y: -y * (1 + 0.1 * torch.rand_like(y)), (0.0, 1.0), torch.ones(SHAPE), max_steps=50,
            on_failure="status",
        )  # fmt: skip


def test_noise_below_the_tolerance_is_not_blamed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = sampler_of({}, on_failure="status", max_steps=5).solve(Counted(1e-9))
    assert "Dropout" not in solution.message


@pytest.mark.parametrize("options", [{}, {"control": "per_sample"}, {"method": "unipc"}], ids=str)
def test_on_a_device(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step and in captured loops, where nothing can be asked within a step: at the end."""
    monkeypatch.setattr(graphs, "backend_of", lambda _: FakeDevice())
    network = NoisyByCount()
    for graph in ("off", "while"):
        with pytest.warns(UserWarning, match=WARNING) as said:
            sampler_of(options, on_failure="status", graph=graph, max_steps=20).solve(network)
        assert len(said) == 1


class NoisyByCount(nn.Module):
    """Noise that is no torch random number, which no graph takes: the network's own counter makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Counted().network
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.count.add_(1.0)
        return self.network(x, labels) * (1 + 0.03 * torch.sin(1e3 * self.count + 10 * x))


def test_a_network_that_raises_when_it_is_asked_again() -> None:
    """What it raises is not in the way of what was found."""
    calls = []

    def network(x: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 32:
            raise RuntimeError("no more")
        return 0.3 * x

    solution = sampler_of({}, on_failure="status", max_steps=5, rtol=1e-12, atol=1e-6).solve(network)
    assert (solution.status == integrate.Status.MAX_STEPS).all() and math.isnan(solution.y[0, 0])


@pytest.mark.parametrize("method", ["RK45", "unipc"])
def test_a_stream_names_it_once(method: str) -> None:
    sampler = sampler_of({"method": method, "control": "per_sample", "max_steps": 20})
    with pytest.warns(UserWarning, match=WARNING) as said:
        groups = list(sampler.stream(Counted(0.01), slots=2))
    assert len(said) == 1
    assert all((group.status == integrate.Status.MAX_STEPS).all() for group in groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(sampler.stream(Counted(), slots=2))  # too few steps, but no noise
