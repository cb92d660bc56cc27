"""The baselines against what score_sde_pytorch returned, the problems against definitions, and the reading of curves.

Nobody shall say that we measure against a straw man, or that a problem is not what it claims to be.
"""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Case, arrays, assert_rounding, cases, every_case, make_network, recorded, rounding
from networks import GaussianModel, ToyModel
from torch import Tensor

from benchmarks import __main__ as speed
from benchmarks import baselines, digits, problems, report, solvers, work_precision
from benchmarks import cases as speed_cases
from benchmarks.solvers import Counted
from benchmarks.work_precision import Point, curves, work_at
from scoresde_ext.models import utils as mutils

KINDS = ("vp", "subvp", "ve")


def make_baseline(case: Case) -> baselines.Formulas:
    return baselines.SDES[case["kind"]](case["p0"], case["p1"])


# ---- baselines against the recorded arrays ----


@every_case("sde")
def test_formulas(name: str) -> None:
    """As recorded, cancellation in 1 - exp included."""
    sde, x, t = make_baseline(cases("sde")[name]), arrays("sde")["x"], arrays("sde")["t"]
    std, diffusion = sde.std(t), sde.diffusion(t)
    wanted_std, wanted_diffusion = recorded("sde", name, "std"), recorded("sde", name, "diffusion")
    if name.startswith("ve"):  # sigma is a power: its exponent log(sigma_max / sigma_min) is 8.5
        assert_rounding(std, wanted_std, 16, scale=wanted_std)
        assert_rounding(diffusion, wanted_diffusion, 16, scale=wanted_diffusion)
    else:
        # VP's std^2, sub-VP's std and g^2 / beta are 1 less a number near 1: known to the roundings of that number
        power = 2 if name.startswith("vp") else 1
        assert_rounding(std**power, wanted_std**power, 4, scale=torch.ones_like(t))
        assert_rounding(diffusion**2 / sde.beta(t), wanted_diffusion**2 / sde.beta(t), 4, scale=torch.ones_like(t))
    assert_rounding(sde.drift(x, t), recorded("sde", name, "drift"), 4)


@every_case("sde")
def test_flow_drift(name: str) -> None:
    case, shared = cases("sde")[name], arrays("sde")
    drift = baselines.flow_drift(make_baseline(case), shared["score"], shared["x"], shared["t"])
    # g^2 as above, times the score
    size = shared["score"].abs().flatten(1).amax(1).clamp(min=1)
    wanted = recorded("sde", name, "rev_drift_pf1")
    assert_rounding(drift, wanted, 8, scale=torch.maximum(20 * size, wanted.abs().flatten(1).amax(1)))


@every_case("losses", lambda case: case["fn"] == "get_score_fn" and case["continuous"])
def test_score(name: str) -> None:
    case, shared = cases("losses")[name], arrays("losses")
    score = make_baseline(case).score(ToyModel(**case["toy"]), shared["x0"], shared["score_fn_t"])
    # labels are 999 t, of which the network takes the sine: 0.013 * 999 roundings of t
    assert_rounding(score, recorded("losses", name, "score"), 32)


def flow_of(name: str) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float], Tensor]:
    """The probability flow of a case of section "ode", its times and its noise."""
    case = cases("ode")[name]
    sde, network = make_baseline(case), make_network(case)
    z = arrays("ode")["z_unit"] * (case["p1"] if case["kind"] == "ve" else 1)
    return lambda x, t: baselines.flow_drift(sde, sde.score(network, x, t), x, t), (1.0, case["eps"]), z


@every_case("ode", lambda case: not case["denoise"] and not case["case"].endswith("_defaults"))
def test_scipy_sampler(name: str) -> None:
    """Sample and number of evaluations, as far as rounding does not decide them."""
    case = cases("ode")[name]
    f, span, z = flow_of(name)
    counted = Counted(f)
    x = baselines.scipy_rk45(counted, span, z, case["rtol"], case["atol"], case["method"])
    assert (x - recorded("ode", name, "x")).abs().max() <= 4 * rounding("ode")[name]["spread"]["x"]
    assert counted.calls in {*rounding("ode")[name]["nfe"], case["nfe"]}


