"""Six training steps and one evaluation of a small network against upstream's losses, weights and averages."""

from types import SimpleNamespace
from typing import Any

import torch
from golden import Case, arrays, assert_rounding, cases, every_case, expected, make_sde, recorded
from networks import TinyTrainNet
from torch import Tensor

from scoresde_ext import losses, noise
from scoresde_ext.models.ema import ExponentialMovingAverage

# Losses are sums of squares.  Adam divides every gradient element by its own running size, so an element that cancels
# to a small value carries a large relative error into its weight; but a step is at most lr = 2e-3 long, and 16
# roundings of numbers of the size of a weight (0.2) are 2e-4 of that.
ROUNDINGS = 16

SECTION = arrays("train")
STEPS = 6


def make_state(case: Case) -> tuple[dict[str, Any], SimpleNamespace]:
    """Upstream's training state and the configuration it was made from."""
    optim = SimpleNamespace(
        optimizer="Adam", lr=case["lr"], beta1=0.9, eps=1e-8, weight_decay=0, warmup=case["warmup"],
        grad_clip=case["grad_clip"],
    )  # fmt: skip
    config = SimpleNamespace(optim=optim)
    model = TinyTrainNet()
    with torch.no_grad():
        model.conv.weight.copy_(SECTION["conv_w0"])
        model.conv.bias.copy_(SECTION["conv_b0"])
        model.g.fill_(0.05)
    assert [key for key, _ in model.named_parameters()] == case["param_order"]
    optimizer = losses.get_optimizer(config, model.parameters())
    ema = ExponentialMovingAverage(model.parameters(), decay=case["ema"])
    return {"model": model, "optimizer": optimizer, "ema": ema, "step": 0}, config


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@every_case("train")
def test_training(name: str) -> None:
    case = cases("train")[name]
    state, config = make_state(case)
    weighting = {"reduce_mean": case["reduce_mean"], "likelihood_weighting": case["likelihood_weighting"]}
    sde = make_sde(case)
    train_step = losses.get_step_fn(
        sde, train=True, optimize_fn=losses.optimization_manager(config), continuous=True, **weighting
    )
    wanted = {array: expected("train", name, array) for array in ("losses", "params", "shadow")}
    for i in range(STEPS):
        with noise.replay([SECTION["u"][i], SECTION["z"][i]]):
            loss = train_step(state, SECTION["batches"][i])
        assert_rounding(loss.detach(), wanted["losses"][i], ROUNDINGS)
        (group,) = state["optimizer"].param_groups
        assert group["lr"] == recorded("train", name, "lrs_f64")[i].item()  # warm-up: the first step has lr 0
        assert_rounding(flat(state["model"].parameters()), wanted["params"][i], ROUNDINGS, scale=0.2)
        assert_rounding(flat(state["ema"].shadow_params), wanted["shadow"][i], ROUNDINGS, scale=0.2)
    assert state["step"] == case["step"]
    assert state["ema"].num_updates == case["num_updates"]

    trained = flat(state["model"].parameters())
    eval_step = losses.get_step_fn(sde, train=False, optimize_fn=None, continuous=True, **weighting)
    with noise.replay([SECTION["u"][STEPS], SECTION["z"][STEPS]]):
        loss = eval_step(state, SECTION["batches"][STEPS])
    assert_rounding(loss, recorded("train", name, "eval_loss"), ROUNDINGS)
    assert not loss.requires_grad
    assert torch.equal(flat(state["model"].parameters()), trained)  # the average was put in and taken out again
    assert state["step"] == case["step"]
