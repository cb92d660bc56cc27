"""Solvers never lie: what fails is named with its time, is NaN, and leaves the rest of the batch as if it had not been
there."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import (
    ADAPTIVE,
    CONTROLS,
    MODES,
    SDES,
    Network,
    arithmetic,
    exactly,
    flow_of,
    gaussian,
    gaussian_solution,
    prior,
)
from torch import Tensor

from scoresde_ext.integrate import Solution, SolverError, Status, solve
from scoresde_ext.sde_lib import VESDE, VPSDE

SPAN = (1.0, 0.01)
OTHERS = [0, 2, 3]  # all rows of four but row 1, which the tests spoil

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
every_adaptive = pytest.mark.parametrize("mode", ADAPTIVE.values(), ids=ADAPTIVE)


def options_of(mode: dict[str, Any]) -> dict[str, Any]:
    return {"rtol": 1e-5, "atol": 1e-5} | mode


def run(network: Network, y0: Tensor, mode: dict[str, Any], span: tuple[float, float] = SPAN, **more: Any) -> Solution:
    return solve(flow_of(SDES["vp"], network), span, y0, **(options_of(mode) | more))


class Spoiled:
    """A network that does something else at some of its calls. ``spoil(out, t, call)`` returns the output."""

    def __init__(self, spoil: Callable[[Tensor, Tensor, int], Any], network: Network = arithmetic) -> None:
        self.spoil, self.network, self.calls, self.labels = spoil, network, 0, []

    def __call__(self, x: Tensor, t: Tensor) -> Any:
        self.calls += 1
        self.labels.append(t.clone())
        return self.spoil(self.network(x, t).clone(), t, self.calls)


def row_below(value: float, when: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    """``value`` in row 1 at all times below ``when``."""

    def spoil(out: Tensor, t: Tensor, call: int) -> Tensor:
        if t[1] < when:
            out[1, -1] = value
        return out

    return spoil


def row_once(value: float, n: int) -> Callable[[Tensor, Tensor, int], Tensor]:
    """``value`` in row 1 at the n-th call alone."""

    def spoil(out: Tensor, t: Tensor, call: int) -> Tensor:
        if call == n:
            out[1, 0] = value
        return out

    return spoil


def check_row_1_failed(spoil: Any, y0: Tensor, mode: dict[str, Any]) -> Solution:
    """Row 1 failed by NaN or Inf; the others are what they would be without it."""
    with pytest.raises(SolverError) as error:
        run(Spoiled(spoil), y0, mode)
    solution = error.value.solution
    assert isinstance(solution, Solution) and str(error.value) == solution.message and not solution.success
    asked = run(Spoiled(spoil), y0, mode, on_failure="status")
    assert torch.equal(asked.y.nan_to_num(7.0), solution.y.nan_to_num(7.0)) and asked.message == solution.message
    assert solution.status.dtype == torch.int8 and solution.status.tolist() == [0, Status.NOT_FINITE, 0, 0]
    assert f"sample 1 at t = {solution.t[1].item():.6g}:" in solution.message and "NaN or Inf" in solution.message
    assert not re.search("samples|sample [023]", solution.message)
    assert solution.y[1].isnan().all() and solution.y[OTHERS].isfinite().all()
    assert (solution.t[OTHERS] == SPAN[1]).all() and SPAN[1] < solution.t[1] <= SPAN[0]
    joint = mode in ADAPTIVE.values() and mode["control"] == "joint"
    clean = run(arithmetic, y0[OTHERS] if joint else y0, mode)
    rows = [0, 1, 2] if joint else OTHERS
    assert torch.equal(solution.y[OTHERS], clean.y[rows])
    for name in ("evaluations", "n_accepted", "n_rejected"):
        assert torch.equal(getattr(solution, name)[OTHERS], getattr(clean, name)[rows]), name
    if joint:
        assert torch.equal(solution.times, clean.times) and torch.equal(solution.step_sizes, clean.step_sizes)
    assert solution.nfe >= solution.evaluations.max()
    return solution


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_mode
def test_a_row_that_is_not_finite_from_the_start(mode: dict[str, Any], value: float) -> None:
    solution = check_row_1_failed(row_below(value, 2.0), prior(SDES["vp"], 4, 5), mode)
    assert solution.t[1] == SPAN[0] and solution.n_accepted[1] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_mode
def test_a_row_that_is_not_finite_in_the_middle(mode: dict[str, Any], value: float) -> None:
    solution = check_row_1_failed(row_below(value, 0.5), prior(SDES["vp"], 4, 5), mode)
    # An adaptive method looks at the far end of a step before it takes it. With fixed steps the state there is finite,
    # and what the network makes of it is seen in the next one.
    assert solution.t[1] >= 0.5 if mode in ADAPTIVE.values() else solution.t[1] > 0.3
    assert solution.n_accepted[1] > 0


@pytest.mark.parametrize("n", [1, 2, 6])
@every_mode
def test_nan_once(mode: dict[str, Any], n: int) -> None:
    """A NaN is no overflow: no smaller step is tried, so that it is not passed over in silence."""
    check_row_1_failed(row_once(math.nan, n), prior(SDES["vp"], 4, 5), mode)


@every_adaptive
def test_infinity_once_is_an_overflow(mode: dict[str, Any]) -> None:
    """It is met with a smaller step, and the result is right."""
    y0 = prior(SDES["vp"], 4, 5)
    solution = run(Spoiled(row_once(math.inf, 6)), y0, mode)
    assert solution.success and (solution.n_rejected[1] > 0)
    tolerance = options_of(mode)["rtol"]
    assert (solution.y - exactly(flow_of(SDES["vp"], arithmetic), SPAN, y0).y).abs().max() < 50 * tolerance


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_mode
def test_all_rows_fail(mode: dict[str, Any], value: float) -> None:
    def spoil(out: Tensor, t: Tensor, call: int) -> Tensor:
        return torch.where((t < 0.6)[:, None], value, out)

    solution = run(Spoiled(spoil), prior(SDES["vp"], 7, 5), mode, on_failure="status")
    assert (solution.status == Status.NOT_FINITE).all() and solution.y.isnan().all()
    assert ((solution.t > 0.4) & (solution.t < 1)).all()
    assert "samples 0" in solution.message and "(7 in all)" in solution.message


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ["RK45", "unipc"])
def test_rows_fail_one_after_the_other(method: str, control: str) -> None:
    def spoil(out: Tensor, t: Tensor, call: int) -> Tensor:
        for row, when in ((0, 0.7), (3, 0.3), (4, 0.3)):
            out[row] = torch.where(t[row] < when, math.nan, out[row])
        return out

    y0, mode = prior(SDES["vp"], 6, 5), {"method": method, "control": control}
    solution = run(Spoiled(spoil), y0, mode, on_failure="status")
    left = [1, 2, 5]
    assert (
        solution.status.tolist() == [1, 0, 0, 1, 1, 0]
        and (solution.t[[0, 3, 4]] >= torch.tensor([0.7, 0.3, 0.3])).all()
    )
    assert (solution.t[[3, 4]] < 0.7).all() and re.search(r"samples 0 \(at t = 0\.\d+\), 3 ", solution.message)
    clean = run(arithmetic, y0[left], mode)
    assert torch.equal(solution.y[left], clean.y)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("method", ["RK23", "RK45", "unipc"])
def test_dense_output_of_failed_rows(method: str, control: str) -> None:
    """Right before the failure, or NaN; NaN after it. The others' is as it would be without."""
    times = [1.0, 0.9, 0.6, 0.4, 0.2, 0.01]
    y0 = prior(SDES["vp"], 4, 5)
    mode = {"method": method, "control": control, "t_eval": times}
    clean = run(arithmetic, y0[OTHERS] if control == "joint" else y0, mode)
    for spoil in (row_below(math.nan, 0.5), row_once(math.nan, 12)):
        solution = run(Spoiled(spoil), y0, mode, on_failure="status")
        assert solution.status.tolist() == [0, 1, 0, 0]
        assert torch.equal(solution.ys[:, OTHERS], clean.ys if control == "joint" else clean.ys[:, OTHERS])
        after = torch.tensor(times, dtype=torch.float64) < solution.t[1]
        assert after.sum() >= 3 and solution.ys[after, 1].isnan().all()