@pytest.mark.parametrize("solve", [baselines.torchdiffeq_dopri5, baselines.torchode_dopri5])
@pytest.mark.parametrize("kind", KINDS)
def test_other_solvers(solve: Callable[..., Tensor], kind: str) -> None:
    """For Gaussian data the flow is known."""
    name = f"{kind}_gauss_RK45_1e-05"
    f, span, z = flow_of(name)
    x = solve(f, span, z.double(), 1e-8, 1e-8)
    # some 60 steps, each with an error within the tolerance; the network's mean is a float32 number
    assert (x - recorded("ode", name, "x_analytic_f64")).abs().max() < 60 * 1e-8


CONTINUOUS = every_case(
    "losses", lambda case: case["fn"] == "get_sde_loss_fn" and case["continuous"] and not case["case"].endswith("_edge")
)


@CONTINUOUS
def test_loss(name: str) -> None:
    case, shared = cases("losses")[name], arrays("losses")
    outs = []

    def network(x: Tensor, labels: Tensor) -> Tensor:
        outs.append(ToyModel(**case["toy"])(x, labels).detach().requires_grad_())
        return outs[0]

    loss = baselines.score_matching_loss(
        make_baseline(case), network, shared["x0"], shared[case["u"]], shared["z"], case["likelihood_weighting"],
        case["reduce_mean"], case["eps"],
    )  # fmt: skip
    loss.backward()
    # 1 / std multiplies the residual; where t is small, std is known to 1000 roundings only
    assert_rounding(loss.detach(), recorded("losses", name, "loss"), 64)
    assert_rounding(outs[0].grad, recorded("losses", name, "grad_out"), 64)


STEPS = {"euler_maruyama": baselines.euler_maruyama, "langevin": baselines.langevin}


@every_case(
    "steps",
    lambda case: (
        (case.get("predictor") == "euler_maruyama" and not case["probability_flow"])
        or (case.get("corrector") == "langevin" and case["n_steps"] == 1)
    ),
)
def test_step(name: str) -> None:
    case, shared = cases("steps")[name], arrays("steps")
    network = GaussianModel(f"{case['kind']}_cont", case["p0"], case["p1"], case["N"], **case["gauss"])
    home = f"{name.partition('_')[0]}_euler_maruyama_pf0"
    options = {"N": case["N"], **({"snr": case["snr"]} if "corrector" in case else {})}
    step = STEPS[case.get("predictor") or case["corrector"]]
    x, x_mean = step(
        make_baseline(case), network, recorded("steps", home, "x_in"), shared["t"], shared["z"][0], **options
    )
    assert_rounding(x, recorded("steps", name, "x_out"), 16)
    assert_rounding(x_mean, recorded("steps", name, "x_mean"), 16)


@every_case("likelihood", lambda case: case["method"] == "RK45")
def test_likelihood(name: str) -> None:
    case, shared = cases("likelihood")[name], arrays("likelihood")
    rademacher = case["hutchinson_type"] == "Rademacher"
    epsilon = shared["rademacher01"].float() * 2 - 1 if rademacher else shared["gaussian_eps"]
    bpd, z, nfe = baselines.likelihood(
        make_baseline(case), make_network(case), shared[case["data"]], epsilon, case["rtol"], case["atol"], case["eps"]
    )
    spread = rounding("likelihood")[name]["spread"]
    assert (bpd - recorded("likelihood", name, "bpd")).abs().max() <= 4 * spread["bpd"]
    assert (z - recorded("likelihood", name, "z")).abs().max() <= 4 * spread["z"]
    assert nfe in {*rounding("likelihood")[name]["nfe"], case["nfe"]}


