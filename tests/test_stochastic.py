"""Samplers of the reverse-time SDE: the right law, on a Brownian path that step-size control leaves alone."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from scoresde_ext import noise, ops, sde_lib, stochastic
from scoresde_ext.integrate import SolverError, Status
from scoresde_ext.stochastic import BrownianTree, get_sde_sampler

EPS = 1e-3


class Cosine(sde_lib.AffineSDE):
    """A user's own: m = cos(theta), s = sin(theta)."""

    speed = 0.99 * math.pi / 2

    def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(self.speed * t), torch.sin(self.speed * t)

    def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.speed * torch.tan(self.speed * t)
        return -slope, torch.sqrt(2 * slope)


SDES = {"vp": sde_lib.VPSDE(), "subvp": sde_lib.subVPSDE(), "ve": sde_lib.VESDE(), "own": Cosine(10)}
every_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
every_method = pytest.mark.parametrize("method", stochastic.METHODS)
every_fixed = pytest.mark.parametrize("method", stochastic.FIXED)


def network_of(sde: Any, data: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The network whose prediction of the data is ``data(x, m, s)``, in upstream's conventions of each SDE; m and s are
    shaped to multiply x."""

    def network(x: Tensor, labels: Tensor) -> Tensor:
        if isinstance(sde, sde_lib.VESDE):
            m, s = torch.ones_like(labels), labels
        else:
            m, s = sde.marginal_coefficients(labels / 999 if isinstance(sde, sde_lib._DiscreteVP) else labels)
        m, s = (v.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) for v in (m, s))
        noise = (x - m * data(x, m, s)) / s
        return noise if isinstance(sde, sde_lib._DiscreteVP) else -noise / s

    return network


def normal_data(spread: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Data N(0, spread^2), in plain arithmetic: no row depends on its neighbours."""
    return lambda x, m, s: x * (m * spread**2 / ((spread * m) ** 2 + s * s))


def mixture(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """Every element is one of four numbers, plus a normal number of standard deviation 0.1."""
    m, s, centres = m[..., None], s[..., None], torch.tensor([-0.8, -0.2, 0.3, 0.9], dtype=x.dtype)
    variance = (0.1 * m) ** 2 + s * s
    off = x[..., None] - m * centres
    weights = torch.softmax(-off * off / (2 * variance), -1)
    return (weights * (centres + 0.01 * m / variance * off)).sum(-1)


def make(sde: Any, shape: tuple[int, ...], method: str, **options: Any) -> stochastic.SdeSampler:
    return get_sde_sampler(sde, shape, lambda x: x, method=method, device="cpu", **options)


def marginal(sde: Any, t: float) -> tuple[float, float]:
    m, s = sde.marginal_coefficients(torch.tensor([t], dtype=torch.float64))
    return float(m), float(s)


def deviation(sde: Any, spread: float, t: float) -> float:
    """The standard deviation of the state at time t."""
    m, s = marginal(sde, t)
    return math.hypot(spread * m, s)


# --- fixed steps ------------------------------------------------------------------------------------------------------

GRID = [1.0, 0.8, 0.55, 0.5, 0.3, 0.07, 0.01, EPS]


@every_sde
@every_method
def test_transitions_of_a_known_point_are_exact(sde: Any, method: str) -> None:
    """All data are 0.7: D is constant, and the state is normal with mean 0.7 m and standard deviation s, however long
    the steps are. 40000 numbers, five standard errors."""
    options: dict[str, Any] = {} if method == "adaptive" else {"grid": [1.0, 0.4, EPS]}
    network = network_of(sde, lambda x, m, s: torch.full_like(x, 0.7))
    m, s = marginal(sde, 1.0)
    z = (0.7 * m + s * torch.randn(4000, 10, generator=torch.Generator().manual_seed(3))).double()
    x, _ = make(sde, (4000, 10), method, denoise=False, seeds=5, **options)(network, z)
    m, s = marginal(sde, EPS)
    assert x.dtype == torch.float64
    assert abs(x.mean() - 0.7 * m) < 5 * s / math.sqrt(x.numel())
    assert abs(x.var() / s**2 - 1) < 5 * math.sqrt(2 / x.numel())
    data, _ = make(sde, (4000, 10), method, seeds=5, **options)(network, z)
    torch.testing.assert_close(data, torch.full_like(data, 0.7), rtol=0, atol=1e-6)  # labels are rounded to float32


@pytest.mark.parametrize("order", [1, 2])
@every_fixed
@every_sde
def test_steps_are_those_of_the_formulas(sde: Any, method: str, order: int) -> None:
    """SDE-DPM-Solver++ of first and second order, and the same with a corrected start of every step."""
    data = normal_data(0.5)
    draws = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    z = draws[0] * deviation(sde, 0.5, 1.0)
    results = []
    for denoise in (False, True):
        sampler = make(sde, (3, 4), method, grid=GRID, order=order, denoise=denoise)
        with noise.replay(draws[1:]):
            results.append(sampler.solve(network_of(sde, data), z.double()))
    x = predicted = z.double()
    values: list[Tensor] = []
    lengths = [math.nan]
    gain = math.nan
    for (t, t_next), draw in zip(itertools.pairwise(GRID), draws[1:], strict=True):
        (m, s), (m_next, s_next) = marginal(sde, t), marginal(sde, t_next)
        values.append(data(predicted, torch.tensor(m), torch.tensor(s)))
        if method == "unipc_sde" and len(values) > 1:  # the last step again, between its ends in place of beyond one
            inside, beyond = values[-1] - values[-2], torch.zeros_like(x)
            if order == 2 and len(values) > 2:
                beyond = lengths[-1] / lengths[-2] * (values[-2] - values[-3])
            x = predicted + 0.5 * gain * (inside - beyond)
        h = math.log(m_next / s_next) - math.log(m / s)
        lengths.append(h)
        gain = m_next * (1 - math.exp(-2 * h))
        value = values[-1]
        if order == 2 and len(values) > 1:
            value = value + 0.5 * h / lengths[-2] * (values[-1] - values[-2])
        predicted = s_next / s * math.exp(-h) * x + gain * value
        x = predicted = predicted + s_next * math.sqrt(1 - math.exp(-2 * h)) * draw.double()
    last = data(predicted, *(torch.tensor(v) for v in marginal(sde, EPS)))
    # The network's labels are float32, which D sees as a relative error of that size.
    size = z.abs().max().item()
    torch.testing.assert_close(results[0].y, x, rtol=1e-5, atol=1e-6 * size)
    torch.testing.assert_close(results[1].y, last, rtol=1e-5, atol=1e-6 * size)
    assert [r.nfe for r in results] == [7, 8]
    assert results[1].evaluations.tolist() == [8, 8, 8] and results[1].n_accepted.tolist() == [7, 7, 7]
    assert (results[0].t == EPS).all() and results[0].times.tolist() == pytest.approx(GRID)


def variance(sde: Any, spread: float, **options: Any) -> float:
    """The variance of a sampler's results, exactly: for normal data it is a linear function of all the normal numbers
    that are drawn; row i is handed the i-th of them alone, and returns what it is multiplied by."""
    steps = options["steps"]
    z = torch.zeros(steps + 1, 1, dtype=torch.float64)
    z[0] = deviation(sde, spread, 1.0)
    draws = torch.eye(steps + 1, dtype=torch.float64)[1:, :, None]
    with noise.replay(list(draws)):
        x, _ = make(sde, (steps + 1, 1), denoise=False, **options)(network_of(sde, normal_data(spread)), z)
    return float(x.square().sum())


@every_sde
def test_order_in_law(sde: Any) -> None:
    """Twice the steps, half the error of the variance at order 1, and a quarter at order 2. With 50 steps, the
    corrected method has less than half the error of the other; with more, its error changes sign, and is no larger."""
    right = deviation(sde, 0.5, EPS) ** 2

    def errors(method: str, order: int) -> list[float]:
        return [abs(variance(sde, 0.5, method=method, order=order, steps=n) / right - 1) for n in (50, 100, 200)]

    first, second, corrected = errors("dpmpp_2m_sde", 1), errors("dpmpp_2m_sde", 2), errors("unipc_sde", 2)
    assert 1.8 < first[1] / first[2] < 2.2
    assert 3.4 < second[1] / second[2] < 4.6
    assert second[0] < 0.05 < first[0]
    assert corrected[0] < 0.5 * second[0]
    assert all(a < b for a, b in zip(corrected, second, strict=True))


def test_default_steps_are_equal_in_log_snr() -> None:
    for sde in SDES.values():
        solution = make(sde, (2, 3), "dpmpp_2m_sde", seeds=0).solve(network_of(sde, normal_data(0.5)))
        assert solution.nfe == 51
        steps = sde.log_snr(solution.times).diff()
        torch.testing.assert_close(steps, steps.mean().expand(50), rtol=1e-9, atol=0)


# --- the Brownian path ------------------------------------------------------------------------------------------------

N = 2**BrownianTree.LEVELS
START, END = -5.0, 7.0


def tree(batch: int = 3, shape: tuple[int, ...] = (4,), seed: int = 0, ids: Any = None) -> BrownianTree:
    with noise.seeds(seed, range(batch) if ids is None else ids):
        return BrownianTree(torch.zeros(batch, *shape), START, END)


def at(path: BrownianTree, *points: int) -> Tensor:
    return path(torch.tensor(points)).double()


def clock(j: int) -> float:
    return math.exp(2 * (START + (END - START) * j / N))


def test_path_does_not_depend_on_what_was_asked() -> None:
    """Nor on the batch, or on where the other samples are; another stream or seed is another path."""
    points = [0, 1, N // 3, N // 2, 5 * N // 8, N - 1, N]
    ids = [4, 2**40, -1, 0, 9, 3, 7]
    together = at(tree(7, ids=ids), *points)
    for i, j in reversed(list(enumerate(points))):
        path = tree(1, ids=ids[i : i + 1])
        at(path, N // 7)
        assert torch.equal(at(path, j)[0], together[i])
    assert (together[0] == 0).all()
    path, other, reseeded = tree(), tree(ids=[5, 6, 7]), tree(seed=1)
    for j in (3, N // 2, N):
        numbers = torch.cat([at(p, j, j, j) for p in (path, other, reseeded)]).flatten()
        assert len(numbers.unique()) == len(numbers)


def test_law_of_the_path() -> None:
    """Increments are normal, with the clock's differences as variances, and uncorrelated: over intervals next to each
    other, of lengths from one point of the tree to all of it. 40000 numbers, five standard errors."""
    path = tree(100, (400,))
    points = [0, 2, 3, 4, 1000, N // 4 - 1, N // 4, N // 4 + 3, N // 2, N // 2 + N // 16, N - 1, N]
    values = [at(path, *[j] * 100) for j in points]
    increments = []
    for (j, w), (j_next, w_next) in itertools.pairwise(zip(points, values, strict=True)):
        # From point to point the clock runs by 2e-8 of itself: float32 still holds W to 1e-7 of the increment's
        # standard deviation times 7e3, 1e-3.
        scaled = ((w_next - w) / math.sqrt(clock(j_next) - clock(j))).flatten()
        increments.append(scaled)
        n = len(scaled)
        assert abs(scaled.mean()) < 5 / math.sqrt(n)
        assert abs(scaled.square().mean() - 1) < 5 * math.sqrt(2 / n) + 2e-3
        assert stats.kstest(scaled.numpy(), "norm").pvalue > 1e-6
    correlations = torch.corrcoef(torch.stack(increments)) - torch.eye(len(increments))
    assert correlations.abs().max() < 5 / math.sqrt(n)


GAPS = [1e-3, 0.3, 0.02, 2.0, 1e-5, 3.0, 0.7, 1e-3, 0.4, 4.0]  # in log-SNR


def test_law_along_the_path() -> None:
    """The same for points that all samples share, at distances from 1e-5 to 4: increments are normal, with the clock's
    differences as variances, and uncorrelated."""
    log_snr = list(itertools.accumulate(GAPS, initial=START))
    path = tree(100, (400,))
    before, increments = torch.zeros(100, 400, dtype=torch.float64), []
    for (at_left, at_right), w in zip(itertools.pairwise([*log_snr, END]), path.along(log_snr[1:]), strict=True):
        # The points are rounded to the tree's, by up to 6e-9, and W to float32: that shows in the shortest step alone.
        scaled = ((w.double() - before) / math.sqrt(math.exp(2 * at_right) - math.exp(2 * at_left))).flatten()
        increments.append(scaled)
        before, n = w.double(), len(scaled)
        assert abs(scaled.mean()) < 5 / math.sqrt(n)
        assert abs(scaled.square().mean() - 1) < 5 * math.sqrt(2 / n) + 2e-3
        assert stats.kstest(scaled.numpy(), "norm").pvalue > 1e-6
    correlations = torch.corrcoef(torch.stack(increments)) - torch.eye(len(increments))
    assert correlations.abs().max() < 5 / math.sqrt(n)


def test_points_along_the_path_are_the_trees() -> None:
    """Where they are the middles of halves, quarters and eighths, to rounding, and at any point the better the more
    points there are; the same whatever the batch."""
    ids, points = [4, 2**40, -1], [N // 8 * i for i in range(1, 8)]
    path = tree(ids=ids)
    log_snr = (START + (END - START) * torch.tensor(points) / N).tolist()
    for j, w in zip([*points, N], path.along(log_snr), strict=True):
        torch.testing.assert_close(w, path(torch.tensor([j] * 3)), rtol=0, atol=1e-6 * math.sqrt(clock(j)))
    mates = tree(5, ids=[7, *ids, 0])
    for count in (10, 50):
        log_snr = torch.linspace(START, END, count + 1, dtype=torch.float64)[1:-1].tolist()
        distances = []
        for at_point, w, other in zip([*log_snr, END], path.along(log_snr), mates.along(log_snr), strict=True):
            assert torch.equal(w, other[1:4])
            right = at(path, *[round((at_point - START) / path.spacing)] * 3)
            distances.append((w.double() - right) / math.sqrt(math.exp(2 * at_point)))
        # a bridge over two distances has a variance of up to half a distance in the clock
        assert torch.stack(distances).square().mean() < 0.5 * math.expm1(2 * (END - START) / count)


def test_nothing_is_drawn_twice_along_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than three numbers a step, also where points fall together."""
    drawn: list[int] = []
    draw = BrownianTree.draw
    monkeypatch.setattr(BrownianTree, "draw", lambda path, j: (drawn.append(j), draw(path, j))[1])
    near = START + 1.0
    for log_snr in (
        torch.linspace(START, END, 51, dtype=torch.float64)[1:-1].tolist(),
        [near, near + 1e-10, near + 2e-10, near + 1e-7, END - 1e-12],
        [START + 1e-12],
        [],
    ):
        drawn.clear()
        path = tree()
        values = list(path.along(log_snr))
        assert len(values) == len(log_snr) + 1 and torch.equal(values[-1], path.at_end)
        assert len(set(drawn)) == len(drawn)
        if len(log_snr) == 49:
            assert len(drawn) < 3 * 50


class Recorded(BrownianTree):
    """A path that keeps what it was asked and answered."""

    last: "Recorded"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[tuple[Tensor, Tensor]] = []
        Recorded.last = self

    def __call__(self, j: Tensor) -> Tensor:
        w = super().__call__(j)
        self.asked.append((j, w))
        return w


def test_rejected_steps_keep_their_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rejected step saw of W at its end is what is there when the sample comes past it in smaller steps; over
    these steps the increments add up to the rejected one's."""
    monkeypatch.setattr(stochastic, "BrownianTree", Recorded)
    sde = SDES["vp"]
    sampler = make(sde, (1, 16), "adaptive", seeds=(8, [3]), rtol=3e-3, atol=3e-3)
    solution = sampler.solve(network_of(sde, mixture))
    asked = [(int(j), w.double()) for j, w in Recorded.last.asked]
    accepted = (solution.error_norms[:, 0] < 1).tolist()
    assert len(asked) == len(accepted) and accepted.count(False) == int(solution.n_rejected) > 5
    with noise.seeds(8, [3]):
        noise.normal(torch.zeros(1, 16))  # the prior's
        path = BrownianTree(torch.zeros(1, 16), Recorded.last.start, sde.log_snr(EPS))
    origin = torch.zeros(1, 16, dtype=torch.float64)
    here, accepted_points, rejections = (0, origin), [(0, origin)], []
    for i, ((j, w), good) in enumerate(zip(asked, accepted, strict=True)):
        assert torch.equal(w, at(path, j))
        assert j > here[0]
        if good:
            here = (j, w)
            accepted_points.append(here)
        else:
            assert asked[i + 1][0] < j  # a smaller step from the same point
            rejections.append((here, (j, w)))
    assert here[0] == N
    for (start, at_start), (end, at_end) in rejections:
        inside = [(j, w) for j, w in accepted_points if start <= j < end] + [(end, at_end)]
        assert len(inside) > 2
        increments = [after - before for (_, before), (_, after) in itertools.pairwise(inside)]
        right = at_end - at_start
        torch.testing.assert_close(sum(increments), right, rtol=0, atol=1e-12 * at_end.abs().max().item())


def samples_at(method: str, sde: Any, **options: Any) -> Tensor:
    sampler = make(sde, (20, 8), method, seeds=4, denoise=False, **options)
    return sampler(network_of(sde, normal_data(0.5)))[0].double()


@every_fixed
@pytest.mark.parametrize("kind", ["vp", "subvp", "ve"])
def test_more_steps_are_nearer_to_the_same_samples(kind: str, method: str) -> None:
    """Sample by sample, against 512 short steps and against adaptive steps on the same Brownian path. Twice the steps
    halve the error. Without a common path every error would be that of independent samples, 0.7."""
    sde = SDES[kind]
    right = fine_path(sde, network_of(sde, normal_data(0.5)), 20, 8, 4, 512)
    adaptive = samples_at("adaptive", sde, rtol=4e-3, atol=4e-3)
    found = {steps: samples_at(method, sde, steps=steps) for steps in (20, 40, 50, 100, 200)}
    errors = {steps: (x - right).square().mean().sqrt().item() for steps, x in found.items()}
    assert errors[20] < 0.2 and errors[200] < 0.02
    assert errors[20] > 1.5 * errors[40] and errors[50] > 1.5 * errors[100] > 1.5 * 1.4 * errors[200]
    assert torch.corrcoef(torch.stack([found[20].flatten(), found[40].flatten()]))[0, 1] > 0.95
    assert (found[200] - adaptive).square().mean().sqrt() < 0.04


@every_fixed
def test_another_grid_leads_to_the_same_samples(method: str) -> None:
    """One of the user's own, at no points of the tree."""
    sde = SDES["vp"]
    grid = torch.cat([torch.linspace(1.0, 0.1, 60)[:-1], torch.logspace(-1, -3, 60)]).double()
    grid[-1] = EPS
    own, equal = samples_at(method, sde, grid=grid), samples_at(method, sde, steps=100)
    assert (own - equal).square().mean().sqrt() < 0.05


# --- adaptive steps ---------------------------------------------------------------------------------------------------


@every_sde
def test_law_of_adaptive_sampling(sde: Any) -> None:
    """Normal data with a mean and correlations: 3000 samples, five standard errors, and 2 % for the error of the steps
    at this tolerance, in units of the standard deviations."""
    mean = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    root = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.2, 0.0], [-0.1, 0.1, 0.4]], dtype=torch.float64)
    covariance = root @ root.T

    def data(x: Tensor, m: Tensor, s: Tensor) -> Tensor:
        at_t = m[..., None] ** 2 * covariance + s[..., None] ** 2 * torch.eye(3, dtype=torch.float64)
        return mean + m * torch.linalg.solve(at_t, x - m * mean) @ covariance

    n = 3000
    m, s = marginal(sde, 1.0)
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = m * mean + z @ torch.linalg.cholesky(m**2 * covariance + s**2 * torch.eye(3, dtype=torch.float64)).T
    solution = make(sde, (n, 3), "adaptive", denoise=False, seeds=1, rtol=3e-3, atol=3e-3).solve(
        network_of(sde, data), z
    )
    assert solution.n_rejected.double().mean() > 3  # else the steps were not chosen by what happened
    m, s = marginal(sde, EPS)
    right = m**2 * covariance + s**2 * torch.eye(3, dtype=torch.float64)
    scale = right.diagonal().sqrt()
    x = solution.y
    assert ((x.mean(0) - m * mean).abs() < (5 / math.sqrt(n) + 0.02) * scale).all()
    # A covariance has the standard error sqrt((c_ii c_jj + c_ij^2) / n).
    error = ((scale[:, None] * scale).square() + right.square()).div(n).sqrt()
    assert ((x.T.cov() - right).abs() < 5 * error + 0.02 * scale[:, None] * scale).all()


def fine_path(sde: Any, network: Any, batch: int, size: int, seed: int, steps: int) -> Tensor:
    """Samples by equal short steps with a constant D each, in float64, on the path that the sampler takes."""
    with noise.seeds(seed, range(batch)):
        x = noise.prior(sde, (batch, size), "cpu")
        path = BrownianTree(x, sde.log_snr(1.0), sde.log_snr(EPS))
    x, before = x.double(), torch.zeros(batch, size, dtype=torch.float64)
    points = torch.arange(steps + 1) * (N // steps)
    times = sde.time_at(path.log_snr(points)).clamp(EPS, 1.0)
    m, s = sde.marginal_coefficients(times)
    log_snr = path.log_snr(points)
    for i in range(steps):
        labels = s[i] if isinstance(sde, sde_lib.VESDE) else 999 * times[i]
        out = network(x, labels.float().expand(batch))
        value = (x + (s[i] ** 2 if isinstance(sde, sde_lib.VESDE) else -s[i]) * out) / m[i]
        h, w = log_snr[i + 1] - log_snr[i], at(path, *[int(points[i + 1])] * batch)
        x = s[i + 1] / s[i] * torch.exp(-h) * x - m[i + 1] * torch.expm1(-2 * h) * value
        x, before = x + s[i + 1] ** 2 / m[i + 1] * (w - before), w
    return x


@pytest.mark.parametrize("kind", ["vp", "subvp", "ve"])
def test_strong_error_falls_with_the_tolerance(kind: str) -> None:
    """Sample by sample, against 512 short steps on the same Brownian path. (Those are themselves off by up to 0.01 for
    data of standard deviation 0.5.) The error is at most ten times the tolerance."""
    sde = SDES[kind]
    network = network_of(sde, normal_data(0.5))
    right = fine_path(sde, network, 20, 8, 4, 512)
    errors, evaluations = [], []
    for tolerance in (1e-1, 2e-2, 4e-3):
        options = {"seeds": 4, "rtol": tolerance, "atol": tolerance, "denoise": False}
        solution = make(sde, (20, 8), "adaptive", **options).solve(network)
        errors.append((solution.y - right).square().mean().sqrt().item())
        evaluations.append(int(solution.evaluations.double().mean()))
        assert errors[-1] < 10 * tolerance
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]
    assert errors[-1] < 0.02
    assert evaluations == sorted(evaluations) and evaluations[-1] < 130


def test_narrow_data_are_not_stepped_over() -> None:
    """Data far narrower than the tolerance: what happens to D happens within a short time."""
    sde, spread = SDES["vp"], 0.02
    x, nfe = make(sde, (500, 10), "adaptive", denoise=False, seeds=0)(network_of(sde, normal_data(spread)))
    # 5000 numbers: five standard errors are 10 %; the shortest steps that are taken, half a unit each, leave 5 %.
    assert abs(x.double().var() / deviation(sde, spread, EPS) ** 2 - 1) < 0.15
    assert nfe < 40


# --- seeds, shapes, failures ------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", ["vp", "ve", "own"])
def test_samples_do_not_depend_on_their_batch(kind: str, method: str) -> None:
    """Bit for bit, with all that is said of them, for a network in plain arithmetic."""
    sde = SDES[kind]
    network = network_of(sde, normal_data(0.3))

    def solve(batch: int, seeds: Any) -> Any:
        return make(sde, (batch, 5), method, seeds=seeds).solve(network)

    before = torch.random.get_rng_state()
    whole = solve(37, 11)  # more than a vector register holds
    assert torch.equal(before, torch.random.get_rng_state())
    for ids in ([4, 36, 2], [35], list(range(37))):
        part = solve(len(ids), (11, ids))
        for name in ("y", "t", "evaluations", "n_accepted", "n_rejected"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[ids]), name
    assert (solve(37, 12).y != whole.y).all()
    if method == "adaptive":
        assert len(whole.evaluations.unique()) > 1


@every_method
@pytest.mark.parametrize("shape", [(3,), (2, 3, 2, 2), (0, 4), (2, 0)], ids=str)
def test_shapes(method: str, shape: tuple[int, ...]) -> None:
    sde = SDES["vp"]
    for denoise in (False, True):
        x, _ = make(sde, shape, method, seeds=1, denoise=denoise, progress=True)(network_of(sde, normal_data(0.5)))
        assert x.shape == shape and x.dtype == torch.float32 and x.isfinite().all()
    scaled, _ = get_sde_sampler(sde, shape, lambda x: 2 * x + 1, method=method, seeds=1, denoise=denoise, device="cpu")(
        network_of(sde, normal_data(0.5))
    )
    assert torch.equal(scaled, 2 * x + 1)


def test_noise_by_default_is_of_torchs_generator() -> None:
    sde = SDES["vp"]
    for method in stochastic.METHODS:
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(make(sde, (2, 3), method)(network_of(sde, normal_data(0.5)))[0])
        assert torch.equal(runs[0], runs[1]) and (runs[0] != runs[2]).all()
    with pytest.raises(ValueError, match=r"noise\.replay: expected noise\.seeds"), noise.replay([torch.zeros(2, 3)]):
        make(sde, (2, 3), "adaptive")(network_of(sde, normal_data(0.5)))


def failing(network: Any, value: float, row: int, below: float) -> Any:
    def fails(x: Tensor, labels: Tensor) -> Tensor:
        out = network(x, labels).clone()
        if len(out) > row:
            out[row] = torch.where(labels[row] < 999 * below, value, out[row])
        return out

    return fails


@every_method
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("below", [2.0, 0.5, 0.0011], ids=["start", "middle", "end"])
def test_a_failing_sample_is_named_and_left_out(method: str, value: float, below: float) -> None:
    sde = SDES["vp"]
    network = network_of(sde, normal_data(0.5))
    right = make(sde, (4, 3), method, seeds=2).solve(network)
    with pytest.raises(SolverError, match=r"sample 2 at t = [0-9.]+: NaN or Inf") as raised:
        make(sde, (4, 3), method, seeds=2)(failing(network, value, 2, below))
    silent = make(sde, (4, 3), method, seeds=2, on_failure="status").solve(failing(network, value, 2, below))
    for solution in (raised.value.solution, silent):
        assert solution is not None
        assert solution.status.tolist() == [0, 0, Status.NOT_FINITE, 0]
        assert solution.y[2].isnan().all()
        others = [0, 1, 3]
        assert torch.equal(solution.y[others], right.y[others])
        assert torch.equal(solution.evaluations[others], right.evaluations[others])
        assert below - 0.2 < solution.t[2] or below == 2.0
        assert (solution.t[others] == EPS).all()


@every_method
def test_a_network_that_raises(method: str) -> None:
    sde = SDES["vp"]
    network = network_of(sde, normal_data(0.5))

    def raises(x: Tensor, labels: Tensor) -> Tensor:
        if (labels < 500).any():
            raise RuntimeError("out of memory")
        return network(x, labels)

    with pytest.raises(SolverError, match="samples 0, 1.*RuntimeError: out of memory") as raised:
        make(sde, (2, 3), method, seeds=2)(raises)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert raised.value.solution is not None and (raised.value.solution.status == Status.RAISED).all()
    with pytest.raises(ValueError, match="model: expected an output of the shape of its input"):
        make(sde, (2, 3), method, seeds=2)(lambda x, labels: x[:1])


def test_samples_that_were_finished_when_the_network_raised() -> None:
    sde = SDES["vp"]
    network = network_of(sde, normal_data(0.5))
    right = make(sde, (6, 3), "adaptive", seeds=2).solve(network)
    fewest, calls = int(right.evaluations.min()), []
    assert fewest < right.nfe

    def raises(x: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > fewest:
            raise KeyError("label")
        return network(x, labels)

    solution = make(sde, (6, 3), "adaptive", seeds=2, on_failure="status").solve(raises)
    finished = right.evaluations == fewest
    assert torch.equal(solution.status == Status.SUCCESS, finished)
    assert torch.equal(solution.y[finished], right.y[finished]) and solution.y[~finished].isnan().all()


def test_a_network_that_jumps() -> None:
    """No step size makes its gap small: the samples are given up, with what they took."""
    sde = SDES["vp"]
    jumps = network_of(sde, lambda x, m, s: torch.sign(torch.sin(1e6 * x)) * 100)
    with pytest.raises(SolverError, match="max_steps = 40 attempted steps did not reach the end") as raised:
        make(sde, (2, 3), "adaptive", seeds=2, max_steps=40)(jumps)
    solution = raised.value.solution
    assert solution is not None and (solution.n_accepted + solution.n_rejected == 40).all()
    assert solution.y.isnan().all()


def never(x: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("evaluated")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "RK45"}, "method: expected one of dpmpp_2m_sde, unipc_sde, adaptive, got 'RK45'"),
        ({"order": 3}, "order: expected a whole number from 1 to 2, got 3"),
        ({"on_failure": "ignore"}, "on_failure: expected one of raise, status"),
        ({"steps": 0}, "steps: expected a number of steps from 1 on, got 0"),
        ({"steps": 2.5}, "steps: expected a number of steps from 1 on, got 2.5"),
        ({"steps": 5, "grid": [1.0, EPS]}, "steps, grid: expected one of them, got both"),
        ({"grid": [1.0, 0.5]}, "grid: expected times that fall from T = 1 to eps = 0.001"),
        ({"method": "adaptive", "steps": 5}, "steps, grid: method 'adaptive' chooses its own steps"),
        ({"method": "adaptive", "grid": [1.0, EPS]}, "steps, grid: method 'adaptive' chooses its own steps"),
        ({"method": "adaptive", "max_steps": 0}, "max_steps: expected a number of steps from 1 on, got 0"),
        ({"rtol": -1.0}, "rtol: expected a non-negative number"),
        ({"eps": 0.0}, r"eps: expected a time in \(0, T = 1\)"),
        ({"seeds": "1"}, "seeds: expected None, a seed or"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_sde_sampler(SDES["vp"], (2, 3), lambda x: x, **{"device": "cpu", **options})


def test_problems_that_are_refused() -> None:
    class OtherMarginal(sde_lib.VPSDE):
        def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return super().marginal_prob(x, t)

    with pytest.raises(ValueError, match="sde: expected an AffineSDE, .* got OtherMarginal"):
        make(OtherMarginal(), (2, 3), "adaptive")
    with pytest.raises(ValueError, match="rtol, atol: expected more than the rounding"):
        make(SDES["vp"], (2, 3), "adaptive", rtol=1e-9, atol=1e-9)(never)
    for z, message in ((torch.zeros(3, 3), "z: expected the sampler's shape"), (torch.full((2, 3), math.nan), "z: ")):
        with pytest.raises(ValueError, match=message):
            make(SDES["vp"], (2, 3), "unipc_sde")(never, z)


def test_nothing_is_drawn_twice() -> None:
    """The prior, and the tree's ends and middles, are different numbers: no two are equal in a whole run."""
    path = tree(2, (64,))
    with noise.seeds(0, range(2)):
        prior = ops.materialize(noise.normal(torch.zeros(2, 64)), torch.zeros(2, 64))
    scaled = [at(path, j, j) / math.sqrt(clock(j) - clock(0)) for j in (N, N // 2, N // 4, 3 * N // 4)]
    numbers = torch.stack([prior.double(), *scaled])
    correlations = torch.corrcoef(numbers.reshape(len(numbers), -1))
    assert correlations[0, 1:].abs().max() < 5 / math.sqrt(128)
