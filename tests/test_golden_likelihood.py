"""Likelihoods and latent codes against upstream's."""

import pytest
import torch
from golden import every_case, expected, recorded, rounding
from golden.solves import likelihood_of

SPREADS = 4  # as in test_golden_ode.py; bpd and z have spreads of their own


@every_case("likelihood")
@pytest.mark.parametrize("array", ["bpd", "z"])
def test_likelihood(name: str, array: str) -> None:
    bpd, z, _ = likelihood_of(name)
    actual, wanted = {"bpd": bpd, "z": z}[array], expected("likelihood", name, array)
    assert actual.dtype == torch.float32
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= SPREADS * rounding("likelihood")[name]["spread"][array]


@every_case("likelihood", lambda case: case["model"] == "gauss")
def test_likelihood_against_exact_density(name: str) -> None:
    """Gaussian data have a known density, and a linear, diagonal score: Rademacher's estimate of it is exact."""
    bpd, _, _ = likelihood_of(name)
    exact = recorded("likelihood", name, "bpd_analytic_f64")
    upstream_error = (expected("likelihood", name, "bpd") - exact).abs().max()
    slack = SPREADS * rounding("likelihood")[name]["spread"]["bpd"]
    assert (bpd - exact).abs().max() <= upstream_error + slack
