"""What upstream gets wrong or cannot do, and what it does once too often: right here, and once."""

import builtins
import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden import EPS32, assert_rounding
from networks import GaussianModel, TinyTrainNet, per_sample
from scipy.integrate import DOP853, RK45
from torch import Tensor, nn

from scoresde_ext import controllable_generation, integrate, likelihood, losses, noise, sampling, sde_lib, utils
from scoresde_ext.models import utils as mutils
from scoresde_ext.models.ema import ExponentialMovingAverage

N = 8
SDES = {
    "vp": (sde_lib.VPSDE(0.1, 5.0, N), "vp_cont", 0.1, 5.0),  # beta_max < N: every discrete beta is below 1
    "subvp": (sde_lib.subVPSDE(0.1, 5.0, N), "subvp_cont", 0.1, 5.0),
    "ve": (sde_lib.VESDE(N=N), "ve_cont", 0.01, 50.0),
}
every_kind = pytest.mark.parametrize("kind", SDES)


def make(kind: str, mu: float = 0.3, s: float = 0.5) -> tuple[sde_lib.SDE, GaussianModel]:
    """An SDE and the network of Gaussian data, elementwise: its value does not depend on the data's shape."""
    sde, mode, p0, p1 = SDES[kind]
    return sde, GaussianModel(mode, p0, p1, N, mu, s)


def identity(x: Any) -> Any:
    return x


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pc_sampler(sde: sde_lib.SDE, shape: tuple[int, ...], predictor: str, corrector: str, **options: Any) -> Any:
    options = {"snr": 0.16, "continuous": True, "device": "cpu"} | options
    return sampling.get_pc_sampler(
        sde, shape, sampling.get_predictor(predictor), sampling.get_corrector(corrector), identity, **options
    )


# --- data that are not (B, C, H, W) -----------------------------------------------------------------------------------

