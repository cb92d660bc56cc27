"""The contract with programs written for upstream: names, signatures, registries, own classes, flat module names."""

import inspect
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden import assert_rounding
from networks import GaussianModel, per_sample
from torch import Tensor, nn

from scoresde_ext import controllable_generation, likelihood, losses, noise, sampling, sde_lib
from scoresde_ext import utils as checkpoints
from scoresde_ext.models import ema
from scoresde_ext.models import utils as mutils

EMA = ema.ExponentialMovingAverage
PREDICTORS = {
    "euler_maruyama": sampling.EulerMaruyamaPredictor,
    "reverse_diffusion": sampling.ReverseDiffusionPredictor,
    "ancestral_sampling": sampling.AncestralSamplingPredictor,
    "none": sampling.NonePredictor,
}
CORRECTORS = {
    "langevin": sampling.LangevinCorrector,
    "ald": sampling.AnnealedLangevinDynamics,
    "none": sampling.NoneCorrector,
}


# --- names and signatures ---------------------------------------------------------------------------------------------

SIGNATURES: dict[Callable[..., Any], str] = {
    sde_lib.SDE: "N",
    sde_lib.VPSDE: "beta_min=0.1, beta_max=20, N=1000",
    sde_lib.subVPSDE: "beta_min=0.1, beta_max=20, N=1000",
    sde_lib.VESDE: "sigma_min=0.01, sigma_max=50, N=1000",
    sde_lib.SDE.sde: "self, x, t",
    sde_lib.SDE.marginal_prob: "self, x, t",
    sde_lib.SDE.prior_sampling: "self, shape",
    sde_lib.SDE.prior_logp: "self, z",
    sde_lib.SDE.discretize: "self, x, t",
    sde_lib.SDE.reverse: "self, score_fn, probability_flow=False",
    losses.get_optimizer: "config, params",
    losses.optimization_manager: "config",
    losses.get_sde_loss_fn: "sde, train, reduce_mean=True, continuous=True, likelihood_weighting=True, eps=1e-05",
    losses.get_smld_loss_fn: "vesde, train, reduce_mean=False",
    losses.get_ddpm_loss_fn: "vpsde, train, reduce_mean=True",
    losses.get_step_fn: "sde, train, optimize_fn=None, reduce_mean=False, continuous=True, likelihood_weighting=False",
    sampling.register_predictor: "cls=None",
    sampling.register_corrector: "cls=None",
    sampling.get_predictor: "name",
    sampling.get_corrector: "name",
    sampling.Predictor: "sde, score_fn, probability_flow=False",
    sampling.Corrector: "sde, score_fn, snr, n_steps",
    **{cls.update_fn: "self, x, t" for cls in (sampling.Predictor, sampling.Corrector)},
    **dict.fromkeys(PREDICTORS.values(), "sde, score_fn, probability_flow=False"),
    **dict.fromkeys(CORRECTORS.values(), "sde, score_fn, snr, n_steps"),
    sampling.shared_predictor_update_fn: "x, t, sde, model, predictor, probability_flow, continuous",
    sampling.shared_corrector_update_fn: "x, t, sde, model, corrector, continuous, snr, n_steps",
    sampling.get_pc_sampler: (
        "sde, shape, predictor, corrector, inverse_scaler, snr, n_steps=1, probability_flow=False, continuous=False, "
        "denoise=True, eps=0.001, device='cuda'"
    ),
    sampling.get_ode_sampler: (
        "sde, shape, inverse_scaler, denoise=False, rtol=1e-05, atol=1e-05, method='RK45', eps=0.001, device='cuda'"
    ),
    sampling.get_sampling_fn: "config, sde, shape, inverse_scaler, eps",
    likelihood.get_div_fn: "fn",
    likelihood.get_likelihood_fn: (
        "sde, inverse_scaler, hutchinson_type='Rademacher', rtol=1e-05, atol=1e-05, method='RK45', eps=1e-05"
    ),
    **dict.fromkeys(
        (controllable_generation.get_pc_inpainter, controllable_generation.get_pc_colorizer),
        "sde, predictor, corrector, inverse_scaler, snr, n_steps=1, probability_flow=False, continuous=False, "
        "denoise=True, eps=1e-05",
    ),
    mutils.register_model: "cls=None",
    mutils.get_model: "name",
    mutils.get_sigmas: "config",
    mutils.get_ddpm_params: "config",
    mutils.create_model: "config",
    mutils.get_model_fn: "model, train=False",
    mutils.get_score_fn: "sde, model, train=False, continuous=False",
    mutils.to_flattened_numpy: "x",
    mutils.from_flattened_numpy: "x, shape",
    EMA: "parameters, decay, use_num_updates=True",
    **dict.fromkeys((EMA.update, EMA.copy_to, EMA.store, EMA.restore), "self, parameters"),
    EMA.state_dict: "self",
    EMA.load_state_dict: "self, state_dict",
    checkpoints.save_checkpoint: "path, state",
    checkpoints.restore_checkpoint: "path, state, device",
    noise.replay: "tensors",
    noise.seeds: "seed, ids",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__.rpartition('.')[2]}.{f.__qualname__}")
