"""Probability-flow samples against upstream's, which scipy integrated in float64 around a float32 network."""

import torch
from golden import every_case, expected, recorded, rounding
from golden.solves import sample_by_ode

# A step size is a power of an error norm, a small difference of large numbers: rounded otherwise, upstream's own result
# moves by the case's `spread`.  Ours may lie on either side of what was recorded.
SPREADS = 4


@every_case("ode")
def test_sample(name: str) -> None:
    x, _ = sample_by_ode(name)
    wanted = expected("ode", name, "x")
    assert x.dtype == torch.float32
    assert (x - wanted).abs().max() <= SPREADS * rounding("ode")[name]["spread"]["x"]


@every_case("ode", lambda case: f"{case['kind']}_gauss_RK45_1e-05" == case["case"])
def test_sample_against_exact_solution(name: str) -> None:
    """For Gaussian data the flow is known.  An adaptive solve to 1e-5 is as near to it as upstream's."""
    x, _ = sample_by_ode(name)
    exact = recorded("ode", name, "x_analytic_f64")
    upstream_error = (recorded("ode", name, "x") - exact).abs().max()
    slack = SPREADS * rounding("ode")[name]["spread"]["x"]
    assert (x - exact).abs().max() <= upstream_error + slack