# Equal sizes are where [:, None, None, None] goes wrong in silence: (B, B) + (B, 1, 1, 1) is (B, 1, B, B).
SHAPES = [(6,), (6, 6), (6, 1), (6, 4, 6), (6, 2, 3, 2, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def as_images(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, 1, 1)


def assert_exact(actual: Tensor, images: Tensor, shape: tuple[int, ...]) -> None:
    assert actual.shape == shape
    assert torch.equal(as_images(actual), images)


@every_kind
@every_shape
def test_any_shape_sde(kind: str, shape: tuple[int, ...]) -> None:
    sde, network = make(kind)
    x, t = normals(*shape), torch.linspace(0.01, 1, 6)
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    assert_exact(score_fn(x, t), score_fn(as_images(x), t), shape)
    assert torch.equal(sde.prior_logp(x), sde.prior_logp(as_images(x)))
    for process in (sde, sde.reverse(score_fn), sde.reverse(score_fn, probability_flow=True)):
        for method in ("sde", "discretize"):
            (f, g), (image_f, image_g) = getattr(process, method)(x, t), getattr(process, method)(as_images(x), t)
            assert_exact(f, image_f, shape)
            assert torch.equal(torch.as_tensor(g), torch.as_tensor(image_g))
    mean, std = sde.marginal_prob(x, t)
    assert_exact(mean, sde.marginal_prob(as_images(x), t)[0], shape)
    assert std.shape == (6,)


@every_kind
@every_shape
@pytest.mark.parametrize("likelihood_weighting", [False, True])
def test_any_shape_loss(kind: str, shape: tuple[int, ...], likelihood_weighting: bool) -> None:
    sde, network = make(kind)
    loss_fn = losses.get_sde_loss_fn(sde, False, likelihood_weighting=likelihood_weighting)
    x, u, z = normals(*shape), torch.linspace(0, 0.99, 6), normals(*shape, seed=1)
    results = []
    for view in (identity, as_images):
        with noise.replay([u, view(z)]):
            results.append(loss_fn(network, view(x)))
    assert torch.equal(*results)


@every_shape
@pytest.mark.parametrize("kind", ["vp", "ve"])
def test_any_shape_discrete_loss(kind: str, shape: tuple[int, ...]) -> None:
    sde, network = make(kind)
    loss_fn = (losses.get_ddpm_loss_fn if kind == "vp" else losses.get_smld_loss_fn)(sde, False)
    results = []
    for view in (identity, as_images):
        with noise.replay([torch.arange(6), view(normals(*shape, seed=1))]):
            results.append(loss_fn(network, view(normals(*shape))))
    assert torch.equal(*results)


STEPPERS = [
    ("euler_maruyama", "langevin"),
    ("reverse_diffusion", "ald"),
    ("ancestral_sampling", "none"),  # not for sub-VP
    ("none", "ald"),
]


@every_shape
@pytest.mark.parametrize(
    ("kind", "predictor", "corrector"),
    [(kind, *pair) for kind in SDES for pair in STEPPERS if (kind, pair[0]) != ("subvp", "ancestral_sampling")],
)
def test_any_shape_pc_sampler(kind: str, shape: tuple[int, ...], predictor: str, corrector: str) -> None:
    sde, network = make(kind)
    draws = normals(1 + N * ((predictor != "none") + (corrector != "none")), *shape)
    results = []
    for view in (identity, as_images):
        sampler = pc_sampler(sde, view(draws[0]).shape, predictor, corrector)
        with noise.replay([view(z) for z in draws]):
            results.append(sampler(network)[0])
    assert_exact(*results, shape)


@every_kind
@every_shape
def test_any_shape_ode_sampler(kind: str, shape: tuple[int, ...]) -> None:
    sde, network = make(kind)
    results = []
    for view in (identity, as_images):
        z = view(normals(*shape))
        sampler = sampling.get_ode_sampler(sde, z.shape, identity, denoise=True, device="cpu")
        with noise.replay([z]):
            results.append(sampler(network, z))
    (x, nfe), (images, image_nfe) = results
    assert_exact(x, images, shape)
    assert nfe == image_nfe


@every_kind
@every_shape
@pytest.mark.parametrize("hutchinson_type", ["Rademacher", "Gaussian"])
def test_any_shape_likelihood(kind: str, shape: tuple[int, ...], hutchinson_type: str) -> None:
    sde, network = make(kind)
    likelihood_fn = likelihood.get_likelihood_fn(sde, identity, hutchinson_type=hutchinson_type)
    epsilon = normals(*shape, seed=1)
    epsilon = epsilon if hutchinson_type == "Gaussian" else (epsilon > 0).long()
    results = []
    for view in (identity, as_images):
        with noise.replay([view(epsilon)]):
            results.append(likelihood_fn(network, view(normals(*shape))))
    (bpd, z, nfe), (image_bpd, image_z, image_nfe) = results
    assert torch.equal(bpd, image_bpd)
    assert_exact(z, image_z, shape)
    assert nfe == image_nfe


@every_kind
@every_shape
def test_any_shape_inpainting(kind: str, shape: tuple[int, ...]) -> None:
    sde, network = make(kind)
    inpaint = controllable_generation.get_pc_inpainter(
        sde, sampling.ReverseDiffusionPredictor, sampling.AnnealedLangevinDynamics, identity, 0.16, continuous=True
    )
    draws, mask = normals(1 + 4 * N, *shape), (normals(*shape, seed=1) > 0).float()
    results = []
    for view in (identity, as_images):
        with noise.replay([view(z) for z in draws]):
            results.append(inpaint(network, view(normals(*shape, seed=2)), view(mask)))
    assert_exact(*results, shape)


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_marginal_std_is_exact() -> None:
    """Upstream's sqrt(1 - exp(2 l)) is off by 1 % at t = 1e-5, in float32 and where a loss likes it least."""
    t = torch.cat([torch.logspace(-5, 0, 101), torch.zeros(1)])
    wide = t.double()
    log_m = -0.25 * wide**2 * 19.9 - 0.5 * wide * 0.1
    for sde, exact in (
        (sde_lib.VPSDE(), (-torch.expm1(2 * log_m)).sqrt()),
        (sde_lib.subVPSDE(), -torch.expm1(2 * log_m)),
        (sde_lib.VESDE(0.01, 348, 1000), 0.01 * 34800**wide),  # the published church model's sigma_max
    ):
        _, std = sde.marginal_prob(torch.zeros(102, 3), t)
        assert_rounding(std, exact.float(), 8)


def test_subvp_diffusion_is_exact() -> None:
    t = torch.cat([torch.logspace(-5, 0, 101), torch.zeros(1)])
    wide = t.double()
    exact = ((0.1 + 19.9 * wide) * -torch.expm1(-2 * (0.1 * wide + 0.5 * 19.9 * wide**2))).sqrt()
    _, diffusion = sde_lib.subVPSDE().sde(torch.zeros(102, 3), t)
    assert_rounding(diffusion, exact.float(), 8)


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_subvp_correctors(corrector: str) -> None:
    """They crash in upstream for want of a table of alphas."""
    sde, network = make("subvp")
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    x, z, t = normals(4, 3, 2, 2), normals(4, 3, 2, 2, seed=1), torch.tensor([0.001, 0.4, 0.8, 1.0])
    with noise.replay([z]):
        x_new, x_mean = sampling.get_corrector(corrector)(sde, score_fn, 0.16, 1).update_fn(x, t)

    score = score_fn(x, t)
    alpha = sde_lib.VPSDE(0.1, 5.0, N).alphas[(t * (N - 1)).long()]
    size = {
        "ald": sde.marginal_prob(x, t)[1],
        "langevin": z.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean(),
    }[corrector]
    step = per_sample(2 * alpha * (0.16 * size) ** 2, x)
    assert_rounding(x_mean, x + step * score, 16)
    assert_rounding(x_new, x + step * score + (2 * step).sqrt() * z, 16)

    samples, nfe = pc_sampler(sde, (4, 3, 2, 2), "euler_maruyama", corrector)(network)
    assert torch.isfinite(samples).all()
    assert nfe == 2 * N


@every_kind
def test_euler_maruyama_with_probability_flow(kind: str) -> None:
    """Upstream indexes the diffusion 0., a float."""
    sde, network = make(kind)
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    x, t = normals(4, 5), torch.tensor([0.001, 0.4, 0.8, 1.0])
    drift, _ = sde.reverse(score_fn, probability_flow=True).sde(x, t)
    with noise.replay([normals(4, 5, seed=1)]):  # drawn, and without effect
        x_new, x_mean = sampling.EulerMaruyamaPredictor(sde, score_fn, probability_flow=True).update_fn(x, t)
    assert torch.equal(x_new, x_mean)
    assert_rounding(x_mean, x - drift / N, 16, scale=torch.maximum(x.abs(), drift.abs() / N).amax(1))


@every_kind
def test_tables_follow_the_device_of_t(kind: str) -> None:
    """Upstream indexes CPU tables with device indices.  "meta" stands for any device that is not the CPU."""
    sde, _ = make(kind)
    f, G = sde.discretize(torch.zeros(4, 3, device="meta"), torch.zeros(4, device="meta"))
    assert f.device.type == G.device.type == "meta"


@pytest.mark.parametrize("corrector", ["langevin", "ald", "none"])
def test_no_corrector_steps(corrector: str) -> None:
    """Upstream returns an x_mean it never assigned."""
    sde, network = make("ve")
    x, t = normals(4, 5), torch.ones(4)
    x_new, x_mean = sampling.get_corrector(corrector)(sde, network, 0.16, 0).update_fn(x, t)
    assert torch.equal(x_new, x)
    assert torch.equal(x_mean, x)
    samples, nfe = pc_sampler(sde, (4, 5), "reverse_diffusion", corrector, n_steps=0)(network)
    assert torch.isfinite(samples).all()
    assert nfe == N


@every_kind
def test_shared_update_functions(kind: str) -> None:
    sde, network = make(kind)
    x, t, z = normals(4, 5), torch.tensor([0.001, 0.4, 0.8, 1.0]), normals(4, 5, seed=1)
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    with noise.replay([z] * 4):
        predicted = sampling.shared_predictor_update_fn(
            x, t, sde, network, sampling.ReverseDiffusionPredictor, probability_flow=False, continuous=True
        )
        corrected = sampling.shared_corrector_update_fn(
            x, t, sde, network, sampling.LangevinCorrector, continuous=True, snr=0.16, n_steps=1
        )
        wanted = sampling.ReverseDiffusionPredictor(sde, score_fn).update_fn(x, t)
        wanted += sampling.LangevinCorrector(sde, score_fn, 0.16, 1).update_fn(x, t)
    for actual, target in zip(predicted + corrected, wanted, strict=True):
        assert torch.equal(actual, target)
    for nothing in (
        sampling.shared_predictor_update_fn(x, t, sde, network, None, False, True),
        sampling.shared_corrector_update_fn(x, t, sde, network, None, True, 0.16, 1),
    ):
        assert torch.equal(nothing[0], x)
        assert torch.equal(nothing[1], x)


def test_divergence_of_a_linear_map() -> None:
    matrix, eps = normals(6, 6), normals(4, 3, 2, seed=1)
    div = likelihood.get_div_fn(lambda x, t: (x.flatten(1) @ matrix).reshape(x.shape))
    value = div(normals(4, 3, 2, seed=2), torch.ones(4), eps)
    torch.testing.assert_close(value, torch.einsum("bi,ij,bj->b", eps.flatten(1), matrix, eps.flatten(1)))


@every_kind
def test_divergence_of_the_flow(kind: str) -> None:
    """Drifts are differentiable in x, and their divergence is the trace of a known matrix."""
    sde, network = make(kind)
    x, t, eps = normals(4, 5), torch.tensor([0.01, 0.4, 0.8, 1.0]), (normals(4, 5, seed=1) > 0) * 2.0 - 1
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    flow = sde.reverse(score_fn, probability_flow=True)
    value = likelihood.get_div_fn(lambda x, t: flow.sde(x, t)[0])(x, t, eps)

    ones = torch.ones(4, 5)
    slope = score_fn(x + ones, t) - score_fn(x, t)  # the score is linear and diagonal
    drift_slope = sde.sde(ones, t)[0] - 0.5 * per_sample(sde.sde(x, t)[1] ** 2, x) * slope
    torch.testing.assert_close(value, drift_slope.sum(1), rtol=1e-4, atol=1e-4)


@every_kind
def test_any_strides(kind: str) -> None:
    """Channels-last images and transposed views give what their contiguous copies give."""
    sde, network = make(kind)
    t, u = torch.tensor([0.001, 0.4, 0.8, 1.0]), torch.tensor([0.0, 0.3, 0.6, 0.9])
    loose = {"rtol": 1e-3, "atol": 1e-3}
    image = normals(4, 3, 2, 5).to(memory_format=torch.channels_last)
    view = normals(5, 2, 3, 4, seed=1).permute(3, 2, 1, 0)
    loss_fn = losses.get_sde_loss_fn(sde, False)
    score_fn = mutils.get_score_fn(sde, network, continuous=True)
    inpaint = controllable_generation.get_pc_inpainter(
        sde, sampling.ReverseDiffusionPredictor, None, identity, 0.16, continuous=True
    )
    for x in (image, view):
        assert not x.is_contiguous()
        results = []
        for y in (x, x.contiguous()):
            with noise.replay([view, view, u, view, (view > 0).long(), *[view] * (1 + 3 * N)]):
                results.append(
                    [
                        *sampling.EulerMaruyamaPredictor(sde, score_fn).update_fn(y, t),
                        *sampling.LangevinCorrector(sde, score_fn, 0.16, 1).update_fn(y, t),
                        loss_fn(network, y),
                        *likelihood.get_likelihood_fn(sde, identity, **loose)(network, y)[:2],
                        inpaint(network, y, (y > 0).float()),
                        sampling.get_ode_sampler(sde, y.shape, identity, device="cpu", **loose)(network, y)[0],
                    ]
                )
        for strided, contiguous in zip(*results, strict=True):
            torch.testing.assert_close(strided, contiguous, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_batch(kind: str, dtype: torch.dtype) -> None:
    """The batch keeps its dtype up to the network; the loss is summed in float32."""
    sde, network = make(kind)
    seen: set[torch.dtype] = set()

    def model(x: Tensor, labels: Tensor) -> Tensor:
        seen.update((x.dtype, labels.dtype))
        return network(x.float(), labels.float()).to(x.dtype)

    x, z, u = normals(64, 30), normals(64, 30, seed=1), torch.linspace(0.2, 0.9, 64)
    results = []
    for batch in (x, x.to(dtype)):
        with noise.replay([u, z]):
            results.append(losses.get_sde_loss_fn(sde, False, likelihood_weighting=False)(model, batch))
    assert results[1].dtype == torch.float32
    # x, the network's output and z are rounded to 8 bits each (bfloat16); 2000 of their errors average out
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=0)
    assert seen == {torch.float32, dtype}


def test_optimize_fn() -> None:
    config = SimpleNamespace(
        optim=SimpleNamespace(
            optimizer="Adam", lr=0.1, beta1=0.5, eps=1e-7, weight_decay=0.25, warmup=0, grad_clip=-1.0
        )
    )
    weight = nn.Parameter(torch.zeros(2))
    optimizer = losses.get_optimizer(config, [weight])
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.5, 0.999), 1e-7, 0.25)
    optimize_fn = losses.optimization_manager(config)
    assert list(inspect.signature(optimize_fn).parameters) == [
        "optimizer",
        "params",
        "step",
        "lr",
        "warmup",
        "grad_clip",
    ]

    weight.grad = torch.tensor([3.0, 4.0])
    optimize_fn(optimizer, [weight], step=0)
    assert group["lr"] == 0.1  # no warm-up
    assert torch.equal(weight.grad, torch.tensor([3.0, 4.0]))  # no clipping
    optimize_fn(optimizer, [weight], step=7, lr=0.2, warmup=10, grad_clip=0.5)
    assert group["lr"] == pytest.approx(0.14)
    torch.testing.assert_close(weight.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("method", ["RK45", "RK23", "DOP853", "rk4"])
def test_function_that_reuses_its_output(method: str) -> None:
    """A network with static outputs writes every result into one buffer: slopes have to be copied, as scipy does."""
    buffer, y = torch.empty(4, 3), normals(4, 3)
    steps = 20 if method == "rk4" else None
    solution = integrate.solve(lambda t, y: torch.neg(y, out=buffer), (0.0, 1.0), y, method, steps=steps)
    torch.testing.assert_close(solution.y, y * np.exp(-1), rtol=1e-4, atol=1e-5)


# --- NaN --------------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Returns NaN for one sample once t falls below (or rises above, `upward`) a half."""

    def __init__(self, upward: bool, from_the_start: bool) -> None:
        super().__init__()
        self.upward, self.from_the_start = upward, from_the_start

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        t = labels / 999
        broken = torch.ones_like(t, dtype=torch.bool) if self.from_the_start else (t > 0.5 if self.upward else t < 0.5)
        only_second = torch.arange(len(x)) == 1
        return torch.where(per_sample(broken & only_second, x), torch.nan, 0.5 * x)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("from_the_start", [False, True])
@pytest.mark.parametrize("method", ["RK45", "RK23"])
def test_nan_in_ode_sampler_raises(from_the_start: bool, method: str) -> None:
    """Upstream's solver never ends, or ends half-way with a sample that looks like one."""
    sampler = sampling.get_ode_sampler(sde_lib.VPSDE(), (4, 5), identity, method=method, device="cpu")
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)nan|finite"):
        sampler(Broken(upward=False, from_the_start=from_the_start), normals(4, 5))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("from_the_start", [False, True])