def test_signature(function: Callable[..., Any]) -> None:
    """Positional parameters and defaults are upstream's; what is ours alone is keyword-only and may be left out."""
    positional = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.POSITIONAL_OR_KEYWORD:
            positional.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
        else:
            assert p.kind is p.KEYWORD_ONLY, p
            assert p.default is not p.empty, p
    assert ", ".join(positional) == SIGNATURES[function]


@pytest.mark.parametrize("register", [sampling.register_predictor, sampling.register_corrector, mutils.register_model])
def test_registration_takes_the_name_as_keyword(register: Callable[..., Any]) -> None:
    name = inspect.signature(register).parameters["name"]
    assert name.kind is name.KEYWORD_ONLY
    assert name.default is None


@pytest.mark.parametrize("get", [sampling.get_pc_sampler, sampling.get_ode_sampler])
def test_progress_bars_are_off_unless_asked_for(get: Callable[..., Any]) -> None:
    progress = inspect.signature(get).parameters["progress"]
    assert progress.kind is progress.KEYWORD_ONLY
    assert progress.default is False


def test_sde_is_abstract() -> None:
    assert sde_lib.SDE.__abstractmethods__ == {"T", "sde", "marginal_prob", "prior_sampling", "prior_logp"}
    with pytest.raises(TypeError, match="abstract"):
        sde_lib.SDE(10)


def test_sde_classes_are_siblings() -> None:
    """Upstream tells its SDEs apart by isinstance, VPSDE first: sub-VP must not pass for VP."""
    family = [sde_lib.VPSDE(), sde_lib.subVPSDE(), sde_lib.VESDE()]
    for sde in family:
        assert isinstance(sde, sde_lib.SDE)
        assert sum(isinstance(sde, type(other)) for other in family) == 1
        assert sde.T == 1
        assert sde.N == 1000


def test_attributes() -> None:
    vp, subvp, ve = sde_lib.VPSDE(0.2, 10, 50), sde_lib.subVPSDE(0.2, 10, 50), sde_lib.VESDE(0.02, 5, 50)
    for sde in (vp, subvp):
        assert (sde.beta_0, sde.beta_1, sde.N) == (0.2, 10, 50)
    for table in ("discrete_betas", "alphas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_1m_alphas_cumprod"):
        assert getattr(vp, table).shape == (50,)
    assert torch.equal(subvp.alphas, vp.alphas)
    assert (ve.sigma_min, ve.sigma_max, ve.N) == (0.02, 5, 50)
    assert ve.discrete_sigmas.shape == (50,)
    assert (ve.discrete_sigmas.diff() > 0).all()


# --- registries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("get", "names"),
    [(sampling.get_predictor, PREDICTORS), (sampling.get_corrector, CORRECTORS)],
    ids=["predictor", "corrector"],
)
def test_registered_names(get: Callable[[str], type], names: dict[str, type]) -> None:
    for name, cls in names.items():
        assert get(name) is cls
    with pytest.raises(KeyError):
        get("no such name")