# --- networks that raise, and outputs of another kind -----------------------------------------------------------------

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda out: out[:, :2],
    "batch": lambda out: out[:2],
    "integers": lambda out: out.long(),
    "complex": lambda out: out.cfloat(),
    "None": lambda out: None,
    "array": lambda out: out.numpy(),
}


@pytest.mark.parametrize("what", WRONG)
@every_mode
def test_wrong_outputs(mode: dict[str, Any], what: str) -> None:
    y0 = prior(SDES["vp"], 4, 5)
    for first in (1, 3):

        def spoil(out: Tensor, t: Tensor, call: int, first: int = first) -> Any:
            return out if call < first else WRONG[what](out)

        network = Spoiled(spoil)
        with pytest.raises(ValueError if first == 1 else SolverError, match="model: expected an output") as error:
            run(network, y0, mode, on_failure="raise")
        assert network.calls == first  # and no more
        if first > 1:
            assert isinstance(error.value.__cause__, ValueError)
            check_all_raised(error.value.solution)


def check_all_raised(solution: Solution) -> None:
    assert (solution.status == Status.RAISED).all() and solution.y.isnan().all()
    assert (solution.t > SPAN[1]).all() and (solution.t <= SPAN[0]).all()


@every_mode
def test_a_network_that_raises(mode: dict[str, Any]) -> None:
    for n in (1, 2, 10):

        def spoil(out: Tensor, t: Tensor, call: int, n: int = n) -> Any:
            if call == n:
                raise ZeroDivisionError("of the network")
            return out

        y0 = prior(SDES["vp"], 4, 5)
        if n == 1:
            for on_failure in ("raise", "status"):
                with pytest.raises(ZeroDivisionError, match="of the network"):
                    run(Spoiled(spoil), y0, mode, on_failure=on_failure)
            continue
        with pytest.raises(SolverError, match="ZeroDivisionError: of the network") as error:
            run(Spoiled(spoil), y0, mode)
        assert isinstance(error.value.__cause__, ZeroDivisionError)
        check_all_raised(error.value.solution)
        check_all_raised(run(Spoiled(spoil), y0, mode, on_failure="status"))