def test_nan_in_likelihood_raises(from_the_start: bool) -> None:
    likelihood_fn = likelihood.get_likelihood_fn(sde_lib.VPSDE(), identity)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)nan|finite"):
        likelihood_fn(Broken(upward=True, from_the_start=from_the_start), normals(4, 5))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def trained_state(steps: int = 3) -> dict[str, Any]:
    config = SimpleNamespace(
        optim=SimpleNamespace(
            optimizer="Adam", lr=2e-3, beta1=0.9, eps=1e-8, weight_decay=0.0, warmup=5000, grad_clip=1.0
        )
    )
    torch.manual_seed(0)
    model = TinyTrainNet()
    optimizer = losses.get_optimizer(config, model.parameters())
    ema = ExponentialMovingAverage(model.parameters(), decay=0.99)
    state = {"model": model, "optimizer": optimizer, "ema": ema, "step": 0}
    step_fn = losses.get_step_fn(sde_lib.VPSDE(), True, losses.optimization_manager(config))
    for _ in range(steps):
        step_fn(state, normals(2, 3, 4, 4))
    return state


def contents(state: dict[str, Any]) -> dict[str, Any]:
    """Everything of a training state that a checkpoint must bring back."""
    return {key: value if key == "step" else value.state_dict() for key, value in state.items()}


