"""Whole predictor-corrector runs against samples and trajectories recorded from upstream."""

from golden import assert_rounding, cases, every_case, expected, make_network, make_sde, recorded, to_unit_range
from torch import Tensor, nn

from scoresde_ext import noise, sampling

# A run adds up 30 to 120 updates, each a few roundings from upstream's (test_golden_steps.py) in either direction: a
# random walk of some ten roundings of the largest value, which the following steps contract.
ROUNDINGS = 32


class Recorder(nn.Module):
    """A network that keeps a copy of every state it was called with: the sampler's trajectory, seen from outside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.states: list[Tensor] = []

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.states.append(x.clone())
        return self.network(x, labels)


def run(name: str, denoise: bool) -> tuple[Tensor, int, list[Tensor]]:
    """Samples, nfe and the states the network saw."""
    case = cases("pc")[name]
    sampler = sampling.get_pc_sampler(
        make_sde(case), tuple(case["shape"]), sampling.get_predictor(case["predictor"]),
        sampling.get_corrector(case["corrector"]), to_unit_range, case["snr"], n_steps=case["n_steps"],
        probability_flow=case["probability_flow"], continuous=case["continuous"], denoise=denoise, eps=case["eps"],
        device="cpu",
    )  # fmt: skip
    network = Recorder(make_network(case))
    with noise.replay(recorded("pc", name, "noise")):
        samples, nfe = sampler(network)
    return samples, nfe, network.states


@every_case("pc")
def test_samples(name: str) -> None:
    samples, nfe, _ = run(name, denoise=True)
    assert_rounding(samples, expected("pc", name, "x_denoised"), ROUNDINGS)
    assert nfe == cases("pc")[name]["nfe"]


@every_case("pc")
def test_trajectory(name: str) -> None:
    samples, _, states = run(name, denoise=False)
    assert_rounding(samples, expected("pc", name, "x_raw"), ROUNDINGS)

    # the state after the predictor of steps 4, 9, ... is what the network sees first in steps 5, 10, ...
    wanted = expected("pc", name, "traj_every5")
    assert len(states) % cases("pc")[name]["N"] == 0
    calls = len(states) // cases("pc")[name]["N"]
    seen = [states[step * calls] for step in range(5, 30, 5)] + [samples * 2 - 1]
    for actual, target in zip(seen, wanted, strict=True):
        assert_rounding(actual, target, ROUNDINGS)
