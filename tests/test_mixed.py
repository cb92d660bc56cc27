"""Programs that take some of their modules from us and keep others: every combination computes what the program alone
computes, or is refused.

``program/`` is a program of upstream's layout. Its flat module names are either its own files or ours, and a few forks
change what programs change: the label of t = 1, the scale of the network's output, the schedule, another SDE.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mixtures import MODULES, program
from torch import Tensor, nn

from scoresde_ext import noise

COMBINATIONS = [
    tuple(itertools.compress(MODULES, chosen)) for chosen in itertools.product([False, True], repeat=len(MODULES))
]
SHAPE = (2, 3, 2, 2)
N = 6


class Network(nn.Module):
    """Depends on its labels and on its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        wave = 1.0 + 0.5 * torch.sin(labels.float() / 50)
        return self.weight * torch.tanh(x) * wave[:, None, None, None] + (0.01 if self.training else 0.0)


SDES: dict[str, Callable[[Any], Any]] = {
    "vp": lambda lib: lib.VPSDE(0.1, 5.0, N),
    "subvp": lambda lib: lib.subVPSDE(0.1, 5.0, N),
    "ve": lambda lib: lib.VESDE(0.01, 5.0, N),
    "added": lambda lib: lib.ConstantSDE(N),
}


def same(x: Any) -> Any:
    return x


def draws(n: int) -> list[Tensor]:
    return list(torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1)))


def results(modules: SimpleNamespace, kind: str) -> dict[str, Any]:
    """What a program asks for; an exception in the place of what it raises."""
    sde, network, (batch, *z) = SDES[kind](modules.sde_lib), Network(), draws(22)
    discrete = kind in ("vp", "ve")
    losses, sampling = modules.losses, modules.sampling

    def pc() -> Tensor:
        predictor = "ancestral_sampling" if discrete else "euler_maruyama"
        sampler = sampling.get_pc_sampler(
            sde, SHAPE, sampling.get_predictor(predictor), sampling.get_corrector("langevin") if discrete else None,
            same, 0.16, continuous=kind != "ve", eps=1e-2, device="cpu",
        )  # fmt: skip
        return sampler(network)[0]

    loose = {"rtol": 1e-2, "atol": 1e-2, "eps": 1e-2}
    asked: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "loss": (
            lambda: losses.get_sde_loss_fn(sde, True, likelihood_weighting=kind == "subvp")(network, batch),
            [torch.tensor([0.2, 0.7]), z[0]],
        ),
        "pc": (pc, z[: 1 + N * (1 + discrete)]),
        "ode": (
            lambda: sampling.get_ode_sampler(sde, SHAPE, same, denoise=True, device="cpu", **loose)(network)[0],
            z[:2],
        ),
        "likelihood": (
            lambda: modules.likelihood.get_likelihood_fn(sde, same, hutchinson_type="Gaussian", **loose)(
                network, batch.clone()
            )[0],
            z[:1],
        ),
    }
    if discrete:
        make = losses.get_ddpm_loss_fn if kind == "vp" else losses.get_smld_loss_fn
        asked["discrete"] = (lambda: make(sde, True)(network, batch), [torch.tensor([1, 4]), z[0]])
    return {name: outcome(*call) for name, call in asked.items()}


def outcome(call: Callable[[], Tensor], recorded: list[Tensor]) -> Any:
    try:
        with noise.replay(recorded), noise.torch_draws():
            return call().detach()
    except NotImplementedError as error:
        return error
    except RuntimeError as error:  # the refusal comes first, and leaves the noise
        if isinstance(error.__context__, NotImplementedError):
            return error.__context__
        raise


@pytest.fixture(autouse=True)
def recorded_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """noise.torch_draws leaves torch.randint alone."""
    monkeypatch.setattr(torch, "randint", lambda low, high, size, device: noise.integers(high, torch.empty(size)))


@pytest.mark.parametrize(
    ("fork", "kind"),
    [
        ("upstream", "vp"),
        ("upstream", "subvp"),
        ("upstream", "ve"),
        ("labels", "vp"),
        ("scale", "ve"),
        ("schedule", "vp"),
    ],
)
def test_every_combination_computes_what_the_program_computes(fork: str, kind: str) -> None:
    wanted = {}
    for name in {"upstream", fork}:
        with program((), name) as modules:
            wanted[name] = results(modules, kind)
    changed = "sde_lib" if fork == "schedule" else "models.utils"
    assert fork == "upstream" or not close(wanted[fork]["loss"], wanted["upstream"]["loss"])
    wrong = []
    for ours in COMBINATIONS[1:]:
        with program(ours, fork) as modules:
            found = results(modules, kind)
        # A module that is ours has not the change.
        for name, right in wanted["upstream" if changed in ours else fork].items():
            # Upstream's std loses digits at small times.
            if not isinstance(found[name], Tensor) or not close(found[name], right):
                wrong.append((name, ours, found[name], right))
    assert not wrong


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 2e-3 * b.abs().max())


def test_an_added_sde_is_read_by_the_programs_own_score_function_or_refused() -> None:
    with program(()) as modules:
        wanted = results(modules, "added")
    for ours in COMBINATIONS[1:]:
        if "sde_lib" in ours:  # which has no such class
            continue
        with program(ours) as modules:
            found = results(modules, "added")
        for name, right in wanted.items():
            if "models.utils" in ours:
                assert isinstance(found[name], NotImplementedError), (name, ours)
                assert str(found[name]).startswith("sde: expected VPSDE, subVPSDE or VESDE"), (name, ours)
            else:
                assert close(found[name], right), (name, ours)
