"""The exponential multistep methods: their coefficients, their orders, and what a step costs."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from flows import CONTROLS, SDES, exactly, flow_of, gaussian, gaussian_solution, marginal, mixture, prior
from scipy.integrate import quad
from torch import Tensor

from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.integrate import padded, solve
from scoresde_ext.integrate.multistep import integral_weights
from scoresde_ext.models import utils as mutils
from scoresde_ext.sde_lib import VPSDE, AffineSDE

SPAN = (1.0, 0.05)
ORDERS = (1, 2, 3, 4)
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
every_order = pytest.mark.parametrize("order", ORDERS)
METHODS: dict[str, dict[str, Any]] = {f"unipc {p}": {"method": "unipc", "order": p} for p in ORDERS} | {
    "dpmpp_2m": {"method": "dpmpp_2m"}
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def lagrange(nodes: np.ndarray, values: np.ndarray, at: float) -> float:
    """The polynomial through these values."""
    basis = [np.prod([(at - b) / (a - b) for b in nodes if b != a]) for a in nodes]
    return float(values @ np.array(basis))


@every_order
def test_weights(order: int) -> None:
    """Three steps, the last one with a value less, against adaptive quadrature; tensors as numpy arrays, and columns
    with the same bits at any place."""
    l0, l1 = np.array([-2.0, 0.3, 1.5]), np.array([-1.999, 1.1, 9.0])
    nodes = np.arctan(2.0 * np.exp(-np.stack([l0, l0 - 0.4, l0 - 1.1, l0 - 1.3])[:order]))
    new, valid = np.arctan(2.0 * np.exp(-l1)), np.ones((order, 3), dtype=bool)
    valid[1:, 2] = False
    found = integral_weights(l0, l1, new, nodes, valid)
    values = np.random.default_rng(0).normal(size=order + 1)
    for row, (start, end) in enumerate(zip(l0, l1, strict=True)):
        w, v, g = (f[..., row] for f in found)
        known = valid[:, row]
        assert not w[~known].any() and not v[~known].any()

        def integral(nodes: np.ndarray, values: np.ndarray, start: float = start, end: float = end) -> float:
            def integrand(at: float) -> float:
                return math.exp(at - end) * lagrange(nodes, values, math.atan(2.0 * math.exp(-at)))

            return quad(integrand, start, end, epsabs=1e-13, epsrel=1e-12)[0]

        of, last = values[1:], values[0]
        assert w @ of == pytest.approx(integral(nodes[known, row], of[known]), rel=1e-10)
        assert v @ of == pytest.approx(lagrange(nodes[known, row], of[known], new[row]), rel=1e-10)
        through = integral(np.append(nodes[known, row], new[row]), np.append(of[known], last))
        assert w @ of + g * (last - v @ of) == pytest.approx(through, rel=1e-10)

    tensors = [torch.from_numpy(a) for a in (l0, l1, new, nodes, valid)]
    whole = padded(integral_weights, *tensors)
    for a, b in zip(whole, found, strict=True):
        torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-12, atol=1e-14)
    for row in range(3):
        alone = padded(integral_weights, *(t[..., row : row + 1] for t in tensors))
        assert all(torch.equal(a[..., row : row + 1], b) for a, b in zip(whole, alone, strict=True))


def log_snr_grid(sde: AffineSDE, steps: int, start_up: int = 0) -> list[float]:
    """Times of equal steps in log-SNR. With a start-up, the first step is halved that often, and the steps grow by 2
    from there."""
    first, last = (sde.log_snr(t) for t in SPAN)
    h = (last - first) / steps
    small = [h * 2.0**-i for i in range(start_up, 0, -1)]
    at = [first, *(first + v for v in small), *(first + i * h for i in range(1, steps))]
    return [SPAN[0], *(sde.time_at(v) for v in at[1:]), SPAN[1]]


def errors(sde: AffineSDE, steps: tuple[int, ...], start_up: bool, **method: Any) -> list[float]:
    flow, y0 = flow_of(sde, mixture(sde)), prior(sde, 4, 3)
    right = exactly(flow, SPAN, y0).y
    result = []
    for n in steps:
        halvings = math.ceil(2 * math.log2(n)) if start_up else 0
        y = solve(flow, SPAN, y0, grid=log_snr_grid(sde, n, halvings), **method).y
        result.append((y - right).square().mean().sqrt().item())
    return result


@every_sde
@every_order
def test_order_of_unipc(order: int, sde: AffineSDE) -> None:
    """Global order p + 1 for a predictor of order p. The corrected step interpolates D with p + 1 values: its local
    error is O(h^(p + 2)). The newest value is taken at the predicted state, which is off by O(h^(p + 1)), but counts
    times h. The last step is the predictor alone: its O(h^(p + 1)) comes once and adds up to nothing.

    It needs values to start from: the first step interpolates with one value, whose error O(h^3) would limit the order
    to 3. With first steps of O(h^3) in size, it does not.
    """
    few = {1: 64, 2: 48, 3: 128, 4: 96}[order]
    few_error, many_error = errors(sde, (few, 2 * few), True, method="unipc", order=order)
    assert many_error > 1e-12  # else rounding is measured
    assert math.log2(few_error / many_error) == pytest.approx(order + 1, abs=0.35)


@every_sde
def test_order_of_dpmpp_2m(sde: AffineSDE) -> None:
    """Order 2, as its name says; without a start-up too: one step of order 1 has a local error of O(h^2)."""
    for start_up in (False, True):
        few_error, many_error = errors(sde, (64, 128), start_up, method="dpmpp_2m")
        assert math.log2(few_error / many_error) == pytest.approx(2, abs=0.35)


@every_sde
def test_order_without_a_start_up(sde: AffineSDE) -> None:
    """Equal steps in log-SNR from the first on: at least order min(p + 1, 3)."""
    for order in ORDERS:
        few_error, many_error = errors(sde, (48, 96), False, method="unipc", order=order)
        assert math.log2(few_error / many_error) > min(order + 1, 3) - 0.35, order


@every_method
@every_sde
def test_data_of_one_point_in_one_step(sde: AffineSDE, method: dict[str, Any]) -> None:
    """D does not change: every method is exact, in any number of steps."""
    y0 = prior(sde, 4, 3)
    flow = flow_of(sde, gaussian(sde, 0.4, 0.0))
    right = gaussian_solution(sde, y0, *SPAN, 0.4, 0.0)
    for steps in (1, 2, 7):
        solution = solve(flow, SPAN, y0, steps=steps, **method)
        torch.testing.assert_close(solution.y, right, rtol=1e-11, atol=1e-11)
        assert solution.nfe == steps and (solution.evaluations == steps).all() and (solution.n_accepted == steps).all()


@every_sde
def test_one_step_is_ddim(sde: AffineSDE) -> None:
    """In one step all are DDIM: x1 = (s1 / s0) x0 + (m1 - m0 s1 / s0) D."""
    (m0, s0), (m1, s1) = (marginal(sde, t) for t in SPAN)
    y0, network = prior(sde, 4, 3), mixture(sde)
    data = (y0 + s0**2 * network(y0, torch.ones(4, dtype=torch.float64))) / m0
    right = s1 / s0 * y0 + (m1 - m0 * s1 / s0) * data
    for method in METHODS.values():
        for grid in ({"steps": 1}, {"grid": list(SPAN)}):
            y = solve(flow_of(sde, network), SPAN, y0, **method, **grid).y
            torch.testing.assert_close(y, right, rtol=1e-11, atol=1e-11)


def dpmpp_2m(sde: AffineSDE, network: Any, times: list[float], x: Tensor) -> Tensor:
    """Lu et al. 2022, arXiv 2211.01095, algorithm 2, as it is written there."""
    before = None
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        (m, s), (m1, s1) = marginal(sde, t), marginal(sde, t_next)
        data = (x + s**2 * network(x, torch.full((len(x),), t, dtype=torch.float64))) / m
        h = math.log(m1 / s1) - math.log(m / s)
        if before is None:
            mixed = data
        else:
            m_last, s_last = marginal(sde, times[i - 1])
            r = (math.log(m / s) - math.log(m_last / s_last)) / h
            mixed = (1 + 1 / (2 * r)) * data - before / (2 * r)
        x, before = s1 / s * x - m1 * math.expm1(-h) * mixed, data
    return x


@every_sde
def test_dpmpp_2m_is_the_paper_s(sde: AffineSDE) -> None:
    """Whatever ``order`` says, which is UniPC's."""
    times = [1.0, 0.95, 0.8, 0.6, 0.55, 0.3, 0.2, 0.05]
    y0, network = prior(sde, 4, 3), mixture(sde)
    right = dpmpp_2m(sde, network, times, y0)
    for order in ORDERS:
        y = solve(flow_of(sde, network), SPAN, y0, "dpmpp_2m", grid=times, order=order).y
        torch.testing.assert_close(y, right, rtol=1e-11, atol=1e-11)


