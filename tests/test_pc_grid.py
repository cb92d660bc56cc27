"""Predictor-corrector samplers on a grid of times, and with seeds."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde_ext import controllable_generation, noise, ops, sampling, sde_lib
from scoresde_ext.models import utils as mutils

SPREAD = 0.5  # standard deviation of the data, which are normal
SDES: dict[str, Callable[[], Any]] = {
    "vp": lambda: sde_lib.VPSDE(N=1000),
    "subvp": lambda: sde_lib.subVPSDE(N=1000),
    "ve": lambda: sde_lib.VESDE(sigma_max=10.0, N=1000),
}
PREDICTORS = {
    "vp": ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"),
    "subvp": ("euler_maruyama", "reverse_diffusion"),
    "ve": ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"),
}
every_step = pytest.mark.parametrize(
    ("kind", "predictor"), [(kind, name) for kind, names in PREDICTORS.items() for name in names]
)


class Cosine(sde_lib.AffineSDE):
    """A user's own: m = cos(theta), s = sin(theta)."""

    speed = 0.99 * math.pi / 2

    def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(self.speed * t), torch.sin(self.speed * t)

    def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        slope = self.speed * torch.tan(self.speed * t)
        return -slope, torch.sqrt(2 * slope)


def network_of(sde: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact network of the data, in arithmetic that treats every row alike."""

    def network(x: Tensor, labels: Tensor) -> Tensor:
        rows = (-1, *[1] * (x.dim() - 1))
        if isinstance(sde, sde_lib.VESDE):
            return -x / (SPREAD**2 + labels**2).reshape(rows)
        m, s = sde.marginal_coefficients(labels / 999 if isinstance(sde, sde_lib._DiscreteVP) else labels)
        score = -x / ((SPREAD * m) ** 2 + s**2).reshape(rows)
        return -score * s.reshape(rows) if isinstance(sde, sde_lib._DiscreteVP) else score

    return network


def make(
    sde: Any, shape: tuple[int, ...], predictor: str | type | None, corrector: str = "none", **options: Any
) -> Any:
    if isinstance(predictor, str):
        predictor = sampling.get_predictor(predictor)
    options = {"snr": 0.1, "continuous": True, "device": "cpu"} | options
    return sampling.get_pc_sampler(sde, shape, predictor, sampling.get_corrector(corrector), lambda x: x, **options)


def even_in_log_snr(sde: Any, eps: float, n: int) -> list[float]:
    ends = sde.log_snr(1.0), sde.log_snr(eps)
    return sde.time_at(torch.linspace(*ends, n, dtype=torch.float64)).tolist()


def falling(T: float, eps: float, n: int) -> list[float]:
    """Times far from equally spaced: shorter steps at the end."""
    return [T * (eps / T) ** (i / (n - 1)) ** 1.5 for i in range(n)]


# --- the steps --------------------------------------------------------------------------------------------------------


def numbers(sde: Any, predictor: str, t: float, earlier: float) -> tuple[float, float, float]:
    """p, q, n of ``p x + q score + n z``, from the papers' formulas: the transition from ``earlier`` to ``t`` in place
    of one index of the discrete process."""
    at = torch.tensor([t, max(earlier, 1e-12)], dtype=torch.float64)
    (m, m_earlier), (s, s_earlier) = (v.tolist() for v in sde.marginal_coefficients(at))
    if earlier == 0:
        m_earlier, s_earlier = 1.0, 0.0
    (f, _), (g, _) = (v.tolist() for v in sde.sde_coefficients(at))
    if predictor == "euler_maruyama":
        dt = t - earlier
        return 1 - f * dt, g * g * dt, g * math.sqrt(dt)
    if isinstance(sde, sde_lib.VESDE):
        gain = s**2 - s_earlier**2
        n = math.sqrt(gain) if predictor == "reverse_diffusion" else math.sqrt(s_earlier**2 * gain / s**2)
        return 1.0, gain, n
    if isinstance(sde, sde_lib.VPSDE):
        beta = 1 - (m / m_earlier) ** 2
        if predictor == "ancestral_sampling":
            return 1 / math.sqrt(1 - beta), beta / math.sqrt(1 - beta), math.sqrt(beta)
        return 2 - math.sqrt(1 - beta), beta, math.sqrt(beta)
    variance = s**2 - (m / m_earlier * s_earlier) ** 2
    return 2 - m / m_earlier, variance, math.sqrt(variance)


@pytest.mark.parametrize(
    ("kind", "predictor"),
    [(kind, name) for kind, names in PREDICTORS.items() for name in names] + [("own", "reverse_diffusion")],
)
def test_samples_are_those_of_the_formulas(kind: str, predictor: str) -> None:
    sde = Cosine(100) if kind == "own" else SDES[kind]()
    eps = 2e-3
    grid = falling(1.0, eps, 12)
    draws = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(13)]
    for denoise in (True, False):
        with noise.replay(draws):
            samples, nfe = make(sde, (3, 4), predictor, grid=grid, eps=eps, denoise=denoise)(network_of(sde))
        x = draws[0].double() * (sde.sigma_max if kind == "ve" else 1.0)
        size = x.abs()  # of the largest numbers that were added up, each with its rounding
        for t, earlier, z in zip(grid, [*grid[1:], 0.0], draws[1:], strict=True):
            p, q, n = numbers(sde, predictor, t, earlier)
            m, s = (float(v) for v in sde.marginal_coefficients(torch.tensor([t], dtype=torch.float64)))
            score = -x / ((SPREAD * m) ** 2 + s**2)
            mean = p * x + q * score
            size = torch.maximum(size, (p * x).abs() + (q * score).abs())
            x = mean + n * z.double()
        assert nfe == 12 * 2  # counted as upstream counts, with a corrector that does nothing
        # Twelve steps, each of a few roundings in float32, and the network's label, rounded too.
        assert ((samples - (mean if denoise else x)).abs() <= 12 * 20 * 2**-24 * size).all()


@every_step
def test_short_steps_are_those_of_upstream(kind: str, predictor: str) -> None:
    """On N equal steps of T/N ending at eps = T/N, what is done at each time is nearly what the discrete process does:
    its index is rounded down, so off by at most one, which is 1/N of the range of beta and of log sigma. Also at eps,
    where upstream takes one step more: to the data."""
    sde = SDES[kind]()
    score_fn = mutils.get_score_fn(sde, network_of(sde), continuous=True)
    step = sampling.get_predictor(predictor)(sde, score_fn)
    N, x = 1000, torch.ones(1, 1, dtype=torch.float64)
    for t, earlier in ((1.0, 0.999), (0.5, 0.499), (0.003, 0.002), (0.001, 0.0)):
        arrays = [torch.zeros(1, 1, dtype=torch.float64), x]
        with noise.replay([arrays[1], arrays[1]]):
            after, mean = step.step_to(x, t, earlier)
            upstream_after, upstream_mean = step.update_fn(x, torch.tensor([t], dtype=torch.float64))
        # beta_i N runs from 0.1 to 20: an index is up to 20 % of it at the start, 0.1 % at the end; sigma is geometric,
        # an index 0.7 %. The last step of VE, in Euler's way, is one from sigma(0) > 0 upstream as well.
        slack = 0.5 if t < 0.01 and kind != "ve" else 0.02
        change, noise_part = (mean - x).abs().item(), (after - mean).abs().item()
        assert (mean - upstream_mean).abs().item() <= slack * change + 1e-6, (t, N)
        assert abs(noise_part - (upstream_after - upstream_mean).abs().item()) <= slack * noise_part, (t, N)


@pytest.mark.parametrize("predictor", PREDICTORS["vp"])
def test_probability_flow_on_a_grid(predictor: str) -> None:
    """Without noise, the exact flow of normal data scales x by sqrt(variance(eps) / variance(T)): what is missing
    is a first-order error."""
    if predictor == "ancestral_sampling":
        with pytest.raises(AssertionError, match="probability_flow"):
            make(SDES["vp"](), (4, 2), predictor, probability_flow=True, grid=[1.0, 1e-3])(never)
        return
    sde = SDES["vp"]()
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    errors = []
    for n in (100, 200):
        draws = [z] + [torch.zeros_like(z)] * n
        with noise.replay(draws):
            x, _ = make(sde, (4, 2), predictor, probability_flow=True, grid=falling(1.0, 1e-3, n), denoise=False)(
                network_of(sde)
            )
        m, _ = sde.marginal_coefficients(1.0)
        errors.append((x - z * SPREAD / math.sqrt((SPREAD * m) ** 2 + 1 - m**2)).abs().max().item())
    assert 1.7 < errors[0] / errors[1] < 2.3  # first order: half the error for half the steps


@every_step
def test_law_on_a_grid(kind: str, predictor: str) -> None:
    """On a fine uneven grid the variance is that of the data at eps: 3 % for the steps' own error, and five standard
    errors of 40000 numbers."""
    sde = SDES[kind]()
    grid = even_in_log_snr(sde, 1e-3, 400)
    sampler = make(sde, (5000, 8), predictor, grid=grid, denoise=False, seeds=3)
    x, _ = sampler(network_of(sde))
    n = x.numel()
    right = SPREAD**2 + (sde.sigma_min**2 if kind == "ve" else 0.0)
    assert abs(x.mean()) < 5 * math.sqrt(right / n)
    assert abs(x.double().var() / right - 1) < 0.03 + 5 * math.sqrt(2 / n)


# --- what a grid needs ------------------------------------------------------------------------------------------------


class UpstreamStyle(sampling.Predictor):
    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class OtherUpdate(sampling.EulerMaruyamaPredictor):
    """Its inherited step_to is not what it does."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class OwnSteps(sampling.Predictor):
    seen: list[tuple[float, float]]

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a grid was given")

    def step_to(self, x: Tensor, t: float, earlier: float) -> tuple[Tensor, Tensor]:
        self.seen.append((t, earlier))
        return x + torch.randn_like(x), x


class NotAffine(sde_lib.SDE):
    """A VP SDE that does not say so."""

    @property
    def T(self) -> float:
        return 1.0

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return sde_lib.VPSDE().sde(x, t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return sde_lib.VPSDE().marginal_prob(x, t)

    def prior_sampling(self, shape: Any) -> Tensor:
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def never(x: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("evaluated")


def test_grids_that_are_refused() -> None:
    vp = SDES["vp"]()
    for grid in ([], [1.0], [1e-3], [1e-3, 1.0], [1.0, 0.5], [0.9, 1e-3], [1.0, 0.5, 0.5, 1e-3], [1.0, math.nan, 1e-3]):
        with pytest.raises(ValueError, match=r"grid: expected times that fall from T = 1 to eps = 0\.001, got"):
            make(vp, (2, 3), "euler_maruyama", grid=grid)
    for sde in (vp, SDES["ve"]()):
        with pytest.raises(ValueError, match="grid: expected continuous=True, got False"):
            make(sde, (2, 3), "euler_maruyama", grid=[1.0, 1e-3], continuous=False)
    make(SDES["subvp"](), (2, 3), "euler_maruyama", grid=[1.0, 1e-3], continuous=False)  # has no discrete labels
    for predictor in (UpstreamStyle, OtherUpdate):
        with pytest.raises(ValueError, match=r"grid: expected a predictor with a method step_to\(x, t, earlier\), got"):
            make(vp, (2, 3), predictor, grid=[1.0, 1e-3])
    with pytest.raises(ValueError, match="grid: ReverseDiffusionPredictor expects an affine SDE"):
        make(NotAffine(10), (2, 3), "reverse_diffusion", "langevin", grid=[1.0, 1e-3])(never)
    with pytest.raises(ValueError, match="grid: expected continuous=True"):
        controllable_generation.get_pc_inpainter(vp, None, None, lambda x: x, 0.1, grid=[1.0, 1e-5])


def test_a_predictor_of_the_users_own_takes_a_grid() -> None:
    OwnSteps.seen = []
    grid = torch.tensor([1.0, 0.3, 1e-3])  # float32: its ends are taken for T and eps
    sampler = make(SDES["vp"](), (2, 3), OwnSteps, grid=grid, denoise=False)
    with noise.seeds(5, [7, 8]):
        x, nfe = sampler(never)
    assert OwnSteps.seen == [(1.0, grid[1].item()), (grid[1].item(), 1e-3), (1e-3, 0.0)] and nfe == 6
    # its torch.randn_like is answered from the streams: prior and three steps
    key = torch.tensor([5, 0])
    right = sum(ops.noise_normal(key, torch.tensor([7, 8]), draw, (2, 3)) for draw in range(4))
    torch.testing.assert_close(x, right, rtol=0, atol=1e-6)


def test_any_sde_takes_a_grid_with_euler_maruyama() -> None:
    """And gives what the affine SDE of the same numbers gives, which is computed in the kernel."""

    def score(x: Tensor, labels: Tensor) -> Tensor:
        m, s = sde_lib.VPSDE().marginal_coefficients(labels)
        return -x / ((SPREAD * m) ** 2 + s**2)[:, None]

    class Affine(sde_lib.AffineSDE):
        def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return sde_lib.VPSDE().marginal_coefficients(t)

        def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return sde_lib.VPSDE().sde_coefficients(t)

    grid = falling(1.0, 1e-3, 30)
    x, y = (make(sde, (3, 4), "euler_maruyama", grid=grid, seeds=1)(score)[0] for sde in (NotAffine(9), Affine(9)))
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # thirty steps in another order of operations


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [None, falling(1.0, 1e-3, 8)], ids=["steps", "grid"])
@pytest.mark.parametrize("corrector", ["none", "ald"])
@pytest.mark.parametrize("sde", [sde_lib.VPSDE(N=25), sde_lib.VESDE(N=10)], ids=["vp", "ve"])
def test_seeds(sde: Any, grid: Any, corrector: str) -> None:
    """Sample b is stream b of the seed, or stream ids[b], in any batch, bit for bit; as in noise.seeds."""

    def run(batch: int, seeds: Any) -> Tensor:
        return make(sde, (batch, 7), "reverse_diffusion", corrector, grid=grid, seeds=seeds)(network_of(sde))[0]

    before = torch.random.get_rng_state()
    whole = run(37, 11)  # more than a vector register holds
    assert torch.equal(before, torch.random.get_rng_state())  # torch's generator is left alone
    assert torch.equal(run(37, 11), whole)
    assert torch.equal(run(37, (11, range(37))), whole)
    assert torch.equal(run(3, (11, [4, 36, 2])), whole[[4, 36, 2]])
    assert torch.equal(run(1, (11, torch.tensor([35]))), whole[35:36])
    with noise.seeds(11, range(37)):
        assert torch.equal(run(37, None), whole)
    for a, b in itertools.combinations([whole, run(37, 12), run(37, (11, range(5, 42)))], 2):
        assert (a != b).all()


def test_seeds_that_are_refused() -> None:
    for seeds in (1.5, "1", True, [1, [0, 1]], (1, [0, 1], 2), (True, [0, 1])):
        with pytest.raises(ValueError, match=r"seeds: expected None, a seed or \(seed, ids\)"):
            make(SDES["vp"](), (2, 3), None, seeds=seeds)
    for seeds in ((1, [0]), (1, [])):
        with pytest.raises(ValueError, match=r"seeds: expected one stream id a sample, 2, got \d"):
            make(SDES["vp"](), (2, 3), None, seeds=seeds)
    for seeds in ((1, [0.5, 1.0]), (1, 3), (1, ["a", "b"]), (1, None)):
        with pytest.raises(ValueError, match="ids: expected integers of shape"):
            make(SDES["vp"](), (2, 3), None, seeds=seeds)
    for seeds in (2**64, (2**64, [0, 1]), ("1", [0, 1])):
        with pytest.raises(ValueError, match="seed: expected an integer of 64 bits"):
            make(SDES["vp"](), (2, 3), None, seeds=seeds)
    assert make(SDES["vp"](), (0, 3), "euler_maruyama", seeds=1)(network_of(SDES["vp"]()))[0].shape == (0, 3)


# --- inpainting and colorization --------------------------------------------------------------------------------------


def test_inpainting_on_a_grid() -> None:
    """The known part is right to the noise at eps; the rest has the law of the data: 2000 pixels, five standard
    errors."""
    sde = SDES["vp"]()
    data, mask = torch.full((20, 1, 20, 10), 0.7), torch.zeros(1, 1, 20, 10)
    mask[..., 5:] = 1.0
    inpaint = controllable_generation.get_pc_inpainter(
        sde, sampling.get_predictor("ancestral_sampling"), None, lambda x: x, 0.1, continuous=True, eps=1e-4,
        grid=even_in_log_snr(sde, 1e-4, 100), seeds=(2, range(20)), progress=True,
    )  # fmt: skip
    x = inpaint(network_of(sde), data, mask)
    m, _ = sde.marginal_coefficients(1e-4)
    torch.testing.assert_close(x[..., 5:], m * data[..., 5:], rtol=1e-6, atol=0)
    hidden = x[..., :5].double()
    assert abs(hidden.mean()) < 5 * SPREAD / math.sqrt(2000)
    assert abs(hidden.std() / SPREAD - 1) < 0.03 + 5 / math.sqrt(2 * 2000)
    assert torch.equal(inpaint(network_of(sde), data, mask, draw=0), x)
    part = controllable_generation.get_pc_inpainter(
        sde, sampling.get_predictor("ancestral_sampling"), None, lambda x: x, 0.1, continuous=True, seeds=(2, [6])
    )
    with pytest.raises(ValueError, match="seeds: expected one stream id a sample, 20, got 1"):
        part(never, data, mask)


def test_known_part_is_at_the_time_of_the_state() -> None:
    """On a grid: after a corrector at its time, after a predictor at the time it stepped to, at eps in the end."""
    sde, grid = SDES["ve"](), [1.0, 0.4, 1e-5]
    data = torch.zeros(1, 1, 2, 2)
    seen: list[Tensor] = []

    def network(x: Tensor, labels: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    draws = [torch.zeros_like(data) if i < 1 else torch.ones_like(data) for i in range(13)]
    inpaint = controllable_generation.get_pc_inpainter(
        sde, sampling.get_predictor("euler_maruyama"), sampling.get_corrector("ald"), lambda x: x, 0.1,
        continuous=True, grid=grid, denoise=False,
    )  # fmt: skip
    with noise.replay(draws):
        last = inpaint(network, data, torch.ones_like(data))
    # seen by the corrector and the predictor of every time, the start first
    right = [0.0, sde.sigma(1.0), sde.sigma(0.4), sde.sigma(0.4), sde.sigma(1e-5), sde.sigma(1e-5)]
    for state, sigma in zip(seen, right, strict=True):
        torch.testing.assert_close(state, torch.full_like(data, sigma))
    torch.testing.assert_close(last, torch.full_like(data, sde.sigma(1e-5)))


def test_colorization_with_seeds_and_a_grid() -> None:
    sde = SDES["vp"]()
    gray = torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4).expand(2, 3, 4, 4)
    options = {"continuous": True, "eps": 1e-4, "grid": falling(1.0, 1e-4, 40)}
    predictor = sampling.get_predictor("reverse_diffusion")
    get = controllable_generation.get_pc_colorizer
    x = get(sde, predictor, None, lambda x: x, 0.1, seeds=9, **options)(network_of(sde), gray)
    m, _ = sde.marginal_coefficients(1e-4)
    torch.testing.assert_close(x.mean(1), m * gray[:, 0], rtol=1e-4, atol=1e-5)
    assert x.std(1).min() > 0.01  # coloured
    one = get(sde, predictor, None, lambda x: x, 0.1, seeds=(9, [1]), **options)(network_of(sde), gray[1:])
    torch.testing.assert_close(one, x[1:], rtol=1e-4, atol=1e-5)  # einsum may round otherwise in another batch
