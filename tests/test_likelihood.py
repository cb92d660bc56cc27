"""Likelihoods against densities in closed form, and the options that upstream has not."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from networks import GaussianModel, MixtureModel, per_sample
from torch import Tensor, nn

from scoresde_ext import integrate, likelihood, noise, sde_lib
from scoresde_ext.integrate import SolverError, Status

SDES: dict[str, tuple[sde_lib.AffineSDE, str, float, float]] = {
    "vp": (sde_lib.VPSDE(0.1, 20.0), "vp_cont", 0.1, 20.0),
    "subvp": (sde_lib.subVPSDE(0.1, 20.0), "subvp_cont", 0.1, 20.0),
    "ve": (sde_lib.VESDE(0.01, 50.0), "ve_cont", 0.01, 50.0),
}
every_kind = pytest.mark.parametrize("kind", SDES)
EPS = 1e-3
# In float64, a local error of 1e-8 in each of some tens of steps.
TIGHT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8, "method": "DOP853", "eps": EPS, "hutchinson_type": "exact"}
SOLVED = 1e-6

Mixture = tuple[Sequence[Sequence[float]], Sequence[float], Sequence[float]]  # means by channel, spreads, weights
MIXTURES: dict[str, tuple[tuple[int, ...], Mixture]] = {
    "gaussian 2-D": ((2,), ([[0.5, -1.0]], [0.25], [1.0])),
    "mixture 2-D": ((2,), ([[1.0, 0.5], [-0.75, 0.25], [0.0, -1.0]], [0.125, 0.5, 0.25], [0.5, 0.2, 0.3])),
    "mixture 16-D": ((4, 2, 2), ([[0.5, 0.0, -0.5, 1.0], [-0.5, 0.25, 0.5, -1.0]], [0.25, 0.5], [0.4, 0.6])),
}


def identity(x: Any) -> Any:
    return x


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def log_density(kind: str, mixture: Mixture, x: Tensor, t: float) -> Tensor:
    """``(B,)``: log p_t(x): each component stays normal, with mean m mu and variance m^2 s^2 + std^2."""
    m, std = SDES[kind][0].marginal_coefficients(t)
    terms = []
    for mean, spread, weight in zip(*mixture, strict=True):
        variance = (m * spread) ** 2 + std**2
        mu = torch.tensor(mean, dtype=x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))
        squares = (x - m * mu).square().flatten(1).sum(1)
        terms.append(math.log(weight) - 0.5 * (squares / variance + x[0].numel() * math.log(2 * math.pi * variance)))
    return torch.logsumexp(torch.stack(terms), 0)


def network_of(kind: str, mixture: Mixture) -> nn.Module:
    _, label_mode, p0, p1 = SDES[kind]
    return MixtureModel(label_mode, p0, p1, 1000, *mixture)


# --- densities in closed form -----------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(
    ("problem", "control"), [*((name, "joint") for name in MIXTURES), ("mixture 2-D", "per_sample")]
)
def test_exact_divergence_gives_the_density(kind: str, problem: str, control: str) -> None:
    """A perfect score carries the density at eps to that at T, of which the prior is an approximation: what this one
    is off by at the latent code is known, and all else is the solver's error."""
    sde, (shape, mixture) = SDES[kind][0], MIXTURES[problem]
    x = normals(6, *shape)
    likelihood_fn = likelihood.get_likelihood_fn(sde, identity, **TIGHT, control=control, units="nats")
    log_p, z, _ = likelihood_fn(network_of(kind, mixture), x)
    assert log_p.dtype == torch.float64
    corrected = log_p - sde.prior_logp(z) + log_density(kind, mixture, z, sde.T)
    torch.testing.assert_close(corrected, log_density(kind, mixture, x, EPS), rtol=0, atol=SOLVED)


def test_prior_that_is_exact() -> None:
    """N(0, 1) is VP's own stationary law: no correction."""
    network, x = GaussianModel("vp_cont", 0.1, 20.0, 1000), normals(5, 3)
    log_p, *_ = likelihood.get_likelihood_fn(SDES["vp"][0], identity, **TIGHT, units="nats")(network, x)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(log_p, exact, rtol=0, atol=SOLVED)


# --- Hutchinson's estimate --------------------------------------------------------------------------------------------