@pytest.mark.parametrize(
    ("register", "get"),
    [
        (sampling.register_predictor, sampling.get_predictor),
        (sampling.register_corrector, sampling.get_corrector),
        (mutils.register_model, mutils.get_model),
    ],
    ids=["predictor", "corrector", "model"],
)
def test_registration(register: Callable[..., Any], get: Callable[[str], type]) -> None:
    class RegisteredByItsOwnName:
        pass

    class Renamed:
        pass

    assert register(RegisteredByItsOwnName) is RegisteredByItsOwnName
    assert get("RegisteredByItsOwnName") is RegisteredByItsOwnName
    assert register(name="another name")(Renamed) is Renamed
    assert get("another name") is Renamed
    with pytest.raises(ValueError, match="another name"):
        register(name="another name")(RegisteredByItsOwnName)
    assert get("another name") is Renamed
    with pytest.raises(KeyError):
        get("Renamed")


def test_create_model() -> None:
    @mutils.register_model(name="half")
    class Half(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(config.model.scale))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.scale * x

    config = SimpleNamespace(model=SimpleNamespace(name="half", scale=0.5), device=torch.device("cpu"))
    model = mutils.create_model(config)
    assert torch.equal(model(torch.ones(2, 3), torch.ones(2)), torch.full((2, 3), 0.5))


def test_tables_from_config() -> None:
    config = SimpleNamespace(
        model=SimpleNamespace(sigma_min=0.01, sigma_max=50.0, num_scales=50, beta_min=0.1, beta_max=20.0)
    )
    sigmas = mutils.get_sigmas(config)
    np.testing.assert_allclose(sigmas, np.geomspace(50.0, 0.01, 50))
    params = mutils.get_ddpm_params(config)
    betas = np.linspace(0.002, 0.4, 1000)  # upstream takes 1000 of them whatever num_scales says
    np.testing.assert_allclose(params["betas"], betas)
    np.testing.assert_allclose(params["alphas_cumprod"], np.cumprod(1 - betas), rtol=1e-12)
    assert params["num_diffusion_timesteps"] == 1000


def test_flattening() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    flat = mutils.to_flattened_numpy(x)
    assert isinstance(flat, np.ndarray)
    assert flat.shape == (12,)
    assert torch.equal(mutils.from_flattened_numpy(flat, (2, 3, 2)), x)


# --- classes written by users, in upstream's style --------------------------------------------------------------------


class UserVP(sde_lib.SDE):
    """The VP SDE once more, as a user of upstream would write a new SDE: for (B, C, H, W) only."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20, N: int = 1000) -> None:
        super().__init__(N)
        self.beta_0, self.beta_1, self.N = beta_min, beta_max, N
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)

    @property
    def T(self) -> int:
        return 1

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        beta_t = self.beta_0 + t * (self.beta_1 - self.beta_0)
        return -0.5 * beta_t[:, None, None, None] * x, torch.sqrt(beta_t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        log_mean_coeff = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return torch.exp(log_mean_coeff[:, None, None, None]) * x, torch.sqrt(-torch.expm1(2.0 * log_mean_coeff))

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        N = np.prod(z.shape[1:])
        return -N / 2.0 * np.log(2 * np.pi) - torch.sum(z**2, dim=(1, 2, 3)) / 2.0

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.discrete_betas.to(x.device)[(t * (self.N - 1) / self.T).long()]
        return torch.sqrt(1 - beta)[:, None, None, None] * x - x, torch.sqrt(beta)


class UserVE(sde_lib.SDE):
    """The VE SDE once more; it takes `discretize` from the base class."""

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50, N: int = 1000) -> None:
        super().__init__(N)
        self.sigma_min, self.sigma_max, self.N = sigma_min, sigma_max, N

    @property
    def T(self) -> int:
        return 1

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = self.marginal_prob(x, t)
        return torch.zeros_like(x), sigma * np.sqrt(2 * (np.log(self.sigma_max) - np.log(self.sigma_min)))

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape) * self.sigma_max

    def prior_logp(self, z: Tensor) -> Tensor:
        N = np.prod(z.shape[1:])
        energy = torch.sum(z**2, dim=(1, 2, 3)) / (2 * self.sigma_max**2)
        return -N / 2.0 * np.log(2 * np.pi * self.sigma_max**2) - energy


SHAPE = (4, 3, 4, 4)
PAIRS = {
    "vp": (sde_lib.VPSDE(N=20), UserVP(N=20), "vp_cont", (0.1, 20.0)),
    "ve": (sde_lib.VESDE(N=20), UserVE(N=20), "ve_cont", (0.01, 50.0)),
}
both_kinds = pytest.mark.parametrize("kind", PAIRS)


def pair(kind: str) -> list[tuple[sde_lib.SDE, Callable[[Tensor, Tensor], Tensor]]]:
    """Our SDE and the user's, with networks of the same Gaussian; the user's returns the score itself, at label t."""
    ours, theirs, mode, (p0, p1) = PAIRS[kind]
    network = GaussianModel(mode, p0, p1, 20, mu=[0.3, -0.2, 0.1], s=0.5)
    score_fn = mutils.get_score_fn(ours, network, continuous=True)
    return [(ours, network), (theirs, lambda x, t: score_fn(x, t))]


def draws(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def assert_same(theirs: Tensor, ours: Tensor, roundings: float = 64) -> None:
    """The user's formulas run in plain torch, ours in kernels: the same mathematics, rounded differently."""
    assert_rounding(theirs, ours, roundings)


