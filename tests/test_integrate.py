"""The integrator: theory's order, scipy's decisions, and no silent wrong answer."""

import itertools
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scoresde_ext import integrate
from scoresde_ext.integrate import METHODS, Solution, SolverError, Status, Tableau, Terms, solve

ADAPTIVE = ("RK23", "RK45", "DOP853")
FIXED = ("euler", "midpoint", "heun", "rk4")
STAGES = {"RK23": 3, "RK45": 6, "DOP853": 12}  # evaluations an attempted step
every_adaptive = pytest.mark.parametrize("method", ADAPTIVE)
every_method = pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])


def steps_of(method: str, steps: int = 20) -> dict[str, int]:
    return {"steps": steps} if method in FIXED else {}


def column(t: Tensor, y: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (y.dim() - 1))


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


# --- order of convergence ---------------------------------------------------------------------------------------------


def logistic(t: Tensor, y: Tensor) -> Tensor:
    return y * (1 - y) * torch.cos(column(t, y))


def logistic_solution(y0: Tensor, start: float, end: float) -> Tensor:
    return 1 / (1 + (1 / y0 - 1) * math.exp(math.sin(start) - math.sin(end)))


RALSTON = Tableau(a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0.0, 2 / 3), order=2)


@pytest.mark.parametrize("span", [(0.0, 2.0), (2.0, 0.5)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE, RALSTON], ids=lambda m: m if isinstance(m, str) else "Tableau")
def test_order_of_convergence(method: Any, span: tuple[float, float]) -> None:
    """Halving the step divides the error by 2^order: of the fixed-step methods, of the adaptive ones in fixed steps,
    and of a tableau of the user's own. Coefficients with a typing error have order 1 or 2."""
    tableau = METHODS[method] if isinstance(method, str) else method
    order = (tableau if isinstance(tableau, Tableau) else tableau()).order
    y0 = torch.tensor([[0.2], [0.5], [0.7]], dtype=torch.float64)
    right = logistic_solution(y0, *span)
    few = {1: 200, 2: 64, 3: 40, 4: 24, 5: 16, 8: 4}[order]
    errors = [(solve(logistic, span, y0, method, steps=few * k).y - right).abs().max().item() for k in (1, 2)]
    assert errors[1] > 3e-14  # else rounding is measured
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, rel=0.1)


@every_adaptive
def test_tolerances_are_met(method: str) -> None:
    y0 = torch.tensor([[0.2], [0.5], [0.7]], dtype=torch.float64)
    for tolerance in (1e-4, 1e-7, 1e-10):
        y = solve(logistic, (0.0, 3.0), y0, method, rtol=tolerance, atol=tolerance).y
        assert (y - logistic_solution(y0, 0.0, 3.0)).abs().max() < 20 * tolerance


# --- scipy's decisions ------------------------------------------------------------------------------------------------

Parts = tuple[Tensor, ...]


def forced(t: Tensor, ys: Parts) -> Parts:
    """Somewhat stiff. (More, and the steps of two programs drift apart by rounding alone.)"""
    (y,) = ys
    return (-20 * (y - torch.cos(8 * column(t, y))),)


def growing(t: Tensor, ys: Parts) -> Parts:
    (y,) = ys
    return (y * (1 + torch.sin(5 * column(t, y))) + column(t, y) ** 2,)


def pendulum(t: Tensor, ys: Parts) -> Parts:
    """Two parts of the state, angles (B, 2) and a velocity (B,)."""
    x, v = ys
    return v[:, None].expand_as(x), -9 * torch.sin(x[:, 0]) - 0.2 * v


def kick(t: Tensor, ys: Parts) -> Parts:
    """Slow, then a sudden pulse: the step size falls and grows by all that the rules allow."""
    (y,) = ys
    return ((torch.exp(-((column(t, y) - 0.7) ** 2) * 500) * 40).expand_as(y) - 0.1 * y,)


def still(t: Tensor, ys: Parts) -> Parts:
    return tuple(torch.zeros_like(y) for y in ys)