class Correlated:
    """Data N(0, C) under VP, C of rank one and a bit: the score -(m^2 C + std^2)^-1 x is linear, with a Jacobian that
    is not diagonal. C = Q diag(variances) Q^T."""

    def __init__(self, dimension: int) -> None:
        self.sde = SDES["vp"][0]
        self.axes, _ = torch.linalg.qr(normals(dimension, dimension, seed=3))
        self.variances = torch.linspace(0.1, 3.0, dimension, dtype=torch.float64)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        m, std = self.sde.marginal_coefficients(labels[:, None] / 999)
        return std * (x @ self.axes / (m**2 * self.variances + std**2)) @ self.axes.T

    def stretch(self) -> Tensor:
        """``(D, D)``: A with div-estimate(v) = v^T A v: the Jacobian's integral, since the flow only scales each axis,
        by the ratio of its standard deviations at T and eps."""
        (m0, s0), (m1, s1) = (self.sde.marginal_coefficients(t) for t in (EPS, self.sde.T))
        logs = 0.5 * torch.log((m1**2 * self.variances + s1**2) / (m0**2 * self.variances + s0**2))
        return self.axes * logs @ self.axes.T


ESTIMATED: dict[str, Any] = {**TIGHT, "rtol": 1e-7, "atol": 1e-7, "units": "nats"}


@pytest.mark.parametrize("hutchinson_type", ["Rademacher", "Gaussian"])
@pytest.mark.parametrize("epsilons", [1, 3])
def test_estimate_is_the_mean_of_quadratic_forms(hutchinson_type: str, epsilons: int) -> None:
    model, x = Correlated(4), normals(5, 4)
    draws = normals(epsilons, 5, 4, seed=1)
    vectors = draws if hutchinson_type == "Gaussian" else (draws > 0).double() * 2 - 1
    options = {**ESTIMATED, "hutchinson_type": hutchinson_type}
    with noise.replay(draws if hutchinson_type == "Gaussian" else (draws > 0).long()):
        log_p, *_ = likelihood.get_likelihood_fn(model.sde, identity, **options, epsilons=epsilons)(model, x)
    exact, *_ = likelihood.get_likelihood_fn(model.sde, identity, **ESTIMATED)(model, x)
    a = model.stretch()
    deviation = torch.einsum("nbi,ij,nbj->nb", vectors, a, vectors).mean(0) - a.trace()
    assert deviation.abs().max() > 1e-2  # an estimate, not the trace
    torch.testing.assert_close(log_p - exact, deviation, rtol=0, atol=1e-5)  # solved to 1e-7


@pytest.mark.parametrize("hutchinson_type", ["Rademacher", "Gaussian"])
def test_estimate_converges_as_one_over_root_n(hutchinson_type: str) -> None:
    """The variance is 2 sum A_ij^2 / n, for Rademacher without the diagonal."""
    model, samples = Correlated(4), 4000
    a = model.stretch()
    off = a - a.diag().diag() if hutchinson_type == "Rademacher" else a
    x = normals(1, 4).expand(samples, 4)
    options = {**ESTIMATED, "hutchinson_type": hutchinson_type, "rtol": 1e-5, "atol": 1e-5}
    exact, *_ = likelihood.get_likelihood_fn(model.sde, identity, **ESTIMATED)(model, x[:1])
    for n in (1, 4, 16):
        log_p, *_ = likelihood.get_likelihood_fn(model.sde, identity, **options, epsilons=n, seeds=n)(model, x)
        errors = log_p - exact
        variance = 2 * off.square().sum().item() / n
        # 5 standard deviations of a mean, and of a mean square whose kurtosis is at most that of chi^2_1, 15
        assert abs(errors.mean().item()) < 5 * math.sqrt(variance / samples)
        assert abs(errors.square().mean().item() / variance - 1) < 5 * math.sqrt(14 / samples)


def test_exact_is_the_estimate_where_that_is_exact() -> None:
    """A diagonal Jacobian: Rademacher's signs square away."""
    network, x = network_of("subvp", MIXTURES["gaussian 2-D"][1]), normals(4, 2)
    exact, *_ = likelihood.get_likelihood_fn(SDES["subvp"][0], identity, **ESTIMATED)(network, x)
    options = {**ESTIMATED, "hutchinson_type": "Rademacher"}
    estimated, *_ = likelihood.get_likelihood_fn(SDES["subvp"][0], identity, **options)(network, x)
    torch.testing.assert_close(exact, estimated, rtol=0, atol=1e-9)  # the same steps, to rounding