def assert_same_state(restored: dict[str, Any], saved: dict[str, Any]) -> None:
    torch.testing.assert_close(contents(restored), contents(saved), rtol=0, atol=0)


def test_optimizer_state_holds_python_floats() -> None:
    for group in trained_state()["optimizer"].param_groups:
        assert type(group["lr"]) is float
        assert group["lr"] == 2e-3 * (2 / 5000)  # warm-up, at the third step


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    saved = trained_state()
    utils.save_checkpoint(tmp_path / "checkpoint.pth", saved)
    loaded = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert set(loaded) == {"optimizer", "model", "ema", "step"}
    assert set(loaded["ema"]) == {"decay", "num_updates", "shadow_params"}
    restored = utils.restore_checkpoint(tmp_path / "checkpoint.pth", trained_state(0), torch.device("cpu"))
    assert restored["step"] == 3
    assert_same_state(restored, saved)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_upstreams_checkpoints_load(tmp_path: Path, prefix: str) -> None:
    """Upstream's file: a numpy float for lr, weights of a DataParallel or a plain network."""
    saved = trained_state()
    file = copy.deepcopy(contents(saved))
    file["model"] = {prefix + key: value for key, value in file["model"].items()}
    file["optimizer"]["param_groups"][0]["lr"] = np.float64(file["optimizer"]["param_groups"][0]["lr"])
    torch.save(file, tmp_path / "checkpoint.pth")
    restored = utils.restore_checkpoint(tmp_path / "checkpoint.pth", trained_state(0), "cpu")
    assert_same_state(restored, saved)
    assert type(restored["optimizer"].param_groups[0]["lr"]) is float

    wrapped = trained_state(0)
    wrapped["model"] = nn.DataParallel(wrapped["model"])
    restored = utils.restore_checkpoint(tmp_path / "checkpoint.pth", wrapped, "cpu")
    torch.testing.assert_close(dict(restored["model"].module.state_dict()), dict(saved["model"].state_dict()))


