"""What theory promises, over SDEs, dimensions and tolerances."""

import functools
import math
from typing import Any

import pytest
import torch
from flows import (
    ADAPTIVE,
    CONTROLS,
    COORDINATES,
    DENSE,
    SDES,
    CosineSDE,
    exactly,
    flow_of,
    gaussian,
    gaussian_solution,
    mixture,
    prior,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from scoresde_ext.integrate import solve
from scoresde_ext.sde_lib import VESDE, VPSDE, AffineSDE, subVPSDE

every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
every_coordinate = pytest.mark.parametrize("coordinate", COORDINATES)
every_adaptive = pytest.mark.parametrize("mode", ADAPTIVE.values(), ids=ADAPTIVE)
sdes = st.one_of(
    st.builds(VPSDE, st.floats(0.05, 0.5), st.floats(5.0, 20.0)),
    st.builds(subVPSDE, st.floats(0.05, 0.5), st.floats(5.0, 20.0)),
    st.builds(VESDE, st.floats(0.005, 0.05), st.floats(2.0, 100.0)),
    st.builds(CosineSDE, st.floats(1.0, 1.55)),
)


def some(max_examples: int) -> Any:
    return settings(max_examples=max_examples, deadline=None, derandomize=True)


def rms(y: torch.Tensor) -> float:
    return y.square().mean().sqrt().item()


@functools.cache
def tight(sde: AffineSDE, spread: float, start: float, *times: float) -> tuple[torch.Tensor, ...]:
    """A state at the start, and what becomes of it at the times."""
    flow, states = flow_of(sde, mixture(sde, 0.8, spread)), [prior(sde, 4, 3)]
    for before, t in zip((start, *times), times, strict=False):
        states.append(states[-1] if t == before else exactly(flow, (before, t), states[-1]).y)
    return tuple(states)


# --- order of convergence ---------------------------------------------------------------------------------------------

# order, and steps enough for it to show
RUNGE_KUTTA = {
    "euler": (1, 256), "midpoint": (2, 128), "heun": (2, 128), "rk4": (4, 64), "RK23": (3, 64), "RK45": (5, 24),
    "DOP853": (8, 8),
}  # fmt: skip


@every_sde
@every_coordinate
@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_order_of_fixed_steps(method: str, coordinate: str, sde: AffineSDE) -> None:
    """Halving the step divides the error by 2^order, in t and in the angle."""
    order, steps = RUNGE_KUTTA[method]
    flow, span = flow_of(sde, mixture(sde, 0.8, 0.5)), (1.0, 0.1)
    y0, right = tight(sde, 0.5, *span)
    found = (solve(flow, span, y0, method, steps=n, coordinate=coordinate).y for n in (steps, 2 * steps))
    few, many = (rms(y - right) for y in found)
    assert many > 2e-13  # else rounding is measured
    found_order = math.log2(few / many)
    # With steps this long, the 8th order's next terms count still; shorter ones are exact to rounding.
    assert 0.8 * order < found_order < (1.35 if order == 8 else 1.2) * order


# --- tolerance --------------------------------------------------------------------------------------------------------


@every_adaptive
@some(3)
@given(
    sde=sdes,
    size=st.integers(1, 40),
    batch=st.integers(1, 5),
    exponent=st.floats(2.0, 3.5),
    mean=st.floats(0.1, 1.5),
    spread=st.floats(0.1, 1.0),
    seed=st.integers(0, 999),
)
def test_error_shrinks_with_tolerance(
    mode: dict[str, Any],
    sde: AffineSDE,
    size: int,
    batch: int,
    exponent: float,
    mean: float,
    spread: float,
    seed: int,
) -> None:
    """An error norm is of a step, not of the whole: the result may be off by some tolerances, but at a thousandth of
    the tolerance it is nearer."""
    torch.manual_seed(seed)
    flow, y0, span = flow_of(sde, mixture(sde, mean, spread)), prior(sde, batch, size), (1.0, 0.01)
    right = exactly(flow, span, y0).y
    errors = []
    for tolerance in (10**-exponent, 10 ** -(exponent + 3)):
        y = solve(flow, span, y0, **(mode | {"rtol": tolerance, "atol": tolerance})).y
        errors.append(rms(y - right))
        assert errors[-1] < 100 * tolerance
    assert errors[1] < errors[0]


@some(4)
@given(sde=sdes, spread=st.floats(0.05, 2.0), start=st.floats(0.3, 1.0), end=st.floats(1e-3, 0.2), back=st.booleans())
def test_gaussian_data(sde: AffineSDE, spread: float, start: float, end: float, back: bool) -> None:
    """The flow is known: every method, in both directions of time."""
    span = (end, start) if back else (start, end)
    y0 = prior(sde, 2, 4, T=span[0])
    right = gaussian_solution(sde, y0, *span, 0.4, spread)
    flow = flow_of(sde, gaussian(sde, 0.4, spread))
    scale = max(rms(right), 1.0)
    for mode in ADAPTIVE.values():
        tolerance = 1e-5
        y = solve(flow, span, y0, **(mode | {"rtol": tolerance, "atol": tolerance})).y
        assert rms(y - right) < 100 * tolerance * scale, mode


# --- dense output -----------------------------------------------------------------------------------------------------

# At the ends, twice, many within one step, one in many.
TIMES = [1.0, 1.0, 0.95, 0.9, 0.9, 0.7, 0.5, *(0.5 - 1e-7 * i for i in range(1, 8)), 0.3, 0.1, 0.05, 0.01, 0.01]


@every_sde
@pytest.mark.parametrize("mode", DENSE.values(), ids=DENSE)
def test_dense_output(mode: dict[str, Any], sde: AffineSDE) -> None:
    """Not much further from the solution than the ends of steps are; the ends themselves are exact."""
    tolerance, span, distinct = 1e-5, (1.0, 0.01), sorted(set(TIMES), reverse=True)
    y0, *states = tight(sde, 0.3, 1.0, *distinct)
    right = dict(zip(distinct, states, strict=True))
    flow = flow_of(sde, mixture(sde))
    options = mode | {"rtol": tolerance, "atol": tolerance}
    solution = solve(flow, span, y0, **options, t_eval=TIMES)
    assert solution.ys.shape == (len(TIMES), 4, 3) and solution.ys.dtype == y0.dtype
    for t, found in zip(TIMES, solution.ys, strict=True):
        assert (found - right[t]).abs().max() < 300 * tolerance * max(rms(right[t]), 1.0), t
    torch.testing.assert_close(solution.ys[:2], y0.expand(2, 4, 3), rtol=1e-15, atol=0)
    assert torch.equal(solution.ys[-1], solution.y) and torch.equal(solution.ys[-2], solution.y)
    # It takes nothing: the steps are those without.
    without = solve(flow, span, y0, **options)
    assert without.ys is None and torch.equal(without.y, solution.y)
    assert torch.equal(without.step_sizes.nan_to_num(-1), solution.step_sizes.nan_to_num(-1))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ["RK23", "RK45", "unipc"])