# Whole runs add up some tens of differently rounded steps (roundings=64); an adaptive solve also chooses its steps by
# rounded error norms, and follows the exact flow to its tolerance only.


# No corrector for VP: alpha is 1 for a user's SDE.  No reverse diffusion for VE: the base class discretizes by
# Euler-Maruyama, VESDE by differences of sigma.
VP_STEPPERS = product(["vp"], ["euler_maruyama", "reverse_diffusion", "none", None], ["none", None])
VE_STEPPERS = product(["ve"], ["euler_maruyama", "none", None], ["langevin", "ald", "none", None])


@pytest.mark.parametrize(("kind", "predictor", "corrector"), [*VP_STEPPERS, *VE_STEPPERS])
def test_user_sde_in_pc_sampler(kind: str, predictor: str | None, corrector: str | None) -> None:
    results = []
    for sde, model in pair(kind):
        sampler = sampling.get_pc_sampler(
            sde, SHAPE, predictor and sampling.get_predictor(predictor),
            corrector and sampling.get_corrector(corrector), lambda x: x, snr=0.16, continuous=True, device="cpu",
        )  # fmt: skip
        # the torch.randn of the user's prior_sampling is a draw like any other
        n_draws = 1 + 20 * ((predictor not in (None, "none")) + (corrector not in (None, "none")))
        results.append(call_with(draws(n_draws), sampler, model))
    (ours, nfe), (theirs, user_nfe) = results
    assert_same(theirs, ours)
    assert nfe == user_nfe == 40


@both_kinds
@pytest.mark.parametrize("likelihood_weighting", [False, True])
@pytest.mark.parametrize("reduce_mean", [False, True])
def test_user_sde_in_loss(kind: str, likelihood_weighting: bool, reduce_mean: bool) -> None:
    batch, u = draws(1)[0], torch.tensor([0.01, 0.3, 0.7, 0.99])
    ours, theirs = (
        call_with(
            [u, draws(1, seed=1)[0]],
            losses.get_sde_loss_fn(
                sde, False, reduce_mean=reduce_mean, continuous=True, likelihood_weighting=likelihood_weighting
            ),
            model,
            batch,
        )
        for sde, model in pair(kind)
    )
    assert_same(theirs, ours)


def call_with(tensors: Sequence[Tensor] | Tensor, function: Callable[..., Any], *args: Any) -> Any:
    with noise.replay(tensors):
        return function(*args)


@pytest.mark.parametrize(("kind", "denoise"), [("vp", False), ("vp", True), ("ve", False)])
def test_user_sde_in_ode_sampler(kind: str, denoise: bool) -> None:
    z = draws(1)[0] * (50 if kind == "ve" else 1)
    results = []
    for sde, model in pair(kind):
        sampler = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, denoise=denoise, eps=1e-3, device="cpu")
        results.append(call_with([z] if denoise else [], sampler, model, z))
    (ours, nfe), (theirs, user_nfe) = results
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert abs(nfe - user_nfe) <= 6


