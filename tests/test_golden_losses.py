"""Losses, their gradients and score functions against arrays recorded from upstream."""

from collections.abc import Callable

import torch
from golden import Case, arrays, assert_rounding, cases, every_case, expected, make_sde, recorded
from networks import ToyModel
from torch import Tensor, nn

from scoresde_ext import losses, noise
from scoresde_ext.models import utils as mutils

# A loss is a sum of squares of residuals: nothing cancels in the sum, so it is known to the residuals' own roundings.
# In r = c out + d z, 1/std multiplies both terms alike; g^2 and std carry up to 8 roundings (test_golden_sde.py), and
# squares double them.  `expected` is exact where upstream lost digits (u_edge holds u = 0: t = 1e-5).
ROUNDINGS = 24

SECTION = arrays("losses")
X0, Z = SECTION["x0"], SECTION["z"]


class Probe(nn.Module):
    """A network that keeps what it saw and what it returned, the latter as a leaf to take gradients from."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.network = ToyModel(**case["toy"])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.x, self.labels = x.detach().clone(), labels.detach().clone()
        self.out = self.network(x, labels).detach().requires_grad_()
        return self.out


def make_loss(case: Case) -> Callable[[nn.Module, Tensor], Tensor]:
    sde = make_sde(case)
    if case["fn"] == "get_sde_loss_fn":
        return losses.get_sde_loss_fn(
            sde, True, reduce_mean=case["reduce_mean"], continuous=case["continuous"],
            likelihood_weighting=case["likelihood_weighting"], eps=case["eps"],
        )  # fmt: skip
    return getattr(losses, case["fn"])(sde, True, reduce_mean=case["reduce_mean"])


def first_draw(name: str) -> Tensor:
    """What torch.rand (continuous) or torch.randint (discrete) returned."""
    case = cases("losses")[name]
    return SECTION[case["u"]] if "u" in case else recorded("losses", name, "labels").long()


@every_case("losses", lambda case: case["fn"] != "get_score_fn")
def test_loss(name: str) -> None:
    loss_fn, probe = make_loss(cases("losses")[name]), Probe(cases("losses")[name])
    with noise.replay([first_draw(name), Z]):
        loss = loss_fn(probe, X0)
    loss.backward()
    assert_rounding(loss.detach(), expected("losses", name, "loss"), ROUNDINGS)
    assert_rounding(probe.out.grad, expected("losses", name, "grad_out"), ROUNDINGS)

    if f"{name}/perturbed" in SECTION:
        # labels and perturbed batch are what the network saw; 999 t and sigma(t) are one exp or product away from u
        assert_rounding(probe.x, recorded("losses", name, "perturbed"), ROUNDINGS)
        assert_rounding(probe.labels.float(), recorded("losses", name, "labels"), ROUNDINGS)
        assert_rounding(probe.out.detach(), recorded("losses", name, "model_out"), ROUNDINGS)


@every_case("losses", lambda case: case["fn"] != "get_score_fn")
def test_loss_of_one_sample(name: str) -> None:
    loss_fn, probe = make_loss(cases("losses")[name]), Probe(cases("losses")[name])
    wanted = expected("losses", name, "per_sample")
    u = first_draw(name)
    for i in range(len(X0)):
        with noise.replay([u[i : i + 1], Z[i : i + 1]]):
            loss = loss_fn(probe, X0[i : i + 1])
        assert_rounding(loss.detach(), wanted[i], ROUNDINGS)


@every_case("losses", lambda case: case["fn"] == "get_score_fn")
def test_score_fn(name: str) -> None:
    case = cases("losses")[name]
    probe = Probe(case)
    score_fn = mutils.get_score_fn(make_sde(case), probe, train=False, continuous=case["continuous"])
    score = score_fn(X0, SECTION["score_fn_t"])
    labels = recorded("losses", name, "labels")
    if name == "score_fn_ve_cont0":
        assert probe.labels.dtype == torch.int64
    assert_rounding(probe.labels.float(), labels, ROUNDINGS)
    assert_rounding(score.detach(), expected("losses", name, "score"), ROUNDINGS)