def test_exact_draws_nothing() -> None:
    before = torch.get_rng_state()
    likelihood.get_likelihood_fn(SDES["vp"][0], identity, hutchinson_type="exact")(Correlated(4), normals(3, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_epsilons_of_one_are_upstreams() -> None:
    """The keywords at their defaults change no bit, and one epsilon is the draw upstream makes."""
    x, results = normals(3, 4, dtype=torch.float32), []
    for options in ({}, {"epsilons": 1, "units": "bits/dim", "control": "joint"}):
        with noise.replay([torch.tensor([0, 1, 1, 0]).expand(3, 4)]):
            results.append(likelihood.get_likelihood_fn(SDES["vp"][0], identity, **options)(row_wise("vp"), x))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    assert results[0][2] == results[1][2]


# --- products in one batch --------------------------------------------------------------------------------------------


class Unbatchable(torch.autograd.Function):
    """x^2 / 2, whose derivative asks for numbers that vmap cannot give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x if math.isfinite(g.sum().item()) else g


class Squares(nn.Module):
    """Its divergence depends on x; counts its calls, and the derivatives asked of it."""

    def __init__(self, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.square, self.calls, self.backwards = square, 0, 0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        y = 0.1 * self.square(x.flip(1)) + 0.3 * x
        if y.requires_grad:
            y.register_hook(self.count)
        return y

    def count(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("options", [{"epsilons": 3}, {"hutchinson_type": "exact"}], ids=str)
def test_products_one_by_one_where_vmap_fails(options: dict[str, Any]) -> None:
    x, results, models = normals(5, 4), [], (Squares(lambda x: 0.5 * x * x), Squares(Unbatchable.apply))
    for model in models:
        likelihood_fn = likelihood.get_likelihood_fn(SDES["vp"][0], identity, **options, eps=EPS, seeds=1)
        results.append(likelihood_fn(model, x))
    (bpd, z, nfe), (others, other_z, other_nfe) = results
    torch.testing.assert_close(bpd, others, rtol=1e-12, atol=1e-12)  # sums in another order
    torch.testing.assert_close(z, other_z, rtol=1e-12, atol=1e-12)
    assert nfe == other_nfe
    assert [model.calls for model in models] == [nfe, nfe]  # one forward pass an evaluation
    n, derivatives = 3 if "epsilons" in options else 4, nfe - (nfe - 2) // 6  # none in one stage of a step
    assert models[0].backwards == derivatives
    assert models[1].backwards == n * derivatives + 1  # and the one attempt


@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize("method, share", [("RK23", 0), ("RK45", 1 / 6), ("DOP853", 4 / 12)])
def test_stages_without_divergence(method: str, share: float, control: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no result has a weight for it, it is not computed, and no bit is another."""
    models = Squares(lambda x: 0.5 * x * x), Squares(lambda x: 0.5 * x * x)
    fn = likelihood.get_likelihood_fn(
        SDES["vp"][0], identity, method=method, control=control, rtol=1e-3, atol=1e-3, eps=EPS, seeds=1
    )
    found = fn.solve(models[0], normals(5, 4))
    monkeypatch.delattr(likelihood._FlowWithDivergence, "passing_terms")
    right = fn.solve(models[1], normals(5, 4), draw=0)
    assert all(torch.equal(a, b) for a, b in zip(found.y, right.y, strict=True)) and found.nfe == right.nfe
    assert models[1].backwards == right.nfe
    assert models[0].backwards == pytest.approx(right.nfe - share * (right.nfe - 2))


def test_error_in_the_derivative_is_shown() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise RuntimeError("no derivative today")

    likelihood_fn = likelihood.get_likelihood_fn(SDES["vp"][0], identity, epsilons=2)
    with pytest.raises(RuntimeError, match="no derivative today"):
        likelihood_fn(lambda x, labels: Broken.apply(x), normals(3, 4))


# --- each sample by itself --------------------------------------------------------------------------------------------


def row_wise(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A score of nothing, by additions, products and quotients: these round alike at any place in a batch."""

    def network(x: Tensor, labels: Tensor) -> Tensor:
        labels = per_sample(labels.to(x.dtype), x)
        if kind == "ve":
            return -(x + 0.2 * x.flip(1) / (1 + x * x)) / (1 + labels * labels)
        return 0.1 * x + 0.2 * x.flip(1) / (1 + x * x) * labels / (1 + labels)

    return network


def alone(index: Any, kind: str, data: Tensor, **options: Any) -> integrate.Solution:
    likelihood_fn = likelihood.get_likelihood_fn(
        SDES[kind][0], identity, rtol=1e-4, atol=1e-4, eps=EPS, control="per_sample", **options
    )
    return likelihood_fn.solve(row_wise(kind), data[index].clone())


BY_ITSELF: dict[str, dict[str, Any]] = {"exact": {"hutchinson_type": "exact"}, "estimated": {"epsilons": 3}}


@every_kind
@pytest.mark.parametrize("how", BY_ITSELF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sample_does_not_depend_on_its_batch(kind: str, how: str, dtype: torch.dtype) -> None:
    data = normals(21, 3, 3, dtype=dtype) * (5 if kind == "ve" else 1)

    def solve(ids: list[int]) -> integrate.Solution:
        seeds = {} if how == "exact" else {"seeds": (7, ids)}
        return alone(ids, kind, data, **BY_ITSELF[how], **seeds)

    whole = solve(list(range(21)))
    assert len(whole.evaluations.unique()) > 1  # not one step size for all
    for ids in ([3], [20, 0], [5, 4, 3, 2, 1], list(reversed(range(21)))):
        part = solve(ids)
        for of_part, of_whole in zip((*part.y, part.evaluations), (*whole.y, whole.evaluations), strict=True):
            assert torch.equal(of_part, of_whole[ids])


def test_seeds_are_streams() -> None:
    """An integer stands for its streams from 0 on."""
    data = normals(4, 3, 3)
    first, second = (alone(range(4), "vp", data, seeds=seeds) for seeds in (7, (7, range(4))))
    assert torch.equal(first.y[1], second.y[1])
    assert not torch.equal(first.y[1], alone(range(4), "vp", data, seeds=8).y[1])


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5), (3, 1), (2, 0), (0, 4)], ids=str)
def test_row_dot(shape: tuple[int, ...]) -> None:
    a, b = normals(*shape), normals(*shape, seed=1)
    before = a.clone()
    wanted = (a * b).reshape(len(a), math.prod(shape[1:])).sum(1)
    torch.testing.assert_close(likelihood.row_dot(a, b), wanted, rtol=1e-14, atol=1e-14)
    assert torch.equal(a, before)


# --- failures ---------------------------------------------------------------------------------------------------------


def nan_for_large(x: Tensor, labels: Tensor) -> Tensor:
    """NaN in samples that have a value above 50."""
    worst = x.abs().flatten(1).amax(1)
    return torch.where(per_sample(worst > 50, x), math.nan, 0.1 * x)


def test_failed_samples_are_named_and_the_others_finished() -> None:
    data = normals(4, 3)
    data[2] = 100.0
    options: dict[str, Any] = {"hutchinson_type": "exact", "control": "per_sample", "eps": EPS}
    with pytest.raises(SolverError, match=r"sample 2\b.*NaN") as raised:
        likelihood.get_likelihood_fn(SDES["vp"][0], identity, **options)(nan_for_large, data)
    bpd, z, _ = likelihood.get_likelihood_fn(SDES["vp"][0], identity, **options, on_failure="status")(
        nan_for_large, data
    )
    others = [0, 1, 3]
    healthy, codes, _ = likelihood.get_likelihood_fn(SDES["vp"][0], identity, **options)(nan_for_large, data[others])
    assert raised.value.solution is not None
    for codes_seen, bits in (raised.value.solution.y, (z, bpd)):
        assert bits[2].isnan()
        assert codes_seen[2].isnan().all()
        assert torch.equal(bits[others], healthy)
        assert torch.equal(codes_seen[others], codes)
    assert raised.value.solution.status.tolist() == [0, 0, Status.NOT_FINITE, 0]


class NoPriorForTwo(sde_lib.VPSDE):
    """Without a density at codes of negative sum, and intolerant of NaN as torch.distributions is."""

    def prior_logp(self, z: Tensor) -> Tensor:
        if z.isnan().any():
            raise ValueError("expected no NaN")
        return torch.where(z.sum(1) < 0, -math.inf, super().prior_logp(z))


def test_likelihood_that_is_not_finite_raises() -> None:
    data = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 1.0]])
    likelihood_fn = likelihood.get_likelihood_fn(NoPriorForTwo(), identity)
    with pytest.raises(SolverError, match=r"likelihood.*sample 1\b") as raised:
        likelihood_fn(lambda x, labels: 0.1 * x, data)
    assert raised.value.solution is not None
    z, bits = raised.value.solution.y
    assert z.isfinite().all()
    assert bits.isnan().tolist() == [False, True, False]
    assert raised.value.solution.status.tolist() == [0, Status.NOT_FINITE, 0]


def test_both_ways_to_fail_in_one_batch() -> None:
    data = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [100.0, 1.0]])
    likelihood_fn = likelihood.get_likelihood_fn(NoPriorForTwo(), identity, eps=EPS, on_failure="status")
    solution = likelihood_fn.solve(nan_for_large, data)
    assert solution.status.tolist() == [0, Status.NOT_FINITE, Status.NOT_FINITE]
    assert solution.y[1].isnan().tolist() == [False, True, True]
    assert "sample 1" in solution.message
    assert "sample 2" in solution.message


def test_too_few_steps() -> None:
    likelihood_fn = likelihood.get_likelihood_fn(SDES["vp"][0], identity, max_steps=2)
    with pytest.raises(SolverError, match="max_steps = 2"):
        likelihood_fn(lambda x, labels: 0.1 * x, normals(3, 2))


# --- units ------------------------------------------------------------------------------------------------------------


def value_of(scaler: Callable[[Any], Any], data: Tensor, **options: Any) -> Tensor:
    network = network_of("vp", ([[0.5, -1.0, 0.25]], [0.25], [1.0]))
    return likelihood.get_likelihood_fn(SDES["vp"][0], scaler, **TIGHT, **options)(network, data)[0]


@pytest.mark.parametrize(
    ("scaler", "offset"), [(lambda x: (x + 1) / 2, 7.0), (lambda x: x, 8.0)], ids=["[-1,1]", "[0,1]"]
)
def test_levels_of_256_are_upstreams_offset(scaler: Callable[[Any], Any], offset: float) -> None:
    data = normals(4, 3)
    upstream, nats = value_of(scaler, data), value_of(scaler, data, units="nats")
    torch.testing.assert_close(upstream, -nats / math.log(2) / 3 + offset, rtol=1e-13, atol=0)  # one solve
    torch.testing.assert_close(value_of(scaler, data, levels=256), upstream, rtol=1e-13, atol=0)


STD = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)


@pytest.mark.parametrize("levels", [1, 32, 0.5])
def test_levels_change_variables(levels: float) -> None:
    """Data standardised channel by channel: y = L (mean + std x) has the density p(x) / prod(L std)."""
    data = normals(4, 3)
    nats, bits = (value_of(lambda x: 1.5 + STD * x, data, levels=levels, units=u) for u in ("nats", "bits/dim"))
    wanted = value_of(identity, data, units="nats") - torch.log(levels * STD).sum()
    torch.testing.assert_close(nats, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bits, -nats / math.log(2) / 3, rtol=1e-12, atol=1e-12)


def test_nats_ask_nothing_of_the_scaler() -> None:
    def refuses(x: Any) -> Any:
        raise AssertionError("called")

    assert value_of(refuses, normals(2, 3), units="nats").isfinite().all()


@pytest.mark.parametrize(
    "scaler", [lambda x: x * x, lambda x: 0 * x, lambda x: x.clamp(min=0)], ids=["x^2", "0", "clamp"]
)
def test_levels_need_an_affine_scaler(scaler: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"\binverse_scaler\b"):
        value_of(scaler, normals(2, 3), levels=256)


# --- arguments --------------------------------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "epsilons": {"epsilons": 0},
    "epsilons fraction": {"epsilons": 1.5},
    "epsilons true": {"epsilons": True},
    "epsilons with exact": {"epsilons": 2, "hutchinson_type": "exact"},
    "units": {"units": "bits"},
    "levels": {"levels": 0},
    "levels text": {"levels": "8 bit"},
    "control": {"control": "each"},
    "on_failure": {"on_failure": "ignore"},
    "max_steps": {"max_steps": 0},
    "seeds": {"seeds": "7"},
    "seeds number": {"seeds": (7, [0, 1])},
    "method": {"method": "rk4"},
    "method multistep": {"method": "unipc"},
    "method tableau": {"method": integrate.METHODS["heun"]},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    def untouched(x: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match=rf"\b{case.split()[0]}\b"):
        likelihood.get_likelihood_fn(SDES["vp"][0], identity, **BAD[case])(untouched, normals(4, 3))


def test_exact_in_many_dimensions_is_refused() -> None:
    likelihood_fn = likelihood.get_likelihood_fn(SDES["vp"][0], identity, hutchinson_type="exact", rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"hutchinson_type.*64.*65"):
        likelihood_fn(lambda x, labels: x, normals(2, 5, 13))
    assert likelihood_fn(lambda x, labels: 0.1 * x, normals(2, 4, 16))[0].isfinite().all()


def test_inference_mode() -> None:
    """The divergence is a derivative, whatever mode the caller is in."""
    likelihood_fn = likelihood.get_likelihood_fn(sde_lib.VPSDE(), lambda x: x, seeds=0)
    wanted = likelihood_fn(_tanh, torch.ones(3, 2), draw=0)
    with torch.inference_mode():
        found = likelihood_fn(_tanh, torch.ones(3, 2), draw=0)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def _tanh(x: Tensor, labels: Tensor) -> Tensor:
    return torch.tanh(x)