@both_kinds
def test_user_sde_in_likelihood(kind: str) -> None:
    data = 0.5 * draws(1)[0]
    signs = torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(1))
    results = [
        call_with([signs], likelihood.get_likelihood_fn(sde, lambda x: (x + 1) / 2), model, data)
        for sde, model in pair(kind)
    ]
    (bpd, z, nfe), (user_bpd, user_z, user_nfe) = results
    torch.testing.assert_close(user_bpd, bpd, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(user_z, z, rtol=1e-3, atol=1e-3)
    assert abs(nfe - user_nfe) <= 6


@both_kinds
def test_user_sde_in_inpainting(kind: str) -> None:
    data, mask = draws(1)[0], (draws(1, seed=1)[0] > 0).float()
    results = []
    for sde, model in pair(kind):
        inpaint = controllable_generation.get_pc_inpainter(
            sde, sampling.EulerMaruyamaPredictor, None, lambda x: x, snr=0.16, continuous=True, eps=1e-3
        )
        results.append(call_with(draws(61), inpaint, model, data, mask))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("probability_flow", [False, True])
def test_user_sde_reversed(probability_flow: bool) -> None:
    (ours, network), (theirs, score) = pair("vp")
    x, t = draws(1)[0], torch.tensor([0.01, 0.3, 0.7, 0.99])
    score_fn = mutils.get_score_fn(ours, network, continuous=True)
    reverse, user_reverse = ours.reverse(score_fn, probability_flow), theirs.reverse(score, probability_flow)
    assert (user_reverse.N, user_reverse.T, user_reverse.probability_flow) == (20, 1, probability_flow)
    for method in ("sde", "discretize"):
        (f, g), (user_f, user_g) = getattr(reverse, method)(x, t), getattr(user_reverse, method)(x, t)
        # VP's discrete f is (sqrt(alpha) - 1) x and more: a difference of numbers of the size of x
        assert_rounding(user_f, f, 16, scale=torch.maximum(x.abs(), f.abs()).flatten(1).amax(1))
        assert_same(torch.as_tensor(user_g), torch.as_tensor(g))


class Tempered(sde_lib.VPSDE):
    """A user's own reverse process: half the score."""

    def reverse(self, score_fn: Callable[[Tensor, Tensor], Tensor], probability_flow: bool = False) -> sde_lib.SDE:
        return super().reverse(lambda x, t: 0.5 * score_fn(x, t), probability_flow)


def test_replaced_reverse_is_followed() -> None:
    (vp, network), data = pair("vp")[0], 0.5 * draws(1)[0]
    tempered = Tempered(N=20)
    results = []
    for sde, model in ((vp, lambda x, labels: 0.5 * network(x, labels)), (tempered, network)):
        sampler = sampling.get_pc_sampler(
            sde, SHAPE, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.16, continuous=True, device="cpu"
        )
        flow = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, device="cpu")(model, draws(1)[0])[0]
        likelihood_fn = likelihood.get_likelihood_fn(sde, lambda x: x)
        signs = torch.ones(SHAPE, dtype=torch.int64)
        bpd = call_with([signs], likelihood_fn, model, data)[0]
        results.append((call_with(draws(21), sampler, model)[0], flow, bpd))
    for half_network, half_score in zip(*results, strict=True):
        torch.testing.assert_close(half_score, half_network, rtol=1e-4, atol=1e-4)


def test_user_sde_without_ancestral_sampling() -> None:
    for sde in (UserVP(N=20), sde_lib.subVPSDE(N=20)):
        with pytest.raises(NotImplementedError, match=type(sde).__name__):
            sampling.AncestralSamplingPredictor(sde, lambda x, t: -x).update_fn(draws(1)[0], torch.ones(4))
    with pytest.raises((AssertionError, ValueError), match=r"[Pp]robability"):
        sampling.AncestralSamplingPredictor(sde_lib.VPSDE(), lambda x, t: -x, probability_flow=True)