PROBLEMS: dict[str, tuple[Callable[[Tensor, Parts], Parts], tuple[float, float], tuple[tuple[int, ...], ...]]] = {
    "forced": (forced, (0.0, 1.5), ((3, 2),)),
    "growing": (growing, (0.3, 2.0), ((2, 2, 3),)),
    "growing, back in time": (growing, (2.0, -0.3), ((2, 2, 3),)),
    "two parts": (pendulum, (0.0, 3.0), ((3, 2), (3,))),
    "two parts, back in time": (pendulum, (1.0, -0.5), ((3, 2), (3,))),
    "kick": (kick, (0.0, 2.0), ((2, 1),)),
    "short": (growing, (0.1, 0.1 + 1e-7), ((2, 2),)),
    "still": (still, (0.0, 1.0), ((2, 2),)),
}


def with_scipy(f: Any, span: tuple[float, float], y0: Parts, **options: Any) -> tuple[Any, list[float]]:
    times, sizes = [], [y.numel() for y in y0]

    def flat(t: float, y: np.ndarray) -> np.ndarray:
        times.append(t)
        parts = [p.view(like.shape) for p, like in zip(torch.from_numpy(y).split(sizes), y0, strict=True)]
        slopes = f(torch.full((len(y0[0]),), t, dtype=torch.float64), tuple(parts))
        return torch.cat([s.reshape(-1) for s in slopes]).numpy()

    return solve_ivp(flat, span, torch.cat([y.reshape(-1) for y in y0]).numpy(), **options), times


@pytest.mark.parametrize(
    "options",
    [{"rtol": 1e-3, "atol": 1e-6}, {"rtol": 1e-6, "atol": 1e-6}, {"rtol": 1e-5, "atol": 1e-2, "first_step": 1e-8}],
    ids=["coarse", "fine", "tiny first step"],
)
@pytest.mark.parametrize("problem", PROBLEMS)
@every_adaptive
def test_decisions_are_scipys(method: str, problem: str, options: dict[str, float]) -> None:
    """The same evaluations at the same times, hence the same steps, attempted and accepted; the same result."""
    f, span, shapes = PROBLEMS[problem]
    y0 = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    right, right_times = with_scipy(f, span, y0, method=method, **options)
    times = []

    def recorded(t: Tensor, ys: Any) -> Any:
        times.append(t[0].item())
        return f(t, ys) if isinstance(ys, tuple) else f(t, (ys,))[0]

    solution = solve(recorded, span, y0 if len(y0) > 1 else y0[0], method, **options)
    assert right.success and solution.success
    # An error estimate is a difference of nearly equal numbers: step sizes pass on its rounding, magnified.
    assert times == pytest.approx(right_times, rel=1e-6, abs=1e-9)
    assert solution.times.tolist() == pytest.approx(right.t.tolist(), rel=1e-6, abs=1e-9)
    assert solution.nfe == right.nfev == len(times)
    assert solution.n_accepted.tolist() == [len(right.t) - 1] * len(y0[0])
    parts = solution.y if isinstance(solution.y, tuple) else (solution.y,)
    flat = torch.cat([y.reshape(-1) for y in parts])
    torch.testing.assert_close(flat, torch.from_numpy(right.y[:, -1].copy()), rtol=1e-8, atol=1e-9)


def test_problems_cover_the_rules() -> None:
    """Rejections, two in a row, growth by the largest factor: or the test above would show less than it seems to."""
    f, span, shapes = PROBLEMS["kick"]
    y0 = torch.randn(shapes[0], dtype=torch.float64)
    solution = solve(lambda t, y: f(t, (y,))[0], span, y0, rtol=1e-6, atol=1e-6)
    rejected = [norm >= 1 for norm in solution.error_norms.tolist()]
    assert any(a and b for a, b in itertools.pairwise(rejected))
    factors = [b / a for a, b in itertools.pairwise(solution.step_sizes.tolist())]
    assert max(factors) == pytest.approx(10) and min(factors) == pytest.approx(0.2)


