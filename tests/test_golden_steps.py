"""One update of every predictor and corrector against arrays recorded from upstream."""

from collections.abc import Callable

import torch
from golden import Case, arrays, assert_rounding, cases, every_case, expected, make_sde, recorded
from networks import GaussianModel
from torch import Tensor

from scoresde_ext import noise, sampling
from scoresde_ext.models import utils as mutils

# An update is x + (drift or step * score) + noise: known to a few roundings of its largest term, which is of the size
# of the sample.  Langevin's step size is a ratio of norms, known to a few roundings itself.
ROUNDINGS = 16

SECTION = arrays("steps")
Z, T = SECTION["z"], SECTION["t"]


def setting(name: str) -> tuple[Case, str, Callable[[Tensor, Tensor], Tensor]]:
    """The case, the name of the case that stores its input and score, and the score function."""
    case = cases("steps")[name]
    network = GaussianModel(f"{case['kind']}_cont", case["p0"], case["p1"], case["N"], **case["gauss"])
    score_fn = mutils.get_score_fn(make_sde(case), network, train=False, continuous=True)
    return case, f"{name.partition('_')[0]}_euler_maruyama_pf0", score_fn


@every_case("steps", lambda case: case.get("predictor") == "euler_maruyama")
def test_score(name: str) -> None:
    _, home, score_fn = setting(name)
    assert_rounding(score_fn(recorded("steps", home, "x_in"), T), expected("steps", home, "score"), ROUNDINGS)


@every_case("steps", lambda case: "predictor" in case)
def test_predictor(name: str) -> None:
    case, home, score_fn = setting(name)
    predictor = sampling.get_predictor(case["predictor"])(make_sde(case), score_fn, case["probability_flow"])
    with noise.replay([Z[0]]):  # drawn also with probability flow, where nothing is added
        x, x_mean = predictor.update_fn(recorded("steps", home, "x_in"), T)
    assert_rounding(x, expected("steps", name, "x_out"), ROUNDINGS)
    assert_rounding(x_mean, expected("steps", name, "x_mean"), ROUNDINGS)
    if case["probability_flow"]:
        assert torch.equal(x, x_mean)


@every_case("steps", lambda case: "corrector" in case)
def test_corrector(name: str) -> None:
    case, home, score_fn = setting(name)
    corrector = sampling.get_corrector(case["corrector"])(make_sde(case), score_fn, case["snr"], case["n_steps"])
    with noise.replay(Z[: case["n_steps"]]):
        x, x_mean = corrector.update_fn(recorded("steps", home, "x_in"), T)
    assert_rounding(x, expected("steps", name, "x_out"), ROUNDINGS)
    assert_rounding(x_mean, expected("steps", name, "x_mean"), ROUNDINGS)