@every_method
def test_network_and_state_of_other_precision(method: dict[str, Any]) -> None:
    """float32 is kept, and costs its rounding."""
    sde = VPSDE()
    y0 = prior(sde, 4, 3)
    flow = flow_of(sde, mixture(sde))
    right = solve(flow, SPAN, y0, steps=20, **method).y
    y = solve(flow, SPAN, y0.float(), steps=20, **method).y
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), right, rtol=0, atol=1e-5)


@every_method
def test_data_to_latent_and_back(method: dict[str, Any]) -> None:
    """The other direction of time."""
    sde = VPSDE()
    flow, y0 = flow_of(sde, mixture(sde)), 0.8 * torch.randn(4, 3, dtype=torch.float64)
    latent = exactly(flow, SPAN[::-1], y0).y
    forth = solve(flow, SPAN[::-1], y0, steps=200, **method).y
    back = solve(flow, SPAN, latent, steps=200, **method).y
    tolerance = 2e-2 if method.get("order") == 1 else 2e-3
    torch.testing.assert_close(forth, latent, rtol=0, atol=tolerance)
    torch.testing.assert_close(back, y0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("control", CONTROLS)
@every_order
def test_adaptive_needs_one_evaluation_a_step(order: int, control: str) -> None:
    sde = VPSDE()
    tolerance = 1e-3 if order == 1 else 1e-5
    options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "control": control, "order": order}
    y0 = prior(sde, 4, 3)
    solution = solve(flow_of(sde, mixture(sde)), SPAN, y0, "unipc", **options)
    attempts = solution.n_accepted + solution.n_rejected
    assert torch.equal(solution.evaluations, attempts + 1) and solution.nfe == attempts.max() + 1
    assert len(solution.step_sizes) == len(solution.error_norms) == attempts.max()
    own = (solution.error_norms < 1).sum(0)
    assert torch.equal(own.expand(4), solution.n_accepted)


