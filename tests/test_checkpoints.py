"""Checkpoints: what is saved comes back, whatever wraps the network; what does not fit changes nothing."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_networks import Tiny
from torch import Tensor, nn

from scoresde_ext import losses, sde_lib, utils
from scoresde_ext.job.networks import load_weights
from scoresde_ext.models.ema import ExponentialMovingAverage


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def make_state(model: nn.Module, step: Any = 0, decay: Any = 0.9, **options: Any) -> dict[str, Any]:
    """After one update."""
    optimizer = torch.optim.Adam(model.parameters(), **options)
    average = ExponentialMovingAverage(model.parameters(), decay)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    average.update(model.parameters())
    return {"model": model, "optimizer": optimizer, "ema": average, "step": step}


def contents(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value if key == "step" else value.state_dict() for key, value in state.items()})


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS: dict[str, dict[str, Any]] = {
    "numpy step": {"step": np.int32(3)}, "tensor step": {"step": torch.tensor(3)}, "whole float": {"step": 3.0},
    "decay": {"decay": np.float32(0.25)}, "learning rate": {"lr": np.float32(0.25)},
    "betas": {"betas": (np.float64(0.25), np.float64(0.75))}, "flag": {"amsgrad": np.bool_(True)},
    "tensor learning rate": {"lr": torch.tensor(0.25)},
}  # fmt: skip


@pytest.mark.parametrize("numbers", NUMBERS)
def test_numpy_numbers_come_back_as_pythons(numbers: str, tmp_path: Path) -> None:
    saved = make_state(Net(), **({"step": 3} | NUMBERS[numbers]))
    utils.save_checkpoint(tmp_path / "c.pth", saved)
    restored = utils.restore_checkpoint(tmp_path / "c.pth", make_state(Net()), "cpu")
    assert_same(contents(restored), contents(saved | {"step": 3}))
    (group,) = restored["optimizer"].param_groups
    numbers_in = [restored["step"], restored["ema"].decay, group["lr"], *group["betas"], group["amsgrad"]]
    assert {type(v) for v in numbers_in} <= {int, float, bool, Tensor}
    assert isinstance(group["lr"], Tensor) == (numbers == "tensor learning rate")  # as the optimizer asked for


@pytest.mark.parametrize(
    "value", [np.ones(2), np.str_("text"), Path("a"), np.longdouble(1)], ids=lambda v: type(v).__name__
)
def test_what_would_not_be_read_is_not_written(value: Any, tmp_path: Path) -> None:
    utils.save_checkpoint(tmp_path / "c.pth", make_state(Net(), step=1))
    state = make_state(Net(), step=2)
    state["optimizer"].param_groups[0]["notes"] = {"deep": [1, value]}
    if isinstance(value, np.str_):  # a string is one
        utils.save_checkpoint(tmp_path / "c.pth", state)
    else:
        place = r"state\['optimizer'\]\['param_groups'\]\[0\]\['notes'\]\['deep'\]\[1\]: expected tensors, numbers"
        with pytest.raises(ValueError, match=place):
            utils.save_checkpoint(tmp_path / "c.pth", state)
    wanted = 2 if isinstance(value, np.str_) else 1
    assert utils.restore_checkpoint(tmp_path / "c.pth", make_state(Net()), "cpu")["step"] == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_a_step_is_a_whole_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step: expected a whole number, got 2\.5"):
        utils.save_checkpoint(tmp_path / "c.pth", make_state(Net(), step=2.5))
    assert not list(tmp_path.iterdir())


# --- wrappers ---------------------------------------------------------------------------------------------------------


def inner_compiled(net: Net) -> Net:
    net.inner = torch.compile(net.inner)
    return net


def inner_parallel(net: Net) -> Net:
    net.inner = nn.DataParallel(net.inner)
    return net


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "none": lambda net: net,
    "parallel": nn.DataParallel,
    "compiled": torch.compile,
    "parallel, compiled": lambda net: torch.compile(nn.DataParallel(net)),
    "compiled, parallel": lambda net: nn.DataParallel(torch.compile(net)),
    "inner compiled": inner_compiled,
    "inner parallel, all compiled": lambda net: torch.compile(inner_parallel(net)),
}


@pytest.mark.parametrize(("saved_in", "restored_in"), list(itertools.product(WRAPPERS, WRAPPERS)))
def test_wrappers_are_added_and_dropped(saved_in: str, restored_in: str, tmp_path: Path) -> None:
    saved, restored = Net(), Net()
    utils.save_checkpoint(tmp_path / "c.pth", make_state(WRAPPERS[saved_in](saved), step=5))
    state = utils.restore_checkpoint(tmp_path / "c.pth", make_state(WRAPPERS[restored_in](restored)), "cpu")
    assert state["step"] == 5
    assert_same(list(restored.state_dict().values()), list(saved.state_dict().values()))


def test_attributes_named_like_a_wrapper(tmp_path: Path) -> None:
    """Names that differ by ``module.`` alone mean what they say; one such attribute is found by any name."""

    def make(both: bool) -> nn.Module:
        net = nn.Module()
        net.module = nn.Linear(2, 2)
        net.weight = nn.Parameter(torch.randn(2, 2)) if both else None
        net.other = nn.Parameter(torch.randn(2))
        return net

    for both in (False, True):
        saved, restored = make(both), make(both)
        utils.save_checkpoint(tmp_path / "c.pth", make_state(saved))
        utils.restore_checkpoint(tmp_path / "c.pth", make_state(restored), "cpu")
        assert_same(restored.state_dict(), saved.state_dict())


class Versioned(nn.Linear):
    """A later version of itself, which reads earlier weights another way."""

    _version = 3

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.loaded = metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


@pytest.mark.parametrize(
    ("saved_in", "restored_in"), list(itertools.product(["none", "parallel", "compiled"], repeat=2))
)
def test_modules_learn_the_version_that_was_saved(saved_in: str, restored_in: str, tmp_path: Path) -> None:
    restored = nn.Sequential(Versioned(2, 2))
    utils.save_checkpoint(tmp_path / "c.pth", make_state(WRAPPERS[saved_in](nn.Sequential(Versioned(2, 2)))))
    utils.restore_checkpoint(tmp_path / "c.pth", make_state(WRAPPERS[restored_in](restored)), "cpu")
    assert restored[0].loaded == 3


@pytest.mark.parametrize("which", ["ema", "model"])
@pytest.mark.parametrize("wrapper", ["none", "parallel", "compiled", "parallel, compiled"])
def test_jobs_read_wrapped_checkpoints(wrapper: str, which: str, tmp_path: Path) -> None:
    """Also into a network that comes frozen."""
    saved = Tiny()
    state = make_state(WRAPPERS[wrapper](saved))
    utils.save_checkpoint(tmp_path / "c.pth", state)
    wanted = state["ema"].shadow_params if which == "ema" else [p.detach() for p in saved.parameters()]
    for frozen in (False, True):
        network = Tiny().requires_grad_(not frozen)
        load_weights(network, str(tmp_path / "c.pth"), which)
        assert_same([p.detach() for p in network.parameters()], wanted)


# --- what does not fit ------------------------------------------------------------------------------------------------


def without(part: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k != key}


def other_moments(optimizer: dict[str, Any]) -> dict[str, Any]:
    optimizer["state"][1]["exp_avg"] = torch.zeros(7)
    return optimizer


MISFITS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "a weight is missing": (
        "model", lambda p: without(p, "inner.2.weight"), RuntimeError, r"Missing key.*inner\.2\.weight"
    ),
    "a weight too many": ("model", lambda p: p | {"more": torch.ones(1)}, RuntimeError, r"Unexpected key.*more"),
    "another shape": (
        "model", lambda p: p | {"inner.2.weight": torch.ones(5, 5)}, RuntimeError, r"size mismatch for inner\.2\.weight"
    ),
    "fewer parameters": (
        "optimizer", lambda p: torch.optim.Adam([nn.Parameter(torch.ones(1))]).state_dict(), ValueError,
        r"optimizer: expected the state of \[6\] parameters in its groups, got \[1\]",
    ),
    "other moments": (
        "optimizer", other_moments, ValueError, r"optimizer: expected exp_avg of shape \(3,\) for .* 1, got \(7,\)"
    ),
    "fewer averages": (
        "ema", lambda p: p | {"shadow_params": p["shadow_params"][:2]}, ValueError, "shadow_params: .* the 6 .* got 2"
    ),
    "no decay": ("ema", lambda p: without(p, "decay"), KeyError, "decay"),
    "a decay beyond 1": ("ema", lambda p: p | {"decay": 1.5}, ValueError, r"decay: expected .* got 1\.5"),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_named_and_changes_nothing(misfit: str, tmp_path: Path) -> None:
    part, change, error, message = MISFITS[misfit]
    file = contents(make_state(Net(), step=5))
    torch.save(file | {part: change(file[part])}, tmp_path / "c.pth")
    state = make_state(Net(), step=2, lr=0.5)
    before = contents(state)
    with pytest.raises(error, match=f"(?s){message}"):
        utils.restore_checkpoint(tmp_path / "c.pth", state, "cpu")
    assert_same(contents(state), before)


def test_a_state_without_a_key_is_named(tmp_path: Path) -> None:
    state, path = make_state(Net()), tmp_path / "checkpoint.pth"
    utils.save_checkpoint(path, state)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    uses: list[Callable[[dict[str, Any]], Any]] = [
        lambda wrong: utils.save_checkpoint(tmp_path / "other.pth", wrong),
        lambda wrong: utils.restore_checkpoint(path, wrong, "cpu"),
        lambda wrong: losses.get_step_fn(sde_lib.VPSDE(), True, print)(wrong, torch.ones(2, 3)),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="^state: expected the keys .*, got one without optimizer, ema, step"):
            use({"model": model})
    assert_same(model.state_dict(), before)
    assert not (tmp_path / "other.pth").exists()