@every_adaptive
def test_solution_adds_up(method: str) -> None:
    f, span, shapes = PROBLEMS["kick"]
    y0 = torch.randn(shapes[0], dtype=torch.float64)
    for first_step in (None, 0.05):
        s = solve(lambda t, y: f(t, (y,))[0], span, y0, method, rtol=1e-6, atol=1e-6, first_step=first_step)
        (attempts,) = set((s.n_accepted + s.n_rejected).tolist())
        assert (s.n_rejected > 0).all() and (s.evaluations == s.nfe).all()
        assert len(s.step_sizes) == len(s.error_norms) == attempts
        assert s.nfe == (2 if first_step is None else 1) + STAGES[method] * attempts
        assert s.first_step == s.step_sizes[0] == (first_step or s.step_sizes[0])
        assert torch.equal(s.times.diff(), s.step_sizes[s.error_norms < 1])
        assert s.times[0] == span[0] and s.times[-1] == span[1] and (s.t == span[1]).all()


# --- right-hand sides in terms ----------------------------------------------------------------------------------------


class Affine:
    """f y + q tanh(y) with numbers, one coefficient a sample, or as the finished derivative."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def coefficients(self, t: float, y: Tensor) -> tuple[Any, Any]:
        if self.kind == "numbers":
            return -0.5 * (1 + t), math.cos(3 * t)
        scale = torch.linspace(1.0, 2.0, len(y), dtype=torch.float64)
        return -0.5 * (1 + t) * scale, math.cos(3 * t) * scale

    def terms(self, t: float, ys: Parts) -> tuple[Terms, ...]:
        assert isinstance(t, float)
        if self.kind == "derivative":
            return tuple(Terms(self(torch.full((len(y),), t, dtype=torch.float64), y)) for y in ys)
        return tuple(Terms(y.tanh(), *self.coefficients(t, y)) for y in ys)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        f, q = (torch.as_tensor(c, dtype=y.dtype) for c in self.coefficients(t[0].item(), y))
        return column(f, y) * y + column(q, y) * y.tanh()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", ["numbers", "a sample each", "derivative"])
@every_method
def test_terms_are_their_sum(method: str, kind: str, parts: int) -> None:
    drift, y0 = Affine(kind), tuple(torch.randn(3, 4, dtype=torch.float64) for _ in range(parts))
    options = steps_of(method) or {"rtol": 1e-7, "atol": 1e-7}
    fused = solve(drift, (1.0, 0.1), y0, method, **options)
    plain = solve(lambda t, ys: tuple(drift(t, y) for y in ys), (1.0, 0.1), y0, method, **options)
    assert fused.nfe == plain.nfe and torch.equal(fused.n_accepted, plain.n_accepted)
    torch.testing.assert_close(fused.times, plain.times, rtol=1e-9, atol=0)
    for one, other in zip(fused.y, plain.y, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_method
def test_state_and_times(method: str, dtype: torch.dtype) -> None:
    """The state keeps its dtype and shape; times come one a sample, in float32 or, for a float64 state, float64."""
    seen = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen.append(t)
        assert y.dtype == dtype and y.shape == (3, 2, 2)
        return -y

    y0 = torch.ones(3, 2, 2, dtype=dtype)
    solution = solve(f, (0.2, 1.0), y0, method, rtol=1e-2, atol=1e-2, **steps_of(method, 50))
    assert solution.y.dtype == dtype and solution.y.shape == (3, 2, 2)
    torch.testing.assert_close(solution.y.double(), y0.double() * math.exp(-0.8), rtol=2e-2, atol=0)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for t in seen:
        assert t.shape == (3,) and t.dtype == wanted and (t == t[0]).all()
    start, end = (torch.tensor(v, dtype=wanted) for v in (0.2, 1.0))
    assert seen[0][0] == start
    assert min(t[0] for t in seen) >= start and max(t[0] for t in seen) <= end
    assert solution.t.dtype == torch.float64 and solution.t.tolist() == [1.0] * 3 and solution.times[-1] == 1.0


@every_method
def test_no_evaluation_outside_the_interval(method: str) -> None:
    """Not by a rounding error either: ends that are no round numbers, steps as long as the interval."""
    numbers = random.Random(0)
    for _ in range(60):
        start = numbers.choice([0.0, 1e-3, numbers.uniform(-2, 2)])
        end = start + numbers.choice([-1, 1]) * 10 ** numbers.uniform(-9, 1)
        low, high = min(start, end), max(start, end)
        times = []

        class Recorded:
            def terms(self, t: float, ys: Parts, times: list[float] = times) -> tuple[Terms, ...]:
                times.append(t)
                return (Terms(ys[0], -1e-4, 0.0),)

        solution = solve(Recorded(), (start, end), torch.ones(1, 1), method, **steps_of(method, numbers.randint(1, 9)))
        assert solution.t.item() == end
        assert low <= min(times) and max(times) <= high, (start, end)
        assert times[0] == start
        assert method in ("euler", "midpoint") or end in times


@pytest.mark.parametrize("span", [(0, 1), (torch.tensor(0.0), torch.tensor(1.0)), np.array([0.0, 1.0])], ids=str)
def test_times_of_other_types(span: Any) -> None:
    """Integers, tensors of one number, arrays: times come out as float64."""
    solution = solve(decay, span, torch.ones(2, 2), rtol=1e-6)
    assert solution.t.dtype == solution.times.dtype == torch.float64 and solution.times[-1] == 1.0
    torch.testing.assert_close(solution.y, torch.full((2, 2), math.exp(-1)))


# --- what must not happen ---------------------------------------------------------------------------------------------


def test_input_is_not_modified_and_not_returned() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        y0 = torch.randn(2, 3, 4, 4).to(memory_format=layout)
        before = y0.clone()
        for method in (*ADAPTIVE, *FIXED):
            solution = solve(decay, (0.0, 1.0), y0, method, **steps_of(method, 30))
            assert torch.equal(y0, before) and y0.stride() == before.stride()
            assert solution.y.untyped_storage().data_ptr() != y0.untyped_storage().data_ptr()
            torch.testing.assert_close(solution.y, before * math.exp(-1), rtol=3e-2, atol=0)


@pytest.mark.filterwarnings("ignore:.*a gradient is wanted")
@every_method
def test_no_gradient_is_recorded(method: str) -> None:
    weight = torch.nn.Parameter(torch.tensor(-1.0))
    y0 = torch.ones(2, 3, requires_grad=True)
    modes = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        assert not y.requires_grad
        with torch.enable_grad():  # as a likelihood does, which differentiates its network
            return weight * y

    solution = solve(f, (0.0, 1.0), y0, method, **steps_of(method))
    # The first evaluation shows whether f wants one: see below.
    assert modes[0] and not any(modes[1:]) and not solution.y.requires_grad
    assert torch.is_grad_enabled() and y0.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
@every_method
def test_nothing_to_integrate(method: str, shape: tuple[int, ...]) -> None:
    solution = solve(decay, (1.0, 0.0), torch.ones(shape), method, **steps_of(method))
    assert solution.success and solution.t.tolist() == [0.0] * shape[0] and solution.y.shape == shape


def test_samples_take_the_step_of_all() -> None:
    """Joint control: one step size for the batch. Copies of a sample change nothing; an easy one makes steps longer."""
    y0 = torch.tensor([[0.2, 0.5]], dtype=torch.float64)
    alone = solve(logistic, (0.0, 2.0), y0)
    assert solve(logistic, (0.0, 2.0), y0.expand(5, 2)).nfe == alone.nfe
    assert solve(logistic, (0.0, 2.0), torch.cat([y0, torch.ones(999, 2)])).nfe < alone.nfe


# --- failures ---------------------------------------------------------------------------------------------------------


def spoiled(when: Callable[[float], bool], value: float, row: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    def f(t: Tensor, y: Tensor) -> Tensor:
        assert not t.isnan().any()
        slope = -y
        if when(t[0].item()):
            slope[row, -1] = value
        return slope

    return f


def check_failure(error: SolverError, name: str = "sample 1") -> Solution:
    solution = error.solution
    assert name in str(error) and name in solution.message
    assert not solution.success
    return solution


@pytest.mark.timeout(30)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first_step", [None, 0.1])
@every_adaptive
def test_values_that_are_not_finite(method: str, first_step: float | None, value: float) -> None:
    y0 = torch.ones(3, 2)
    cases = {"start": lambda t: True, "later": lambda t: t > 0.5, "end": lambda t: t == 1.0}
    for when, spoil in cases.items():
        with pytest.raises(SolverError) as error:
            solve(spoiled(spoil, value), (0.0, 1.0), y0, method, first_step=first_step)
        reached = check_failure(error.value)
        # The last time at which all was well. (As a float32 time, what follows 0.5 closely is 0.5.)
        assert reached.t[1] <= {"start": 0.0, "later": 0.5 + 2**-25, "end": 1.0}[when]
        others = solve(decay, (0.0, 1.0), y0[:2], method, first_step=first_step)
        assert reached.status.tolist() == [0, Status.NOT_FINITE, 0] and reached.t[::2].tolist() == [1.0, 1.0]
        assert torch.equal(reached.y[::2], others.y) and reached.y[1].isnan().all()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", FIXED)
def test_values_that_are_not_finite_in_fixed_steps(method: str, value: float) -> None:
    for spoil in (lambda t: True, lambda t: 0.4 < t < 0.6):
        with pytest.raises(SolverError) as error:
            solve(spoiled(spoil, value), (0.0, 1.0), torch.ones(3, 2), method, steps=20)
        check_failure(error.value)


@every_adaptive
def test_overflow_is_recovered_from(method: str) -> None:
    """y' = -y^3 in one step: the stages overflow, and smaller steps do. scipy takes the same."""
    y0 = torch.full((2, 3), 1e3, dtype=torch.float64)
    options = {"rtol": 1e-5, "atol": 1e-5, "first_step": 1.0}
    solution = solve(lambda t, y: -(y**3), (0.0, 1.0), y0, method, **options)
    assert not all(math.isfinite(norm) for norm in solution.error_norms)
    torch.testing.assert_close(solution.y, torch.full_like(y0, (1e-6 + 2.0) ** -0.5), rtol=1e-4, atol=0)
    with np.errstate(all="ignore"):
        right, _ = with_scipy(lambda t, ys: (-(ys[0] ** 3),), (0.0, 1.0), (y0,), method=method, **options)
    assert solution.nfe == right.nfev