@pytest.mark.parametrize("mode", [m for m in ADAPTIVE.values() if m["control"] == "per_sample"], ids=str)
def test_rows_that_are_done_are_kept_when_the_network_raises(mode: dict[str, Any]) -> None:
    """Row 0 lies in the centre of the data: nothing happens to it."""
    y0 = prior(SDES["vp"], 4, 5)
    y0[0] = 0.0
    clean = run(arithmetic, y0, mode)
    done = clean.evaluations == clean.evaluations.min()
    assert done[0] and not done.all()
    first = int(clean.evaluations.min())

    def spoil(out: Tensor, t: Tensor, call: int) -> Tensor:
        if call > first:
            raise KeyError(call)
        return out

    solution = run(Spoiled(spoil), y0, mode, on_failure="status")
    assert solution.status.tolist() == [0 if d else int(Status.RAISED) for d in done]
    assert torch.equal(solution.y[done], clean.y[done]) and solution.y[~done].isnan().all()
    assert (solution.t[done] == SPAN[1]).all() and "sample 0" not in solution.message


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_the_user_may_interrupt(stop: type[BaseException]) -> None:
    def spoil(out: Tensor, t: Tensor, call: int) -> Tensor:
        if call == 5:
            raise stop
        return out

    for mode in ({"method": "RK45"}, {"method": "unipc"}, {"method": "unipc", "steps": 9}):
        with pytest.raises(stop):
            run(Spoiled(spoil), prior(SDES["vp"], 4, 5), mode, on_failure="status")


# --- hard problems ----------------------------------------------------------------------------------------------------


def jumping(x: Tensor, t: Tensor) -> Tensor:
    """Not continuous in t."""
    return arithmetic(x, t) + torch.where(t < 0.4, 0.8, 0.0).to(x.dtype)[:, None]