class Payload:
    """Unpickling this would call a function of the file's choice."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.mkdir, (Path("unpickled"),)


def test_checkpoints_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(contents(trained_state(0)) | {"step": Payload()}, "checkpoint.pth")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|untrusted"):
        utils.restore_checkpoint("checkpoint.pth", trained_state(0), "cpu")
    assert not Path("unpickled").exists()


# --- models, evaluations, modes ---------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts forward passes and switches of mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.calls = self.switches = 0
        self.network = network

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x, labels)

    def train(self, mode: bool = True) -> "Counting":
        self.switches += 1
        return super().train(mode)


@every_kind
def test_one_forward_an_evaluation(kind: str) -> None:
    """Upstream's likelihood runs the network twice: for the drift, and again for its divergence."""
    sde, network = make(kind)
    model = Counting(network)
    *_, nfe = likelihood.get_likelihood_fn(sde, identity)(model, normals(4, 5))
    assert model.calls == nfe
    model = Counting(network)
    _, nfe = sampling.get_ode_sampler(sde, (4, 5), identity, denoise=True, device="cpu")(model)
    assert model.calls == nfe + 1  # the denoising step is not counted


RUNS = {
    "pc": lambda sde, model: pc_sampler(sde, (4, 5), "reverse_diffusion", "langevin")(model),
    "ode": lambda sde, model: sampling.get_ode_sampler(sde, (4, 5), identity, denoise=True, device="cpu")(model),
    "likelihood": lambda sde, model: likelihood.get_likelihood_fn(sde, identity)(model, normals(4, 5)),
    "inpaint": lambda sde, model: controllable_generation.get_pc_inpainter(
        sde, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, 0.16, continuous=True
    )(model, normals(4, 5), torch.ones(4, 5)),
    "colorize": lambda sde, model: controllable_generation.get_pc_colorizer(
        sde, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, 0.16, continuous=True
    )(model, normals(4, 3, 2, 2)),
    "loss": lambda sde, model: losses.get_sde_loss_fn(sde, train=False)(model, normals(4, 5)),
}
every_run = pytest.mark.parametrize("run", RUNS)