def test_every_bad_sample_is_named() -> None:
    def f(t: Tensor, ys: Parts) -> Parts:
        first, second = -ys[0], -ys[1]
        first[0], second[5] = math.nan, math.nan
        return first, second

    for method in ("RK45", "rk4"):
        with pytest.raises(SolverError) as error:
            solve(f, (0.0, 1.0), (torch.ones(8, 2), torch.ones(8)), method, **steps_of(method))
        assert isinstance(check_failure(error.value, "samples 0, 5").y, tuple)
    with pytest.raises(SolverError, match=r"samples 0, 1, 2, 3, 4, \.\.\. \(7 in all\)"):
        solve(lambda t, y: y / 0 * 0, (0.0, 1.0), torch.ones(7, 2))


@pytest.mark.timeout(60)
@every_adaptive
def test_step_size_underflow(method: str) -> None:
    """A derivative that is noise has no step small enough."""
    with pytest.raises(SolverError, match="step size") as error:
        solve(lambda t, y: 1e8 * torch.randn_like(y), (1.0, 2.0), torch.ones(2, 2).double(), method, rtol=0, atol=1e-12)
    reached = check_failure(error.value, "step size")
    assert (reached.status == Status.STEP_SIZE).all() and reached.y.isnan().all()


@pytest.mark.timeout(60)
def test_blow_up() -> None:
    """y' = y^2 from 1 has a pole at t = 1."""
    with pytest.raises(SolverError) as error:
        solve(lambda t, y: y * y, (0.0, 2.0), torch.ones(2, 2).double())
    assert ((error.value.solution.t - 1).abs() < 0.01).all()