def test_dense_output_converges(method: str, control: str) -> None:
    """Tighter tolerances make it better too, not the ends of steps alone."""
    sde = VPSDE()
    y0, times = prior(sde, 3, 4), [0.87, 0.61, 0.43, 0.17, 0.03]
    flow = flow_of(sde, mixture(sde))
    right = torch.stack([exactly(flow, (1.0, t), y0).y for t in times])
    errors = []
    for tolerance in (1e-4, 1e-8):
        s = solve(flow, (1.0, 0.01), y0, method, control=control, rtol=tolerance, atol=tolerance, t_eval=times)
        errors.append(rms(s.ys - right))
    assert errors[1] < 0.01 * errors[0] and errors[1] < 3e-6


def test_dense_output_of_nothing_and_backwards() -> None:
    sde = VPSDE()
    flow, y0 = flow_of(sde, mixture(sde)), prior(sde, 3, 4, T=0.01)
    for mode in DENSE.values():
        assert solve(flow, (1.0, 0.01), y0, **(mode | {"rtol": 1e-2}), t_eval=[]).ys.shape == (0, 3, 4)
        s = solve(flow, (0.01, 1.0), y0, **(mode | {"rtol": 1e-3, "atol": 1e-3}), t_eval=[0.01, 0.3, 1.0])
        right = exactly(flow, (0.01, 0.3), y0).y
        assert (s.ys[1] - right).abs().max() < 0.1 and torch.equal(s.ys[2], s.y)


# --- the angle --------------------------------------------------------------------------------------------------------


@every_sde
def test_the_angle_needs_fewer_evaluations(sde: AffineSDE) -> None:
    """What it is for; and fixed steps even in the angle are better than even in t."""
    flow, y0 = flow_of(sde, mixture(sde)), prior(sde, 8, 4)
    span = (1.0, 1e-3)
    right = exactly(flow, span, y0).y
    in_t, in_angle = (solve(flow, span, y0, coordinate=c, rtol=1e-4, atol=1e-4) for c in COORDINATES)
    assert rms(in_angle.y - right) < 2e-3
    if not isinstance(sde, CosineSDE):  # whose t is the angle
        assert in_angle.nfe < in_t.nfe
        errors = [rms(solve(flow, span, y0, "heun", steps=20, coordinate=c).y - right) for c in COORDINATES]
        assert errors[1] < 0.8 * errors[0]


def test_coordinates_agree_where_t_is_the_angle() -> None:
    """m^2 + s^2 = 1 and phi = 1.5 t: the same steps."""
    sde = CosineSDE()
    flow, y0 = flow_of(sde, mixture(sde)), prior(sde, 4, 3)
    for method in ("euler", "heun", "rk4", "DOP853"):
        one, other = (solve(flow, (1.0, 0.01), y0, method, steps=9, coordinate=c) for c in COORDINATES)
        torch.testing.assert_close(one.y, other.y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(one.times, other.times, rtol=1e-12, atol=1e-13)