@every_adaptive
def test_a_network_that_jumps(mode: dict[str, Any]) -> None:
    y0 = prior(SDES["vp"], 4, 5)
    right = exactly(flow_of(SDES["vp"], arithmetic), (1.0, 0.4), y0).y
    right = exactly(flow_of(SDES["vp"], lambda x, t: arithmetic(x, t) + 0.8), (0.4, 0.01), right).y
    solution = run(jumping, y0, mode)
    # One step goes across; its error is estimated, but by a formula that takes the solution to be smooth.
    assert solution.success and (solution.n_rejected > 0).all()
    assert (solution.y - right).abs().max() < 300 * options_of(mode)["rtol"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_adaptive
def test_stiff_data(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """Data of standard deviation 1e-3: near the end the score is steeper by 1e6 than at the start."""
    sde, span, tolerance = VPSDE(), (1.0, 1e-3), 1e-4
    y0 = prior(sde, 4, 5, dtype=dtype)
    flow = flow_of(sde, gaussian(sde, 0.4, 1e-3))
    solution = solve(flow, span, y0, **(mode | {"rtol": tolerance, "atol": tolerance}))
    right = gaussian_solution(sde, y0.double(), *span, 0.4, 1e-3)
    assert solution.success and (solution.t == span[1]).all()
    assert (solution.y - right).abs().max() < 10 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_adaptive
def test_large_sigma(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """VE to sigma 348, as published for 1024 x 1024 images: the state falls from hundreds to one."""
    sde, span, tolerance = VESDE(0.01, 348), (1.0, 1e-5), 1e-4
    y0 = prior(sde, 4, 5, dtype=dtype)
    solution = solve(flow_of(sde, gaussian(sde)), span, y0, **(mode | {"rtol": tolerance, "atol": tolerance}))
    right = gaussian_solution(sde, y0.double(), *span, 0.4, 0.5)
    assert solution.success and (solution.t == span[1]).all()
    assert (solution.y - right).abs().max() < 100 * tolerance


@every_adaptive
def test_data_of_one_point(mode: dict[str, Any]) -> None:
    """Nothing could be easier for a method that predicts the data: its error estimates are rounding, and its steps do
    not become small for it. At the start the others have the same problem."""
    sde = SDES["vp"]
    y0 = prior(sde, 4, 5)
    solution = solve(flow_of(sde, gaussian(sde, 0.4, 0.0)), SPAN, y0, **(mode | {"rtol": 1e-4, "atol": 1e-4}))
    right = gaussian_solution(sde, y0, *SPAN, 0.4, 0.0)
    assert (solution.y - right).abs().max() < 10 * 1e-4
    if mode["method"] == "unipc":
        assert solution.nfe <= 30 and (solution.y - right).abs().max() < 1e-8


# --- giving up --------------------------------------------------------------------------------------------------------


@every_adaptive
def test_max_steps(mode: dict[str, Any]) -> None:
    y0 = prior(SDES["vp"], 4, 5)
    free = run(arithmetic, y0, mode)
    attempts = free.n_accepted + free.n_rejected
    needed = int(attempts.max())
    enough = run(arithmetic, y0, mode, max_steps=needed)
    assert enough.success and torch.equal(enough.y, free.y)
    for max_steps in (1, needed - 1):
        with pytest.raises(SolverError, match=f"max_steps = {max_steps} attempted steps") as error:
            run(arithmetic, y0, mode, max_steps=max_steps)
        solution = error.value.solution
        failed = attempts > max_steps
        assert solution.status.tolist() == [int(Status.MAX_STEPS) if f else 0 for f in failed]
        assert (solution.n_accepted + solution.n_rejected).tolist() == attempts.clamp(max=max_steps).tolist()
        assert solution.y[failed].isnan().all() and torch.equal(solution.y[~failed], free.y[~failed])
        assert (solution.t[failed] > SPAN[1]).all() and (solution.t[~failed] == SPAN[1]).all()
        assert (solution.evaluations[failed] < free.evaluations[failed]).all() and solution.nfe < free.nfe


@every_adaptive
def test_step_size_underflow(mode: dict[str, Any]) -> None:
    """A network that is noise has no step small enough; what is noise in one row alone stops that row alone, where
    every row has its own steps."""
    y0, noise = prior(SDES["vp"], 4, 5), torch.Generator().manual_seed(0)

    def spoil(out: Tensor, t: Tensor, call: int) -> Tensor:
        out[1] = 1e12 * torch.randn(5, generator=noise, dtype=out.dtype)
        return out

    solution = run(Spoiled(spoil), y0, mode, on_failure="status")
    if mode["control"] == "joint":
        assert (solution.status == Status.STEP_SIZE).all() and solution.y.isnan().all()
    else:
        assert solution.status.tolist() == [0, Status.STEP_SIZE, 0, 0]
        assert torch.equal(solution.y[OTHERS], run(arithmetic, y0, mode).y[OTHERS])
    assert "the step size fell below the spacing of the numbers" in solution.message
    assert solution.t[1] > 0.5


# --- refused ----------------------------------------------------------------------------------------------------------


def never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the network was called")


@every_mode
def test_states_of_other_kinds_are_refused(mode: dict[str, Any]) -> None:
    for y0 in (torch.ones(4, 5).long(), torch.ones(4, 5).cfloat(), torch.ones(4, 5).bool(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="y0: expected a floating-point tensor"):
            run(never, y0, mode)
    spoiled = torch.ones(4, 5)
    spoiled[2, 3] = math.nan
    with pytest.raises(ValueError, match="y0: expected finite values, got NaN or Inf in sample 2"):
        run(never, spoiled, mode)


@every_adaptive
def test_tolerances_below_rounding_are_refused(mode: dict[str, Any]) -> None:
    for dtype, tolerance in ((torch.float32, 1e-8), (torch.float64, 1e-17), (torch.bfloat16, 1e-4)):
        with pytest.raises(ValueError, match="rounding of torch"):
            run(never, torch.ones(4, 5, dtype=dtype), mode, rtol=tolerance, atol=tolerance)
        with pytest.raises(ValueError, match="rounding of torch"):
            run(never, torch.full((4, 5), 1e3, dtype=dtype), mode, rtol=0.0, atol=tolerance)


BAD = {
    "t_eval": [[0.5, 0.9], [1.1], [0.5, 0.001], [math.nan], [0.9, math.nan, 0.5]],
    "on_failure": ["", "ignore", None],
    "control": ["", "sample", None],
    "coordinate": ["phi", None],
    "max_steps": [0, -1, 2.5, None],
    "first_step": [0.0, -0.1, math.nan, "0.1"],
    "order": [0, 5, 2.5, "3"],
    "grid": [[1.0], [1.0, 0.5], [0.01, 1.0], [1.0, 0.5, 0.5, 0.01], [1.0, math.nan, 0.01], []],
    "steps": [0, -1, 2.5, "9"],
}


@pytest.mark.parametrize("method", ["RK45", "unipc"])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_arguments_are_refused_before_any_evaluation(method: str, name: str, value: Any) -> None:
    if (method, name) == ("RK45", "order"):
        return  # Runge-Kutta methods have theirs, and do not look at it
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        solve(flow_of(SDES["vp"], never), SPAN, torch.ones(4, 5), method, **{name: value})


def test_what_does_not_fit_together_is_refused() -> None:
    flow, y0 = flow_of(SDES["vp"], never), torch.ones(4, 5)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("coordinate", {"method": "unipc", "coordinate": "angle"}),
        ("pi", {"method": "unipc", "pi": True}),
        ("steps", {"method": "dpmpp_2m"}),
        ("steps", {"method": "euler", "control": "per_sample"}),
        ("steps, grid", {"method": "unipc", "steps": 3, "grid": [1.0, 0.01]}),
        ("t_eval", {"method": "unipc", "steps": 3, "t_eval": [0.5]}),
        ("t_eval", {"method": "euler", "steps": 3, "t_eval": [0.5]}),
        ("t_eval", {"method": "DOP853", "t_eval": [0.5]}),  # nothing in it is as accurate as its steps
    ]
    for name, options in cases:
        with pytest.raises(ValueError, match=rf"\b{name}: "):
            solve(flow, SPAN, y0, **options)
    for options in ({"method": "unipc"}, {"method": "dpmpp_2m", "steps": 4}, {"coordinate": "angle"}):
        with pytest.raises(ValueError, match="affine SDE"):
            solve(lambda t, y: never(y, t), SPAN, y0, **options)


# --- times ------------------------------------------------------------------------------------------------------------

SPANS = [  # ends that are no round numbers, in either precision, in either direction
    ((1.0, 0.01), torch.float32),
    ((1.0, 1e-5), torch.float64),
    ((0.73, 0.1 + 0.2), torch.float64),
    ((1e-3, 1.0), torch.float32),
    ((0.5, 0.5 - 1e-6), torch.float64),
]


@pytest.mark.parametrize("sde", SDES)
@every_mode
def test_no_evaluation_outside_the_interval(mode: dict[str, Any], sde: str) -> None:
    """The labels that the network saw: from the start, none beyond the ends; and the end is exact."""
    options = {"rtol": 1e-2, "atol": 1e-2} | mode | ({"steps": 3} if "steps" in mode else {})
    for span, dtype in SPANS:
        if "grid" in mode:
            options["grid"] = [span[0], span[0] + (span[1] - span[0]) / 3, span[1]]
        network = Spoiled(lambda out, t, call: out, gaussian(SDES[sde]))
        solution = solve(flow_of(SDES[sde], network), span, prior(SDES[sde], 3, 2, dtype=dtype), **options)
        labels = torch.stack(network.labels)
        low, high = torch.tensor(sorted(span), dtype=dtype)
        assert labels.dtype == dtype and low <= labels.min() and labels.max() <= high
        assert (labels[0] == torch.tensor(span[0], dtype=dtype)).all() and len(labels) == solution.nfe
        assert (solution.t == span[1]).all() and (solution.times[0] == span[0]).all()
        assert (solution.times[-1] == span[1]).all()
        if mode in ADAPTIVE.values():  # every row is evaluated at the end
            assert (labels == torch.tensor(span[1], dtype=dtype)).any(0).all()


def test_a_sum_that_overflows_is_no_failure() -> None:
    """Fixed steps look at a batch's sum first."""
    y0 = torch.full((3, 40), 3e38)
    solution = solve(lambda t, y: 0.0 * y, (0.0, 1.0), y0, "euler", steps=3)
    assert torch.equal(solution.y, y0) and solution.n_accepted.tolist() == [3, 3, 3]