@every_adaptive
def test_max_steps(method: str) -> None:
    problem, (f, span, shapes) = "kick", PROBLEMS["kick"]
    y0 = torch.randn(shapes[0], dtype=torch.float64)

    def run(max_steps: int) -> Solution:
        return solve(lambda t, y: f(t, (y,))[0], span, y0, method, max_steps=max_steps)

    needed = len(run(10_000).step_sizes)
    assert run(needed).success, problem
    with pytest.raises(SolverError, match="max_steps") as error:
        run(needed - 1)
    reached = check_failure(error.value, "max_steps")
    assert (reached.n_accepted + reached.n_rejected == needed - 1).all()
    assert ((span[0] < reached.t) & (reached.t < span[1])).all()
    assert (reached.status == Status.MAX_STEPS).all() and reached.y.isnan().all()


def never(*_: Any) -> Any:
    raise AssertionError("f was called")


GOOD: dict[str, Any] = {"f": never, "t_span": (0.0, 1.0), "y0": torch.ones(3, 2), "method": "RK45"}
BAD = {
    "f": [None, 3.0, "y"],
    "method": ["rk45", "RK", "", None, 4, ("RK45",)],
    "t_span": [(0.0,), (0.0, 1.0, 2.0), (), (1.0, 1.0), (0.0, math.nan), (math.inf, 0.0), 1.0, None, ("a", "b")],
    "y0": [
        torch.ones(3, 2).long(), torch.ones(3).cfloat(), torch.tensor(1.0), [1.0, 2.0], 1.0, None, (),
        (torch.ones(3), 1.0), torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), (torch.ones(3), torch.ones(2)),
        (torch.ones(3), torch.ones(3).double()), (torch.ones(3), torch.ones(3, device="meta")), np.ones((3, 2)),
    ],
    "rtol": [-1e-3, math.nan, math.inf, "1e-3", None, torch.ones(2)],
    "atol": [-1e-3, math.nan, math.inf, "1e-3", None, torch.ones(2)],
    "first_step": [0.0, -0.1, math.nan, 1.5, "0.1"],
    "max_steps": [0, -1, math.nan, "10", None],
    "steps": [0, -3, 2.5, "10", math.nan],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments(name: str, value: Any) -> None:
    """Refused before f is called."""
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        solve(**(GOOD | {name: value}))