@every_run
@every_kind
def test_plain_function_as_model(kind: str, run: str) -> None:
    sde, network = make(kind)
    torch.manual_seed(0)
    of_module = RUNS[run](sde, network)
    torch.manual_seed(0)
    of_function = RUNS[run](sde, lambda x, labels: network(x, labels))
    torch.testing.assert_close(of_function, of_module, rtol=0, atol=0)


@every_run
def test_mode_is_switched_once_a_run(run: str) -> None:
    """model.eval() walks the whole network; upstream calls it at every evaluation."""
    sde, network = make("vp")
    model = Counting(network).train()
    model.switches = 0
    RUNS[run](sde, model)
    assert model.switches == 1
    assert not model.training


@pytest.mark.parametrize("train", [False, True])
def test_mode_is_switched_once_a_step(train: bool) -> None:
    state = trained_state(0)
    model = Counting(state["model"])
    model.train(not train)
    model.switches = 0
    step_fn = losses.get_step_fn(sde_lib.VPSDE(), train, optimize_fn=lambda *args, **kwargs: None)
    step_fn(state | {"model": model}, normals(2, 3, 4, 4))
    assert model.switches == 1
    assert model.training == train


@every_run
def test_no_classes_are_made_in_a_loop(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream defines a class at every predictor step."""
    sde, network = make("vp")
    RUNS[run](sde, network)  # whatever is imported or compiled at first use
    made: list[str] = []
    build_class = builtins.__build_class__

    def counting_build_class(body: Any, name: str, *bases: Any, **options: Any) -> type:
        made.append(name)
        return build_class(body, name, *bases, **options)

    monkeypatch.setattr(builtins, "__build_class__", counting_build_class)
    RUNS[run](sde, network)
    assert made == []


def test_grad_is_off_in_samplers_and_on_after_them() -> None:
    sde, network = make("vp")
    scale = nn.Parameter(torch.ones(()))
    for run in ("pc", "ode", "inpaint"):
        seen: list[bool] = []

        def model(x: Tensor, labels: Tensor, seen: list[bool] = seen) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return scale * network(x, labels)

        result = RUNS[run](sde, model)
        assert not any(seen)
        assert torch.is_grad_enabled()
        assert not (result[0] if isinstance(result, tuple) else result).requires_grad
    bpd, z, _ = RUNS["likelihood"](sde, lambda x, labels: scale * network(x, labels))
    assert not bpd.requires_grad
    assert not z.requires_grad


# --- options ----------------------------------------------------------------------------------------------------------


def sampling_config(**options: Any) -> SimpleNamespace:
    of_sampling = {
        "method": "pc", "predictor": "Reverse_Diffusion", "corrector": "Langevin", "snr": 0.16, "n_steps_each": 2,
        "probability_flow": False, "noise_removal": True,
    }  # fmt: skip
    return SimpleNamespace(
        sampling=SimpleNamespace(**(of_sampling | options)),
        training=SimpleNamespace(continuous=True),
        device=torch.device("cpu"),
    )


def test_sampling_fn_reads_its_config() -> None:
    sde, network = make("vp")
    torch.manual_seed(0)
    samples, nfe = sampling.get_sampling_fn(sampling_config(), sde, (4, 5), identity, 1e-3)(network)
    torch.manual_seed(0)
    wanted, wanted_nfe = pc_sampler(sde, (4, 5), "reverse_diffusion", "langevin", n_steps=2)(network)
    assert torch.equal(samples, wanted)
    assert nfe == wanted_nfe == 3 * N

    torch.manual_seed(0)
    config = sampling_config(method="ODE", noise_removal=False)
    samples, nfe = sampling.get_sampling_fn(config, sde, (4, 5), identity, 1e-4)(network)
    torch.manual_seed(0)
    wanted, wanted_nfe = sampling.get_ode_sampler(sde, (4, 5), identity, eps=1e-4, device="cpu")(network)
    assert torch.equal(samples, wanted)
    assert nfe == wanted_nfe

    with pytest.raises(ValueError, match="other"):
        sampling.get_sampling_fn(sampling_config(method="other"), sde, (4, 5), identity, 1e-3)


def test_step_fn_refuses_what_upstream_refuses() -> None:
    with pytest.raises(ValueError, match="subVPSDE"):
        losses.get_step_fn(sde_lib.subVPSDE(), True, continuous=False)
    with pytest.raises(AssertionError, match=r"[Ll]ikelihood"):
        losses.get_step_fn(sde_lib.VPSDE(), True, continuous=False, likelihood_weighting=True)
    with pytest.raises(NotImplementedError, match="SGD"):
        losses.get_optimizer(SimpleNamespace(optim=SimpleNamespace(optimizer="SGD")), [])


@pytest.mark.parametrize(("kind", "discrete"), [("vp", losses.get_ddpm_loss_fn), ("ve", losses.get_smld_loss_fn)])
def test_discrete_step_fn(kind: str, discrete: Callable[..., Any]) -> None:
    sde, _ = make(kind)
    state, batch = trained_state(0), normals(2, 3, 4, 4)
    draws = [torch.tensor([1, 5]), normals(2, 3, 4, 4, seed=1)]
    with noise.replay(draws):
        loss = losses.get_step_fn(sde, False, reduce_mean=True, continuous=False)(state, batch)
    with noise.replay(draws):
        wanted = discrete(sde, False, reduce_mean=True)(state["model"], batch)
    assert torch.equal(loss, wanted.detach())


def test_ema() -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2), requires_grad=False)]
    average, constant = (ExponentialMovingAverage(weights, 0.9, use_num_updates=flag) for flag in (True, False))
    with torch.no_grad():
        weights[0].fill_(1.0)
    average.update(weights)
    constant.update(weights)
    torch.testing.assert_close(average.shadow_params[0], torch.full((3,), 9 / 11))  # decay min(0.9, 2 / 11)
    torch.testing.assert_close(constant.shadow_params[0], torch.full((3,), 0.1))
    assert len(average.shadow_params) == 1  # what does not train is not averaged

    average.store(weights)
    average.copy_to(weights)
    torch.testing.assert_close(weights[0].detach(), torch.full((3,), 9 / 11))
    average.restore(weights)
    assert torch.equal(weights[0].detach(), torch.ones(3))

    constant.load_state_dict(average.state_dict())
    assert constant.state_dict().keys() == {"decay", "num_updates", "shadow_params"}
    assert constant.num_updates == 1
    assert torch.equal(constant.shadow_params[0], average.shadow_params[0])


@pytest.mark.parametrize("method", ["LSODA", RK45, DOP853], ids=["name", "class RK45", "class DOP853"])
def test_scipys_own_methods_still_work(method: Any) -> None:
    """What only scipy has runs through scipy: the slow path, and it says so."""
    sde, network = make("vp")
    z = normals(4, 5)
    wanted, _ = sampling.get_ode_sampler(sde, (4, 5), identity, device="cpu")(network, z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples, nfe = sampling.get_ode_sampler(sde, (4, 5), identity, method=method, device="cpu")(network, z)
    torch.testing.assert_close(samples, wanted, rtol=1e-3, atol=1e-3)
    assert samples.dtype == torch.float32
    assert nfe > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_keeps_the_dtype_of_z_and_data(dtype: torch.dtype) -> None:
    sde, network = make("vp")
    z = normals(4, 5).to(dtype)
    seen: set[torch.dtype] = set()

    class Typed(nn.Module):
        """A network with float32 parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            seen.update((x.dtype, labels.dtype))
            return self.scale * network(x, labels)

    x, _ = sampling.get_ode_sampler(sde, (4, 5), identity, device="cpu")(Typed(), z)
    bpd, code, _ = likelihood.get_likelihood_fn(sde, identity)(Typed(), z)
    assert x.dtype == code.dtype == dtype
    assert seen == {torch.float32}
    assert torch.isfinite(bpd).all()


def test_float64_solves_are_finer() -> None:
    """In float64, and with a network in float64, the solver reaches tolerances that float32 cannot represent."""
    sde, network = make("vp", mu=0.0, s=1.0)  # the flow of N(0, 1) data is the identity
    z = normals(4, 5).double()
    x, _ = sampling.get_ode_sampler(sde, (4, 5), identity, rtol=1e-10, atol=1e-10, device="cpu")(network.double(), z)
    assert (x - z).abs().max() < 1e-8 < EPS32