def test_karras_loop() -> None:
    """For Gaussian data the flow is known; an error of second order is left."""
    name = "vp_gauss_RK45_1e-05"
    case = cases("ode")[name]
    sde, z = make_baseline(case), arrays("ode")["z_unit"].double()
    assert isinstance(sde, baselines.VP)
    denoise = baselines.vp_denoiser(sde, make_network(case))
    ends = [sde.std(t) / sde.log_mean(t).exp() for t in (torch.tensor(u).double() for u in (1.0, case["eps"]))]
    last_mean = sde.log_mean(torch.tensor(case["eps"]).double()).exp()
    errors = []
    for steps in (200, 400):
        sigmas = torch.logspace(*(end.log10().item() for end in ends), steps + 1, dtype=torch.float64).tolist()
        x = last_mean * baselines.dpmpp_2m(denoise, z / (1 / (1 + ends[0] ** 2).sqrt()), sigmas)
        errors.append((x - recorded("ode", name, "x_analytic_f64")).abs().max().item())
    assert errors[1] < 1e-4 and 3.5 < errors[0] / errors[1] < 4.5


# ---- problems ----


def test_mixture_score_is_the_gradient_of_the_log_density() -> None:
    mixture = problems.mixture(3, 4, seed=1)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    m, s = torch.linspace(0.1, 0.9, 5).double(), torch.linspace(0.2, 1.1, 5).double()
    log_density = 0.0
    for row in range(5):
        variances = (m[row] * mixture.spreads) ** 2 + s[row] ** 2
        components = [
            torch.distributions.MultivariateNormal(m[row] * mean, variance * torch.eye(3, dtype=torch.float64))
            for mean, variance in zip(mixture.means, variances, strict=True)
        ]
        terms = [w.log() + c.log_prob(x[row]) for w, c in zip(mixture.weights, components, strict=True)]
        log_density = log_density + torch.logsumexp(torch.stack(terms), 0)
    (gradient,) = torch.autograd.grad(log_density, x)
    torch.testing.assert_close(mixture.score(x.detach(), m, s), gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mixture 16-D", "digits"])
def test_all_solvers_are_given_the_same_flow(kind: str, name: str) -> None:
    """Upstream's formulas and ours make the same derivative of a problem's network, whose output they agree about."""
    problem = problems.digits_problem(kind, 4) if name == "digits" else problems.mixture_problem(name, kind, 4)
    t = torch.tensor([0.02, 0.3, 0.7, 1.0], dtype=problem.z.dtype)
    x = problem.z * problem.sde.marginal_coefficients(t)[1].reshape(-1, *[1] * (problem.z.dim() - 1))
    score_fn = mutils.get_score_fn(problem.sde, problem.network, train=False, continuous=True)
    ours, _ = problem.sde.reverse(score_fn, probability_flow=True).sde(x, t)
    # 1 - exp(-0.006), the variance at t = 0.02, is known to 170 roundings
    tolerance = 1000 * torch.finfo(x.dtype).eps * ours.abs().max().item()
    torch.testing.assert_close(problem.derivative(problem.network, x, t), ours, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["subvp", "ve"])
def test_digits_networks_share_one_denoiser(kind: str) -> None:
    """At one log-SNR, and states scaled alike, the networks for all SDEs see the same picture in the noise."""
    log_snr = torch.linspace(-3.5, 4.0, 6, dtype=torch.float64)
    base = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    pictures = []
    for which in ("vp", kind):
        problem = problems.digits_problem(which, 1)
        t = problem.sde.time_at(log_snr)
        m, s = (c[:, None, None, None] for c in problem.sde.marginal_coefficients(t))
        x = m * base
        score = mutils.get_score_fn(problem.sde, problem.exact_network, train=False, continuous=True)(x, t)
        pictures.append((x + s**2 * score) / m)
    torch.testing.assert_close(*pictures, rtol=1e-9, atol=1e-9)


def test_reference_is_exact_for_one_component() -> None:
    """One normal component: along the flow the state keeps its number of standard deviations."""
    one = problems.mixture(3, 1, seed=0)
    problem = problems.mixture_problem("mixture 2-D", "vp", 6)
    network = one.network("vp")
    problem = replace(problem, network=network, exact_network=network, z=torch.randn(6, 3, dtype=torch.float64))
    (m0, s0), (m1, s1) = (problem.sde.marginal_coefficients(t) for t in problem.span)
    spread = one.spreads.item()
    scale = math.sqrt((m1 * spread) ** 2 + s1**2) / math.sqrt((m0 * spread) ** 2 + s0**2)
    exact = m1 * one.means + scale * (problem.z - m0 * one.means)
    assert (solvers.reference(problem) - exact).abs().max() < 1e-11  # some tens of steps to 1e-12


def test_nothing_is_tuned_on_the_mixture_kept_back() -> None:
    for effort in (solvers.QUICK, solvers.FULL):
        used = {name for name, _, _ in solvers.problems(effort._replace(samples=1, digits=0), kept_back=False)}
        assert used and not used & set(problems.KEPT_BACK)


# ---- curves ----


def curve(*pairs: tuple[float, float], solver: str = "a", problem: str = "p") -> list[Point]:
    return [Point(problem, "VP", solver, 0.0, n, 2 * int(n), rms, rms / 10, np.zeros(0)) for n, rms in pairs]


def test_work_at_an_error() -> None:
    line = curve((10, 1e-1), (20, 1e-2), (80, 1e-4))  # error = 10^-1 (n / 10)^(-log2 10)
    assert work_at(line, 1e-3) == pytest.approx(40)
    assert work_at(line, 1e-3, work="calls") == pytest.approx(80)
    assert work_at(line, 1e-3, error="median_rms") == pytest.approx(20)
    assert work_at(line, 1e-5) is None and work_at(line, 0.5) is None  # nothing is extrapolated


def test_work_where_a_curve_crosses_several_times() -> None:
    bumpy = curve((10, 1e-2), (20, 1e-4), (40, 1e-2), (80, 1e-4))
    crossings = [math.sqrt(10 * 20), math.sqrt(20 * 40), math.sqrt(40 * 80)]
    assert work_at(bumpy, 1e-3) == pytest.approx(math.prod(crossings) ** (1 / 3))


def test_runs_of_equal_work_are_averaged() -> None:
    first, second = work_precision.line(curve((20, 1e-4), (10, 1e-2), (20, 1e-2)))
    assert first == pytest.approx((10, 1e-2)) and second == pytest.approx((20, 1e-3))


def test_ratio_counts_what_was_not_reached() -> None:
    points = [
        *curve((10, 1e-2), (100, 1e-4), solver="base"),
        *curve((5, 1e-2), (50, 1e-4)),
        *curve((10, 1e-2), (100, 1e-4), solver="base", problem="q"),
        *curve((5, 1e-2), (50, 2e-3), problem="q"),
    ]
    result = work_precision.ratio(curves(points), "base", "a", "evaluations", ("both", ["p", "q"]), "rms", 1e-3)
    assert (result.ratio, result.reached, result.of) == (pytest.approx(0.5), 1, 2)


# ---- the commands ----


@pytest.mark.parametrize("name", [name for name in speed_cases.CASES if name != "likelihood"])
def test_competitors_compute_the_same(name: str) -> None:
    """What the benchmark of speed checks before it measures: here all but the compiled ones, at a small size."""
    case = speed_cases.CASES[name]
    for shape in ((3, 2, 4, 4), (5, 2)):
        values = {}
        for competitor, make in case.competitors.items():
            if competitor != speed_cases.COMPILED:
                torch.manual_seed(0)
                values[competitor] = make(shape)(case.draws(shape)).values.double()
        wanted = values[case.baseline]
        assert wanted.abs().max() > 0
        for got in values.values():
            assert (got - wanted).abs().max() <= case.tolerance * wanted.abs().max()


def test_a_competitor_that_computes_something_else_stops_the_benchmark() -> None:
    class Fake:
        def __init__(self, value: float) -> None:
            self.value = value

        def check(self, case: str, shape: tuple[int, ...]) -> np.ndarray:
            return np.array([1.0, self.value])

    case = speed_cases.CASES["predictor"]
    same = {name: Fake(2.0) for name in case.competitors}
    speed.check(case, (1,), same)
    for wrong in (2.001, math.nan):
        with pytest.raises(SystemExit, match=r"predictor \(1,\): scoresde_ext differs"):
            speed.check(case, (1,), same | {speed_cases.OURS: Fake(wrong)})


def test_worker_measures_in_its_own_process() -> None:
    with speed.Workers([speed_cases.OURS], threads=1) as started:
        worker = started[speed_cases.OURS]
        assert len(worker.seconds("loss step", (4, 3), 0.0)) == 1
        assert len(worker.seconds("loss step", (4, 3), 0.1)) > 3
        # At the peak: the perturbed batch or the gradient, and the noise that is kept.
        array = 64 * 3 * 32 * 32 * 4
        assert worker.peak_bytes("loss step", (64, 3, 32, 32)) == pytest.approx((1 + 15 / 16) * array, rel=0.02)
        with pytest.raises(RuntimeError, match="scoresde_ext: KeyError"):
            worker.check("no such case", (1,))


def test_speed_writes_all_results(tmp_path: Path) -> None:
    measured = [
        speed.Measured(case.name, shape, threads, name, case.unit, 0.5e-3 * threads, 1e-3, 2e-3, 3e-3, 7, None)
        for case in speed_cases.CASES.values()
        for shape in case.shapes
        for threads in (1, 2)
        for name in speed.competitors_of(case)
    ]
    points = [
        digits.Timed(name, tolerance, 2048, 10, seconds, rms)
        for name in digits.SAMPLERS
        for tolerance, seconds, rms in ((1e-2, 1.0, 1e-2), (1e-4, 4.0, 1e-4))
    ]
    speed.write(tmp_path, measured, points)
    with (tmp_path / "speed.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(measured) and {line["best"] for line in lines} == {"0.0005", "0.001"}
    assert "| 1024 | 1.00 |" in (tmp_path / "speed.md").read_text()  # 2,048 digits in 2 s, where the error is 1e-3
    environment = json.loads((tmp_path / "speed.json").read_text())["environment"]
    assert torch.__version__.startswith(environment["versions"]["torch"])  # of a CUDA build, it says more
    for plot in ("speed.png", "sizes.png", "digits.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_a_run_writes_all_results(tmp_path: Path) -> None:
    effort = solvers.QUICK._replace(
        kinds=KINDS, mixtures=("mixture 2-D",), samples=4, digits=0, tolerances=(1e-2, 1e-4)
    )
    effort = effort._replace(evaluations=(12, 15))
    torch.set_num_threads(1)
    points = solvers.measure(effort, kept_back=False)
    # In processes or in this one, a curve is the same, to the bit.
    named = ("mixture 2-D", "subvp", 4)
    for solver in ("scipy RK45", "UniPC-4 adaptive, per sample", "UniPC-3 calibrated, fitted"):
        here = solvers.sweep(named, solver, effort, solvers.exact_samples(named))
        there = curves(points)[named[0], "sub-VP", solver]
        assert [report.row(p) for p in there] == [report.row(p) for p in here]
        assert all((p.each == q.each).all() for p, q in zip(there, here, strict=True))
    order = [(sde, solver) for sde in ("VP", "sub-VP", "VE") for solver in solvers.SOLVERS]
    assert [(sde, solver) for _, sde, solver in curves(points)] == order
    solvers.write(tmp_path, curves(points), points)
    with (tmp_path / "solvers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["solver"] for line in lines} == set(solvers.SOLVERS)
    assert {line["sde"] for line in lines} == {"VP", "sub-VP", "VE"}
    assert all(0 < float(line["rms"]) < 1 and int(line["calls"]) >= 12 for line in lines)
    environment = json.loads((tmp_path / "solvers.json").read_text())["environment"]
    assert torch.__version__.startswith(environment["versions"]["torch"])
    assert environment["threads"] == torch.get_num_threads()
    assert (tmp_path / "solvers.md").read_text().count(solvers.BASELINE) >= 2
    for plot in ("solvers.png", "solvers-spread.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