def test_bad_combinations() -> None:
    with pytest.raises(ValueError, match="rtol"):
        solve(**GOOD, rtol=0, atol=0)
    for method in FIXED:
        with pytest.raises(ValueError, match=r"\bsteps\b"):
            solve(**(GOOD | {"method": method}))
    solve(decay, (0.0, 1.0), torch.ones(2, 2), rtol=0, atol=1e-3)
    solve(decay, (0.0, 1.0), torch.ones(2, 2), rtol=1e-3, atol=0)


BAD_DERIVATIVES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda y: y[:, :1],
    "batch size": lambda y: y[:1],
    "number of dimensions": lambda y: y[..., None],
    "dtype": lambda y: y.double(),
    "device": lambda y: y.to("meta"),
    "None": lambda y: None,
    "array": lambda y: y.numpy(),
    "number": lambda y: 1.0,
    "tuple": lambda y: (y,),
}


@pytest.mark.parametrize("problem", BAD_DERIVATIVES)
@pytest.mark.parametrize("method", ["RK45", "euler"])
def test_bad_derivatives(method: str, problem: str) -> None:
    with pytest.raises((ValueError, TypeError), match=r"\bf\b"):
        solve(lambda t, y: BAD_DERIVATIVES[problem](y), (0.0, 1.0), torch.ones(3, 2), method, **steps_of(method))