class UserAffine(sde_lib.AffineSDE):
    """Constant beta: dx = -x dt + sqrt(2) dw.  Coefficients alone, so every kernel of ours serves it."""

    @property
    def T(self) -> int:
        return 1

    def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(-t), torch.sqrt(-torch.expm1(-2 * t))

    def sde_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.full_like(t, 2**0.5)

    def prior_sampling(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        return sde_lib.VPSDE().prior_logp(z)


class UserPlain(sde_lib.SDE):
    """The same SDE by its full methods."""

    T = 1
    prior_sampling, prior_logp = UserAffine.prior_sampling, UserAffine.prior_logp

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return -x, torch.full_like(t, 2**0.5)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample(torch.exp(-t), x) * x, torch.sqrt(-torch.expm1(-2 * t))


def standard_normal_score(x: Tensor, t: Tensor) -> Tensor:
    """Data N(0, 1) stay N(0, 1) under UserAffine."""
    return -x


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_coefficients_suffice(predictor: str, corrector: str) -> None:
    results = []
    for sde in (UserAffine(10), UserPlain(10)):
        sampler = sampling.get_pc_sampler(
            sde, SHAPE, sampling.get_predictor(predictor), sampling.get_corrector(corrector), lambda x: x, snr=0.16,
            continuous=True, device="cpu",
        )  # fmt: skip
        results.append(call_with(draws(21), sampler, standard_normal_score)[0])
    assert_same(results[1], results[0])


def test_coefficients_suffice_for_loss_and_likelihood() -> None:
    batch, u = draws(1)[0], torch.tensor([0.01, 0.3, 0.7, 0.99])
    signs = torch.randint(0, 2, SHAPE)
    loss, bpd = [], []
    for sde in (UserAffine(10), UserPlain(10)):
        loss_fn = losses.get_sde_loss_fn(sde, False)
        loss.append(call_with([u, draws(1, seed=1)[0]], loss_fn, standard_normal_score, batch))
        likelihood_fn = likelihood.get_likelihood_fn(sde, lambda x: x)
        bpd.append(call_with([signs], likelihood_fn, standard_normal_score, batch)[0])
    assert_same(loss[1], loss[0])
    exact = -torch.distributions.Normal(0.0, 1.0).log_prob(batch).flatten(1).mean(1) / np.log(2) + 8
    for value in bpd:  # the flow of a stationary density stands still
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)


class LongerUserPlain(UserPlain):
    T = 2


def test_other_end_times() -> None:
    sde, seen = LongerUserPlain(10), []

    def score(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return -x

    sampler = sampling.get_pc_sampler(
        sde, SHAPE, sampling.EulerMaruyamaPredictor, None, lambda x: x, 0.16, continuous=True, device="cpu"
    )
    sampler(score)
    assert seen == pytest.approx(np.linspace(2, 1e-3, 10).tolist(), rel=1e-6)
    seen.clear()
    z = draws(1)[0]
    x, _ = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, device="cpu")(score, z)
    torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)
    assert seen[0] == 2
    seen.clear()
    call_with([torch.full((4,), 0.75), z], losses.get_sde_loss_fn(sde, False), score, z)
    assert seen == pytest.approx([1.5], rel=1e-4)


class Changed(sde_lib.VPSDE):
    """A VPSDE whose schedule a user replaced: everything has to follow the methods, not the betas beneath them."""

    sde, marginal_prob, discretize = UserPlain.sde, UserPlain.marginal_prob, sde_lib.SDE.discretize


class ChangedVE(sde_lib.VESDE):
    """A VESDE of linear sigma, written over upstream's two methods."""

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), 4 * torch.sqrt(2 * t + 0.02)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, 4 * torch.sqrt(t * (t + 0.02))


