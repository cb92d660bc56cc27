"""Per-sample control: every row has its own steps, and nothing of the others in it, to the bit."""

import itertools
from typing import Any

import pytest
import torch
from flows import (
    ADAPTIVE,
    DENSE,
    SDES,
    Network,
    arithmetic,
    flow_of,
    gaussian,
    gaussian_solution,
    mixture,
    prior,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.integrate import Solution, solve
from scoresde_ext.models.utils import get_score_fn
from scoresde_ext.sde_lib import VESDE, AffineSDE

SPAN = (1.0, 0.01)
PER_SAMPLE = {name: mode for name, mode in ADAPTIVE.items() if mode["control"] == "per_sample"}
every_mode = pytest.mark.parametrize("mode", PER_SAMPLE.values(), ids=PER_SAMPLE)
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
few = settings(max_examples=4, deadline=None, derandomize=True)


def rational(sde: AffineSDE) -> Network:
    """Of plain arithmetic, and not stiff for VE either, whose diffusion is large."""
    scale = 1e-4 if isinstance(sde, VESDE) else 1.0
    return lambda x, t: scale * arithmetic(x, t)


# Plain arithmetic has the same bits wherever a row lies. torch's exp and tanh have them where a row fills whole vectors
# of the machine: 16 elements and more.
NETWORKS: dict[str, tuple[Any, int]] = {"arithmetic": (rational, 3), "exp": (mixture, 16)}
every_network = pytest.mark.parametrize("network", NETWORKS)


def options_of(mode: dict[str, Any], tolerance: float = 1e-4) -> dict[str, Any]:
    return mode | {"rtol": tolerance, "atol": tolerance}


def at_times(mode: dict[str, Any], *times: float) -> dict[str, Any]:
    return {"t_eval": list(times)} if mode in DENSE.values() else {}


def spread_out(sde: AffineSDE, batch: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of unlike difficulty."""
    return prior(sde, batch, size, dtype=dtype) * torch.linspace(0.0, 2.0, batch, dtype=dtype)[:, None]


def check_rows(part: Solution, whole: Solution, rows: Any) -> None:
    for name in ("y", "t", "status", "evaluations", "n_accepted", "n_rejected"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
    assert (part.ys is None and whole.ys is None) or torch.equal(part.ys, whole.ys[:, rows])
    for name in ("step_sizes", "error_norms"):
        mine, its = getattr(part, name), getattr(whole, name)[:, rows]
        assert torch.equal(mine.nan_to_num(-1), its[: len(mine)].nan_to_num(-1)), name
        assert its[len(mine) :].isnan().all()


@every_network
@every_sde
@every_mode
def test_rows_do_not_depend_on_the_batch(mode: dict[str, Any], sde: AffineSDE, network: str) -> None:
    """Permuted, in a part of the batch, alone: the same bits, and so are steps and counts."""
    make, size = NETWORKS[network]
    dtype = torch.float64 if network == "exp" else torch.float32
    flow, y0 = flow_of(sde, make(sde)), spread_out(sde, 9, size, dtype)
    options = options_of(mode, 1e-3) | at_times(mode, 0.9, 0.37, 0.01)
    whole = solve(flow, SPAN, y0, **options)
    for rows in (torch.randperm(9), [4, 0, 8, 8, 2], [7]):
        check_rows(solve(flow, SPAN, y0[rows], **options), whole, rows)


@pytest.mark.parametrize("method", ["RK45", "unipc"])
@few
@given(data=st.data(), sde=st.sampled_from(sorted(SDES)), network=st.sampled_from(sorted(NETWORKS)))
def test_any_permutation(method: str, data: st.DataObject, sde: str, network: str) -> None:
    batch, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99))
    rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=40))
    torch.manual_seed(seed)
    make, size = NETWORKS[network]
    flow, y0 = flow_of(SDES[sde], make(SDES[sde])), spread_out(SDES[sde], batch, size, torch.float32)
    options = {"method": method, "control": "per_sample", "rtol": 1e-3, "atol": 1e-3, "t_eval": [0.5]}
    check_rows(solve(flow, SPAN, y0[rows], **options), solve(flow, SPAN, y0, **options), rows)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
@every_mode
def test_rows_do_not_depend_on_the_batch_with_labels(mode: dict[str, Any], name: str) -> None:
    """With the labels and the scaling of ``get_score_fn``, of which VE's is a power."""
    sde, scale = SDES[name], 1e-4 if name == "ve" else 1.0

    def network(x: Tensor, labels: Tensor) -> Tensor:
        return -scale * x / (1 + x * x / 9 + 0.001 * labels[:, None])

    flow, y0 = ProbabilityFlow(sde, get_score_fn(sde, network, continuous=True)), spread_out(sde, 9, 3, torch.float32)
    options = options_of(mode, 1e-3) | at_times(mode, 0.5)
    whole = solve(flow, SPAN, y0, **options)
    for rows in (torch.randperm(9), [4, 0, 8], [7]):
        check_rows(solve(flow, SPAN, y0[rows], **options), whole, rows)


@every_sde
@every_mode
def test_a_row_takes_the_steps_it_would_take_alone(mode: dict[str, Any], sde: AffineSDE) -> None:
    """Joint control of one row is the same method: step by step. (Coefficients are computed by other functions there,
    so that the last digit may differ; an error norm is the difference of nearly equal numbers.)"""
    flow, y0 = flow_of(sde, mixture(sde)), spread_out(sde, 4, 3, torch.float64)
    options = options_of(mode)
    whole = solve(flow, SPAN, y0, **options)
    for row in (1, 3):
        alone = solve(flow, SPAN, y0[row : row + 1], **(options | {"control": "joint"}))
        assert alone.nfe == whole.evaluations[row] and len(alone.step_sizes) == (
            whole.n_accepted[row] + whole.n_rejected[row]
        )
        torch.testing.assert_close(alone.y[0], whole.y[row], rtol=1e-7, atol=1e-9)
        mine = whole.step_sizes[: len(alone.step_sizes), row]
        torch.testing.assert_close(alone.step_sizes, mine, rtol=1e-4, atol=1e-9)


@every_sde
@every_mode
def test_counts_add_up(mode: dict[str, Any], sde: AffineSDE) -> None:
    flow, y0 = flow_of(sde, mixture(sde)), spread_out(sde, 5, 3, torch.float64)
    s = solve(flow, SPAN, y0, **options_of(mode))
    attempts = s.n_accepted + s.n_rejected
    assert s.success and s.nfe == s.evaluations.max() and s.times.shape == (attempts.max() + 1, 5)
    assert s.step_sizes.shape == s.error_norms.shape == (attempts.max(), 5)
    assert torch.equal((~s.step_sizes.isnan()).sum(0), attempts)
    assert torch.equal((s.error_norms < 1).sum(0), s.n_accepted)
    # A step is accepted iff its norm is below 1, and time goes on then alone.
    assert torch.equal(s.times.diff(dim=0) != 0, s.error_norms < 1)
    assert (s.times.diff(dim=0) <= 0).all() and (s.times[0] == 1.0).all() and (s.times[-1] == 0.01).all()
    if mode["method"] != "unipc" and mode.get("coordinate", "t") == "t":
        moved = -s.times.diff(dim=0)
        torch.testing.assert_close(moved, torch.where(s.error_norms < 1, s.step_sizes, 0.0), rtol=1e-12, atol=0)
    assert s.first_step == pytest.approx(float(s.step_sizes[0].min()))  # as given, and as time moved
    stages = {"unipc": 1, "RK23": 3, "RK45": 6, "DOP853": 12}[mode["method"]]
    before = 1 if mode["method"] == "unipc" else 2  # the slope at the start, and the look ahead for the first step
    assert torch.equal(s.evaluations, before + stages * attempts)


@every_mode
def test_easy_rows_need_fewer_evaluations(mode: dict[str, Any]) -> None:
    """Row 0 is the centre of the data."""
    sde = SDES["vp"]
    y0 = prior(sde, 4, 3)
    y0[0] = 0.0
    s = solve(flow_of(sde, mixture(sde)), SPAN, y0, **options_of(mode, 1e-7))
    assert s.evaluations[0] < s.evaluations[1:].max() and (s.y[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
@every_mode
def test_nothing_to_integrate(mode: dict[str, Any], shape: tuple[int, ...]) -> None:
    s = solve(flow_of(SDES["vp"], lambda x, t: -x), SPAN, torch.ones(shape), **mode, **at_times(mode, 0.5, 0.01))
    assert s.success and s.y.shape == shape and s.t.tolist() == [0.01] * shape[0]
    assert mode not in DENSE.values() or s.ys.shape == (2, *shape)


def test_parts_of_a_state() -> None:
    """Two arrays under one control: the norm is over both."""

    def f(t: Tensor, ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, v = ys
        return v[:, None].expand_as(x), -9 * x[:, 0] - 0.2 * v

    y0 = (torch.randn(6, 2, dtype=torch.float64), torch.linspace(-3, 3, 6, dtype=torch.float64))
    for method in ("RK23", "RK45"):
        options: dict[str, Any] = {"control": "per_sample", "rtol": 1e-6, "atol": 1e-6, "t_eval": [0.0, 0.4, 2.0]}
        whole = solve(f, (0.0, 2.0), y0, method, **options)
        tight = solve(f, (0.0, 2.0), y0, "DOP853", rtol=1e-12, atol=1e-12)
        for part in (0, 1):
            torch.testing.assert_close(whole.y[part], tight.y[part], rtol=0, atol=3e-5)
            assert torch.equal(whole.ys[part][0], y0[part]) and torch.equal(whole.ys[part][2], whole.y[part])
        for row in range(6):
            one = solve(f, (0.0, 2.0), tuple(y[row : row + 1] for y in y0), method, **options)
            assert all(torch.equal(a[0], b[row]) for a, b in zip(one.y, whole.y, strict=True))


def test_times_that_a_network_sees() -> None:
    """Each row its own; rows that are done are shown where they stand."""
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.clone())
        return arithmetic(x, t)

    s = solve(flow_of(SDES["vp"], network), SPAN, spread_out(SDES["vp"], 4, 3, torch.float64), control="per_sample")
    labels = torch.stack(seen)
    assert labels.shape == (s.nfe, 4) and (labels[1:-1].std(1) > 0).any()
    for row, n in enumerate(s.evaluations.tolist()):
        assert (labels[n:, row] == SPAN[1]).all() and labels[n - 1, row] == SPAN[1]


@every_sde
@every_mode
def test_every_row_meets_its_tolerance(mode: dict[str, Any], sde: AffineSDE) -> None:
    y0 = spread_out(sde, 6, 3, torch.float64)
    for tolerance in (1e-3, 1e-5):
        s = solve(flow_of(sde, gaussian(sde)), SPAN, y0, **options_of(mode, tolerance))
        error = (s.y - gaussian_solution(sde, y0, *SPAN, 0.4, 0.5)).square().mean(1).sqrt()
        assert error.max() < 100 * tolerance


def test_pi_control_rejects_less() -> None:
    """On a stiff problem, where the step size is the stability's limit and the usual control runs into it again and
    again."""
    sde = SDES["vp"]
    flow, y0 = flow_of(sde, gaussian(sde, 0.4, 1e-3)), prior(sde, 4, 3)
    rejected: dict[tuple[bool, str], int] = {}
    for pi, control in itertools.product((False, True), ("joint", "per_sample")):
        s = solve(flow, (1.0, 1e-4), y0, rtol=1e-3, atol=1e-3, pi=pi, control=control)
        rejected[pi, control] = int(s.n_rejected.sum())
        right = gaussian_solution(sde, y0, 1.0, 1e-4, 0.4, 1e-3)
        assert (s.y - right).abs().max() < 1e-2
    for control in ("joint", "per_sample"):
        assert rejected[True, control] < 0.7 * rejected[False, control], rejected
