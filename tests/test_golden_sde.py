"""SDE coefficients, marginals, tables and priors against arrays recorded from upstream."""

import pytest
import torch
from golden import Case, arrays, assert_rounding, cases, every_case, expected, make_sde, recorded
from torch import Tensor

# t[0] = 1e-5 and t[1] = 1e-3, where upstream's 1 - exp(2 l) keeps 2 to 5 digits only: `expected` is exact there.
#
# Coefficients are elementary functions of l = log m with |l| <= 5: float32 rounds l by 2^-24 |l|, so exp(l) is known to
# |l| roundings and then a handful more; 8 covers it.  Drifts and discrete drifts are differences of terms as large as x
# or g^2 score, so they are known relative to their sample's largest entry or to |x|.
ROUNDINGS = 8

SECTION = arrays("sde")
X, T, SCORE = SECTION["x"], SECTION["t"], SECTION["score"]
SIZE = X.abs().flatten(1).amax(1)


def discrete_roundings(case: Case) -> float:
    """VE's G^2 is a difference of neighbouring squares, sigma^2 (1 - r^2): a rounding counts 1 / (1 - r^2) times."""
    if case["kind"] != "ve":
        return ROUNDINGS
    return ROUNDINGS + 1 / (1 - (case["p0"] / case["p1"]) ** (2 / (case["N"] - 1)))


def known_score(x: Tensor, t: Tensor) -> Tensor:
    return SCORE.to(x.dtype)


@every_case("sde")
def test_marginal_prob(name: str) -> None:
    mean, std = make_sde(cases("sde")[name]).marginal_prob(X, T)
    assert_rounding(mean, expected("sde", name, "mean"), ROUNDINGS)
    assert_rounding(std, expected("sde", name, "std"), ROUNDINGS)


@every_case("sde")
def test_forward_coefficients(name: str) -> None:
    sde = make_sde(cases("sde")[name])
    drift, diffusion = sde.sde(X, T)
    assert_rounding(drift, expected("sde", name, "drift"), ROUNDINGS)
    assert_rounding(diffusion, expected("sde", name, "diffusion"), ROUNDINGS)
    f, G = sde.discretize(X, T)
    # VP's f is (sqrt(alpha) - 1) x, a difference of two numbers of the size of x
    assert_rounding(f, expected("sde", name, "disc_f"), ROUNDINGS, scale=SIZE)
    assert_rounding(G, expected("sde", name, "disc_G"), discrete_roundings(cases("sde")[name]))


@every_case("sde")
@pytest.mark.parametrize("probability_flow", [False, True], ids=["sde", "probability_flow"])
def test_reverse(name: str, probability_flow: bool) -> None:
    forward = make_sde(cases("sde")[name])
    sde = forward.reverse(known_score, probability_flow)
    assert (sde.N, sde.T, sde.probability_flow) == (forward.N, 1, probability_flow)
    flow = f"pf{int(probability_flow)}"

    drift, diffusion = sde.sde(X, T)
    assert_rounding(drift, expected("sde", name, f"rev_drift_{flow}"), ROUNDINGS)
    if probability_flow:
        assert isinstance(diffusion, float) and diffusion == 0.0
    else:
        assert_rounding(diffusion, expected("sde", name, "rev_diffusion_pf0"), ROUNDINGS)

    f, G = sde.discretize(X, T)
    wanted = expected("sde", name, f"rev_disc_f_{flow}")
    roundings = discrete_roundings(cases("sde")[name])
    assert_rounding(f, wanted, roundings, scale=torch.maximum(SIZE, wanted.abs().flatten(1).amax(1)))
    assert_rounding(G, expected("sde", name, f"rev_disc_G_{flow}"), roundings)


@every_case("sde")
def test_float64(name: str) -> None:
    """Double precision in, double precision out; the discrete tables stay float32, as upstream's."""
    sde = make_sde(cases("sde")[name])
    x, t = X.double(), T.double()
    reverse = {pf: sde.reverse(known_score, pf) for pf in (False, True)}
    mean, std = sde.marginal_prob(x, t)
    drift, diffusion = sde.sde(x, t)
    reverse_drift, reverse_diffusion = reverse[False].sde(x, t)
    flow_drift, _ = reverse[True].sde(x, t)
    for array, actual in {
        "mean": mean, "std": std, "drift": drift, "diffusion": diffusion,
        "rev_drift_pf0": reverse_drift, "rev_diffusion_pf0": reverse_diffusion, "rev_drift_pf1": flow_drift,
    }.items():  # fmt: skip
        assert actual.dtype == torch.float64, array
        shown = actual[:, 0, 0, :2] if actual.ndim == 4 else actual
        # upstream's own 1 - exp() loses 6 of float64's 16 digits at t = 1e-5
        torch.testing.assert_close(shown, recorded("sde", name, f"{array}_f64"), rtol=1e-9, atol=1e-12)

    f, G = sde.discretize(x, t)
    reverse_f, reverse_G = reverse[False].discretize(x, t)
    flow_f, flow_G = reverse[True].discretize(x, t)
    roundings = discrete_roundings(cases("sde")[name])
    for array, actual in {"disc_f": f, "rev_disc_f_pf0": reverse_f, "rev_disc_f_pf1": flow_f}.items():
        wanted = recorded("sde", name, f"{array}_f64")
        scale = torch.maximum(SIZE, wanted.abs().flatten(1).amax(1))  # float32 alphas, betas, sigmas
        assert_rounding(actual[:, 0, 0, :2], wanted, roundings, scale=scale)
    for array, actual in {"disc_G": G, "rev_disc_G_pf0": reverse_G, "rev_disc_G_pf1": flow_G}.items():
        assert_rounding(actual, recorded("sde", name, f"{array}_f64"), roundings)


@every_case("sde")
def test_prior(name: str) -> None:
    sde = make_sde(cases("sde")[name])
    # a sum of 48 squares and a constant of the same sign
    assert_rounding(sde.prior_logp(X), recorded("sde", name, "prior_logp"), ROUNDINGS)
    torch.manual_seed(123)
    assert torch.equal(sde.prior_sampling((2, 3, 4, 4)), recorded("sde", name, "prior_sampling_manual_seed_123"))


@every_case("sde")
def test_tables(name: str) -> None:
    sde = make_sde(cases("sde")[name])
    stored = {key.rpartition("table_")[2]: value for key, value in SECTION.items() if key.startswith(f"{name}/table_")}
    assert bool(stored) == (not name.startswith("subvp"))
    for table, wanted in stored.items():
        # alphas_cumprod is a running product of up to 1000 factors, each rounded once: sqrt(1000) < 32 roundings
        assert_rounding(getattr(sde, table), wanted, 32 if "cumprod" in table else ROUNDINGS)