@pytest.mark.parametrize("train", [False, True])
def test_changed_methods_are_followed_by_score_and_loss(train: bool) -> None:
    x, t, z = draws(1)[0], torch.tensor([0.01, 0.3, 0.7, 0.99]), draws(1, seed=1)[0]
    for sde, sign in ((Changed(), -1), (ChangedVE(), 1)):
        std = sde.marginal_prob(x, t)[1]
        seen: list[Tensor] = []

        def network(x: Tensor, labels: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(labels)
            return 0.5 * x

        score = mutils.get_score_fn(sde, network, train, continuous=True)(x, t)
        assert_same(score, 0.5 * x if sign > 0 else -0.5 * x / per_sample(std, x), roundings=8)
        assert_same(seen[0], std if sign > 0 else 999 * t, roundings=8)

        loss = call_with([(t - 1e-5) / (1 - 1e-5), z], losses.get_sde_loss_fn(sde, train), network, x)
        perturbed = sde.marginal_prob(x, t)[0] + per_sample(std, x) * z
        residual = mutils.get_score_fn(sde, network, train, continuous=True)(perturbed, t) + z / per_sample(std, x)
        assert_same(loss, (residual.square().flatten(1).mean(1) * sde.sde(x, t)[1].square()).mean())


@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
def test_changed_methods_are_followed_by_samplers(predictor: str) -> None:
    """Changed is UserPlain under another name, up to what the network means."""
    std = lambda t: torch.sqrt(-torch.expm1(-2 * t))  # noqa: E731
    models = [(Changed(N=10), lambda x, labels: per_sample(std(labels / 999), x) * x), (UserPlain(10), lambda x, t: -x)]
    samples, flows, bits = [], [], []
    for sde, model in models:
        sampler = sampling.get_pc_sampler(
            sde, SHAPE, sampling.get_predictor(predictor), None, lambda x: x, snr=0.16, continuous=True, device="cpu"
        )
        samples.append(call_with(draws(11), sampler, model)[0])
        flows.append(sampling.get_ode_sampler(sde, SHAPE, lambda x: x, device="cpu")(model, draws(1)[0])[0])
        bits.append(likelihood.get_likelihood_fn(sde, lambda x: x)(model, draws(1)[0])[0])
    assert_same(samples[1], samples[0])
    for flow in flows:
        torch.testing.assert_close(flow, draws(1)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bits[0], bits[1], rtol=1e-4, atol=1e-4)


class UserPredictor(sampling.Predictor):
    """Reverse diffusion once more, in upstream's style."""

    made = 0

    def __init__(
        self, sde: sde_lib.SDE, score_fn: Callable[[Tensor, Tensor], Tensor], probability_flow: bool = False
    ) -> None:
        super().__init__(sde, score_fn, probability_flow)
        type(self).made += 1

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        f, G = self.rsde.discretize(x, t)
        z = torch.randn_like(x)
        x_mean = x - f
        x = x_mean + G[:, None, None, None] * z
        return x, x_mean


class UserCorrector(sampling.Corrector):
    """Annealed Langevin dynamics once more, in upstream's style."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        std = self.sde.marginal_prob(x, t)[1]
        for _ in range(self.n_steps):
            grad = self.score_fn(x, t)
            noise = torch.randn_like(x)
            step_size = (self.snr * std) ** 2 * 2
            x_mean = x + step_size[:, None, None, None] * grad
            x = x_mean + noise * torch.sqrt(step_size * 2)[:, None, None, None]
        return x, x_mean


@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_user_predictor(kind: str) -> None:
    """Without noise (probability flow), the user's predictor does what ours does."""
    sde, network = pair(kind)[0]
    results = []
    for predictor in (sampling.ReverseDiffusionPredictor, UserPredictor):
        sampler = sampling.get_pc_sampler(
            sde, SHAPE, predictor, None, lambda x: x, snr=0.16, probability_flow=True, continuous=True, device="cpu"
        )
        torch.manual_seed(0)
        results.append(sampler(network)[0])
    assert_same(results[1], results[0])


def test_user_predictor_and_corrector_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    sde, network = pair("ve")[0]
    x, t, z = draws(1, seed=1)[0], torch.tensor([0.2, 0.4, 0.6, 0.8]), list(draws(2))
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    ours = call_with(z[:1], sampling.ReverseDiffusionPredictor(sde, score_fn).update_fn, x, t)
    ours += call_with(z, sampling.AnnealedLangevinDynamics(sde, score_fn, 0.16, 2).update_fn, x, t)

    queue = [z[0], *z]
    monkeypatch.setattr(torch, "randn_like", lambda _: queue.pop(0))
    theirs = UserPredictor(sde, score_fn).update_fn(x, t) + UserCorrector(sde, score_fn, 0.16, 2).update_fn(x, t)
    for user, own in zip(theirs, ours, strict=True):
        assert_same(user, own, roundings=16)


def test_a_step_of_a_users_class_returns_two_states() -> None:
    """A batch of two would pass for (x, x_mean)."""

    class OneState(sampling.Predictor):
        def update_fn(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    sde, network = pair("ve")[0]
    sampler = sampling.get_pc_sampler(
        sde, (2, *SHAPE[1:]), OneState, None, lambda x: x, snr=0.16, continuous=True, device="cpu"
    )
    with pytest.raises(ValueError, match=r"predictor: expected update_fn to return \(x, x_mean\), got Tensor"):
        sampler(network)


def test_user_predictor_and_corrector_in_whole_runs() -> None:
    sde, network = pair("ve")[0]
    UserPredictor.made = 0
    sampler = sampling.get_pc_sampler(
        sde, SHAPE, UserPredictor, UserCorrector, lambda x: x, snr=0.16, n_steps=2, continuous=True, device="cpu"
    )
    torch.manual_seed(3)
    first, nfe = sampler(network)
    torch.manual_seed(3)
    again, _ = sampler(network)
    assert torch.equal(first, again)
    assert torch.isfinite(first).all()
    assert nfe == 20 * 3
    assert UserPredictor.made == 2  # once a run, not once a step

    data = draws(1)[0]
    inpaint = controllable_generation.get_pc_inpainter(
        sde, UserPredictor, UserCorrector, lambda x: x, snr=0.16, continuous=True
    )
    known = inpaint(network, data, torch.ones_like(data))
    assert_rounding(known, data, 4)  # the marginal mean of VE data is the data


# --- flat module names ------------------------------------------------------------------------------------------------

FLAT = ("sde_lib", "losses", "sampling", "likelihood", "controllable_generation")

# upstream's own models/utils.py stays in place: it tells the SDEs apart by isinstance
UPSTREAM_STYLE_MODELS = """
    import torch
    import sde_lib

    def get_score_fn(sde, model, train=False, continuous=False):
        if isinstance(sde, sde_lib.VPSDE) or isinstance(sde, sde_lib.subVPSDE):
            def score_fn(x, t):
                std = sde.marginal_prob(torch.zeros_like(x), t)[1]
                return -model(x, t * 999) / std[:, None, None, None]
        elif isinstance(sde, sde_lib.VESDE):
            def score_fn(x, t):
                return model(x, sde.marginal_prob(torch.zeros_like(x), t)[1])
        else:
            raise NotImplementedError(sde.__class__.__name__)
        return score_fn
"""

UPSTREAM_STYLE_PROGRAM = """
    import torch
    import sde_lib, sampling, losses, likelihood
    import controllable_generation
    from models import utils as mutils
    from sampling import Predictor, NoneCorrector, get_predictor, register_predictor, ReverseDiffusionPredictor

    @register_predictor(name='flat')
    class Flat(Predictor):
        def update_fn(self, x, t):
            f, G = self.rsde.discretize(x, t)
            return x - f, x - f

    class LikeVP(sde_lib.VPSDE):
        pass

    shape = (2, 3, 4, 4)
    model = lambda x, labels: 0.9 * x
    assert issubclass(get_predictor('reverse_diffusion'), Predictor)
    for sde in (sde_lib.VPSDE(0.1, 2, 4), sde_lib.subVPSDE(0.1, 2, 4), sde_lib.VESDE(N=4), LikeVP(0.1, 2, 4)):
        x, t = torch.ones(shape), torch.full((2,), 0.5)
        score_fn = mutils.get_score_fn(sde, model, continuous=True)
        x, x_mean = ReverseDiffusionPredictor(sde, score_fn).update_fn(x, t)
        for predictor in (Flat, get_predictor('euler_maruyama')):
            sampler = sampling.get_pc_sampler(
                sde, shape, predictor, NoneCorrector, lambda x: x, snr=0.1, continuous=True, device='cpu')
            x, n = sampler(model)
            assert x.shape == shape and n == 8, (sde, n)
        loss = losses.get_sde_loss_fn(sde, train=False)(model, x)
        bpd, z, nfe = likelihood.get_likelihood_fn(sde, lambda x: x, rtol=1e-2, atol=1e-2)(model, x)
        assert bpd.shape == (2,) and torch.isfinite(loss)
    print('done')
"""


def test_flat_module_names(tmp_path: Path) -> None:
    """A program of upstream's layout finds our five modules under upstream's names and its own models beside them."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "utils.py").write_text(textwrap.dedent(UPSTREAM_STYLE_MODELS))
    (tmp_path / "program.py").write_text(textwrap.dedent(UPSTREAM_STYLE_PROGRAM))
    start = (
        "import importlib, sys\n"
        f"for name in {FLAT}: sys.modules[name] = importlib.import_module('scoresde_ext.' + name)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import program, sde_lib, scoresde_ext.sde_lib\n"
        "assert sde_lib is scoresde_ext.sde_lib\n"
        "assert program.mutils.__name__ == 'models.utils'\n"
    )
    result = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"