@pytest.mark.parametrize("result", [lambda a, b: (a,), lambda a, b: (a, b, b), lambda a, b: a, lambda a, b: (b, a)])
def test_bad_derivatives_of_parts(result: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"\bf\b"):
        solve(lambda t, ys: result(*ys), (0.0, 1.0), (torch.ones(3, 2), torch.ones(3)))


def test_errors_of_f_are_passed_on() -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        solve(f, (0.0, 1.0), torch.ones(3, 2))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """Off unless asked for, and silent where there is no terminal."""
    for progress in (False, True):
        solve(decay, (0.0, 1.0), torch.ones(3, 2), progress=progress)
    assert capsys.readouterr() == ("", "")


def test_tableaus_are_consistent() -> None:
    """Row sums of a are c, b sums to 1, the error estimates to 0."""
    for method in METHODS.values():
        tableau = method if isinstance(method, Tableau) else method()
        assert [sum(row) for row in tableau.a] == pytest.approx(tableau.c, abs=1e-14)
        assert sum(tableau.b) == pytest.approx(1)
        assert [sum(e) for e in tableau.errors] == pytest.approx([0] * len(tableau.errors), abs=1e-14)
        assert [len(e) for e in tableau.errors] == [len(tableau.b) + 1] * len(tableau.errors)
        assert [len(row) for row in tableau.a] == list(range(len(tableau.c)))
    with pytest.raises(AttributeError):
        replace(integrate.RK45).order = 3


# --- times that float32 does not tell apart ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"method": "DOP853"}, {"method": "rk4", "steps": 100}, {"control": "per_sample"}], ids=str
)
def test_far_from_zero(options: dict[str, Any], dtype: torch.dtype) -> None:
    """From 1e6 to 1e6 + 1, float32 has 16 times: f gets float64, and may answer so."""
    seen = set()

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen.add(t.dtype)
        return torch.cos(t - 1e6)[:, None] * y

    solution = integrate.solve(f, (1e6, 1e6 + 1), torch.ones((2, 1), dtype=dtype), rtol=1e-6, atol=1e-6, **options)
    assert solution.y.dtype == dtype and seen == {torch.float64}
    assert (solution.y / math.exp(math.sin(1.0)) - 1).abs().max() < 3e-6


@pytest.mark.parametrize(
    ("span", "dtype"),
    [
        ((1.0, 1e-3), torch.float32),
        ((16.0, 17.0), torch.float32),
        ((-100.0, -99.0), torch.float64),
        ((1000.0, 1000.5), torch.float64),
    ],
)
def test_times_are_float32_where_that_is_enough(span: tuple[float, float], dtype: torch.dtype) -> None:
    seen = set()
    integrate.solve(lambda t, y: seen.add(t.dtype) or -y, span, torch.ones(2, 1))
    assert seen == {dtype}


# --- gradients -----------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_recorded_is_said() -> None:
    """In the parameters of f, in y0, and in tuples; once for a line of the caller's."""
    matrix = torch.eye(2).requires_grad_()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return y @ matrix

    y0, span = torch.ones(3, 2), (0.0, 1.0)
    for name, call in {
        "f": lambda: integrate.solve(f, span, y0).y,
        "f of several": lambda: integrate.solve(lambda t, ys: (f(t, ys[0]), -ys[1]), span, (y0, y0)).y[0],
        "y0": lambda: integrate.solve(lambda t, y: -y, span, y0.clone().requires_grad_(), control="per_sample").y,
        "f of a stream": lambda: next(iter(integrate.stream(f, span, lambda i, j: y0[i:j], 3, 3))).y,
    }.items():
        with pytest.warns(UserWarning, match=rf"^{name[:2].strip()}: a gradient is wanted .* none is recorded") as said:
            assert not call().requires_grad
        assert [warning.filename for warning in said] == [__file__], name
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            integrate.solve(f, span, y0)
    assert len(said) == 1


def test_f_is_evaluated_as_often_where_gradients_are_recorded() -> None:
    calls = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return -y

    solution = integrate.solve(f, (0.0, 1.0), torch.ones(3, 2))
    assert calls == [True, *[False] * (solution.nfe - 1)]
