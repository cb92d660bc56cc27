"""Probability-flow samples against upstream's, which scipy integrated in float64 around a float32 network."""

import torch
from golden import Case, arrays, cases, every_case, expected, make_network, make_sde, recorded, rounding
from golden.solves import sample_by_ode

from scoresde_ext import integrate
from scoresde_ext.models import utils as mutils

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


def probability_flow(name: str) -> integrate.Solution:
    """The same solve by the integrator alone, which keeps its steps."""
    case = cases("ode")[name]
    sde = make_sde(case)
    score_fn = mutils.get_score_fn(sde, make_network(case), train=False, continuous=True)
    flow = sde.reverse(score_fn, probability_flow=True)
    z = arrays("ode")["z_unit"] * (case["p1"] if case["kind"] == "ve" else 1)
    return integrate.solve(
        lambda t, y: flow.sde(y, t)[0], (sde.T, case["eps"]), z, case["method"], rtol=case["rtol"], atol=case["atol"]
    )


def logged(case: Case) -> bool:
    """Scipy's steps were recorded once for each (SDE, network, method, tolerance)."""
    return "h0" in case and not case["denoise"]


@every_case("ode", logged)
def test_first_step(name: str) -> None:
    # h0^5 comes from a difference of slopes over a short step: a ten-thousandth of it is rounding
    assert abs(probability_flow(name).first_step / cases("ode")[name]["h0"] - 1) < 1e-4


@every_case("ode", lambda case: logged(case) and (case["method"] == "RK23" or case["rtol"] == 1e-3))
def test_every_step(name: str) -> None:
    """Every attempted step, where error norms stand clear of rounding: not so for RK45 at 1e-4 and below."""
    solution = probability_flow(name)
    for steps, log in ((solution.step_sizes, "h_attempt_log"), (solution.times, "t_log")):
        wanted = recorded("ode", name, log)
        torch.testing.assert_close(steps, wanted, rtol=3e-3, atol=0)