def test_first_step() -> None:
    """In log-SNR."""
    sde = VPSDE()
    flow, y0 = flow_of(sde, mixture(sde)), prior(sde, 4, 3)
    for control in CONTROLS:
        solution = solve(flow, SPAN, y0, "unipc", first_step=0.03, control=control)
        assert solution.first_step == 0.03
        assert (solution.step_sizes[0] - 0.03).abs().max() < 1e-15
        reached = solution.times[1] if control == "joint" else solution.times[1, 0]
        assert sde.log_snr(float(reached)) - sde.log_snr(1.0) == pytest.approx(0.03, rel=1e-9)
        for far in (100.0, 1e9):  # no longer than the way
            assert solve(flow, SPAN, y0, "unipc", first_step=far, control=control).success


def test_a_vanishing_gap_does_not_hold_up_the_steps() -> None:
    """Labels 999 t taken for times make the state grow to thousands. In float32, predictor and corrector then agree to
    the bit now and then."""
    sde = VPSDE()
    flow = ProbabilityFlow(sde, mutils.get_score_fn(sde, gaussian(sde), continuous=True))
    options: dict[str, Any] = {"order": 4, "rtol": 1e-6, "atol": 1e-6, "control": "per_sample", "max_steps": 500}
    solution = solve(flow, (1.0, 1e-3), prior(sde, 32, 1).float(), "unipc", **options)
    assert bool((solution.error_norms == 0).any())
    assert solution.nfe < 250


def test_fewer_evaluations_than_runge_kutta() -> None:
    """What it is for: at equal error, not much more than half."""
    for sde in SDES.values():
        flow, y0 = flow_of(sde, mixture(sde)), prior(sde, 16, 3)
        right = exactly(flow, (1.0, 1e-3), y0).y

        def best(method: str, flow: Any = flow, y0: Tensor = y0, right: Tensor = right) -> int:
            for exponent in range(8, 26):
                tolerance = 10 ** (-exponent / 4)
                solution = solve(flow, (1.0, 1e-3), y0, method, rtol=tolerance, atol=tolerance)
                if (solution.y - right).square().mean().sqrt() < 1e-4:
                    return solution.nfe
            raise AssertionError(f"{method} does not reach 1e-4")

        assert best("unipc") < 0.8 * best("RK45")
