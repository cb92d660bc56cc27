"""Numbers as arguments: numpy's, and tensors without axes, mean what Python's do; what is no number is refused."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from scoresde_ext import (
    controllable_generation,
    encoding,
    integrate,
    likelihood,
    losses,
    noise,
    ops,
    predictors,
    sampling,
    sde_lib,
    stochastic,
)
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.models import utils as mutils
from scoresde_ext.models.ema import ExponentialMovingAverage

VP, VE = sde_lib.VPSDE(0.1, 2.0, 4), sde_lib.VESDE(N=4)
X = torch.linspace(-1.0, 1.0, 6).reshape(2, 3)
T = torch.full((2,), 0.5)
IMAGES = torch.linspace(-1.0, 1.0, 24).reshape(2, 3, 2, 2)


def network(x: Tensor, labels: Tensor) -> Tensor:
    return torch.tanh(x)


def score(x: Tensor, t: Tensor) -> Tensor:
    return -torch.tanh(x)


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


# --- every numeric argument -------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An argument, a number for it, and a call that takes one."""

    argument: str
    plain: Any
    call: Callable[[Any], Any]


def ode(shape: Any = (2, 3), **options: Any) -> Any:
    options = {"rtol": 1e-2, "atol": 1e-2, "seeds": 0, "device": "cpu"} | options
    return sampling.get_ode_sampler(VP, shape, None, **options)(network)


def unipc(**options: Any) -> Any:
    return ode(method="unipc", **options)


def stream(slots: Any) -> Any:
    sampler = sampling.get_ode_sampler(
        VP, (4, 3), None, rtol=1e-2, atol=1e-2, control="per_sample", seeds=0, device="cpu"
    )
    return [group.y for group in sampler.stream(network, slots)]


def sde_stream(slots: Any) -> Any:
    sampler = stochastic.get_sde_sampler(VP, (4, 3), None, method="adaptive", rtol=0.5, atol=0.5, seeds=0, device="cpu")
    return [group.y for group in sampler.stream(network, slots)]


def pc(shape: Any = (2, 3), snr: Any = 0.1, **options: Any) -> Any:
    options = {"continuous": True, "seeds": 0, "device": "cpu"} | options
    return sampling.get_pc_sampler(
        VP, shape, sampling.EulerMaruyamaPredictor, sampling.AnnealedLangevinDynamics, None, snr, **options
    )(network)


def configured(shape: Any = (2, 3), eps: Any = 1e-3, **options: Any) -> Any:
    options = {"snr": 0.1, "n_steps_each": 1} | options
    config = SimpleNamespace(
        sampling=SimpleNamespace(
            method="pc", predictor="euler_maruyama", corrector="ald", probability_flow=False, noise_removal=True,
            **options,
        ),
        training=SimpleNamespace(continuous=True),
        device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    return sampling.get_sampling_fn(config, VP, shape, None, eps)(network)


def inpaint(snr: Any = 0.1, **options: Any) -> Any:
    options = {"continuous": True, "seeds": 0} | options
    fill = controllable_generation.get_pc_inpainter(
        VP, sampling.EulerMaruyamaPredictor, sampling.AnnealedLangevinDynamics, None, snr, **options
    )
    return fill(network, X, torch.tensor([1.0, 0.0, 0.0]))


def colorize(snr: Any = 0.1, **options: Any) -> Any:
    options = {"continuous": True, "seeds": 0} | options
    fill = controllable_generation.get_pc_colorizer(
        VP, sampling.EulerMaruyamaPredictor, sampling.AnnealedLangevinDynamics, None, snr, **options
    )
    return fill(network, IMAGES)


def reverse_sde(shape: Any = (2, 3), **options: Any) -> Any:
    return stochastic.get_sde_sampler(VP, shape, None, **({"steps": 3, "seeds": 0, "device": "cpu"} | options))(network)


def adaptive_sde(**options: Any) -> Any:
    return reverse_sde(method="adaptive", steps=None, **({"rtol": 0.5, "atol": 0.5} | options))


def bits(**options: Any) -> Any:
    return likelihood.get_likelihood_fn(VP, None, **({"rtol": 1e-2, "atol": 1e-2, "seeds": 0} | options))(network, X)


def encoded(**options: Any) -> Any:
    return encoding.encode(VP, network, X, **({"rtol": 1e-2, "atol": 1e-2} | options))


def decoded(**options: Any) -> Any:
    return encoding.decode(VP, network, X, **({"rtol": 1e-2, "atol": 1e-2} | options))


def between(weights: Any = 2, **options: Any) -> Any:
    return encoding.interpolate(VP, network, X, -X, weights, **({"rtol": 1e-2, "atol": 1e-2} | options))


def solved(t_span: Any = (0.0, 1.0), method: str = "RK45", **options: Any) -> Any:
    return integrate.solve(decay, t_span, X, method, **({"rtol": 1e-2, "atol": 1e-2} | options))


def solved_by_unipc(**options: Any) -> Any:
    flow = ProbabilityFlow(VP, mutils.get_score_fn(VP, network, continuous=True))
    return integrate.solve(flow, (1.0, 0.1), X, "unipc", **({"rtol": 1e-2, "atol": 1e-2} | options))


def streamed(t_span: Any = (0.0, 1.0), count: Any = 3, slots: Any = 2, **options: Any) -> Any:
    def source(first: int, stop: int) -> Tensor:
        return torch.arange(1.0 + first, 1.0 + stop)[:, None]

    return [group.y for group in integrate.stream(decay, t_span, source, count, slots, **options)]


def calibrated(shape: Any = (2, 2), **options: Any) -> Any:
    options = {"nfe": 2, "samples": 2, "device": "cpu"} | options
    return sampling.calibrate_grid(VP, network, shape, **options)


def optimizer_of(**options: Any) -> Any:
    optim = {"optimizer": "Adam", "lr": 0.5, "beta1": 0.5, "eps": 0.5, "weight_decay": 0.5} | options
    config = SimpleNamespace(optim=SimpleNamespace(**optim))
    (group,) = losses.get_optimizer(config, [torch.nn.Parameter(X.clone())]).param_groups
    return [group[name] for name in ("lr", "betas", "eps", "weight_decay")]


def optimized(step: Any = 1, **options: Any) -> Any:
    config = SimpleNamespace(optim=SimpleNamespace(lr=0.5, warmup=0, grad_clip=-1.0))
    weight = torch.nn.Parameter(X.clone())
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    losses.optimization_manager(config)(optimizer, [weight], step, **options)
    return weight.detach(), optimizer.param_groups[0]["lr"]


def loss(**options: Any) -> Any:
    with noise.seeds(0, range(2)):
        return losses.get_sde_loss_fn(VP, True, **options)(network, X)


def averaged(value: Any) -> Any:
    weight = torch.nn.Parameter(X.clone())
    ema = ExponentialMovingAverage([weight], value, use_num_updates=False)
    ema.update([torch.nn.Parameter(torch.zeros_like(X))])
    return ema.shadow_params, ema.state_dict()["decay"]


def table_of(sde: Any) -> Any:
    t = torch.tensor([0.25, 1.0])
    return sde.N, sde.marginal_prob(X, t), sde.sde(X, t), sde.discretize(X, t), sde.reverse(score).discretize(X, t)


def drawn(seed: Any = 3, ids: Any = (0, 1)) -> Any:
    with noise.seeds(seed, ids):
        return noise.normal_tensor(X), noise.integers(5, X), noise.uniform(X)


def corrected(name: str, snr: Any = 0.1, n_steps: Any = 2) -> Any:
    with noise.seeds(0, range(2)):
        return predictors.get_corrector(name)(VP, score, snr, n_steps).update_fn(X, T)


def shared_corrector(snr: Any = 0.1, n_steps: Any = 1) -> Any:
    with noise.seeds(0, range(2)):
        return sampling.shared_corrector_update_fn(
            X, T, VP, network, sampling.LangevinCorrector, continuous=True, snr=snr, n_steps=n_steps
        )


def stepped(name: str, sde: Any = VP, t: Any = 0.5, earlier: Any = 0.25) -> Any:
    with noise.seeds(0, range(2)):
        return predictors.get_predictor(name)(sde, score).step_to(X, t, earlier)


GRID = [1.0, 0.5, 0.125]  # of eps = 0.125

CASES = {
    # SDEs
    "VPSDE.beta_min": Case("beta_min", 0.25, lambda v: table_of(sde_lib.VPSDE(beta_min=v))),
    "VPSDE.beta_max": Case("beta_max", 7, lambda v: table_of(sde_lib.VPSDE(beta_max=v))),
    "VPSDE.N": Case("N", 30, lambda v: table_of(sde_lib.VPSDE(N=v))),
    "subVPSDE.beta_min": Case("beta_min", 0.3, lambda v: table_of(sde_lib.subVPSDE(beta_min=v))),
    "subVPSDE.beta_max": Case("beta_max", 7.1, lambda v: table_of(sde_lib.subVPSDE(beta_max=v))),
    "subVPSDE.N": Case("N", 30, lambda v: table_of(sde_lib.subVPSDE(N=v))),
    "VESDE.sigma_min": Case("sigma_min", 0.3, lambda v: table_of(sde_lib.VESDE(sigma_min=v))),
    "VESDE.sigma_max": Case("sigma_max", 7.1, lambda v: table_of(sde_lib.VESDE(sigma_max=v))),
    "VESDE.N": Case("N", 30, lambda v: table_of(sde_lib.VESDE(N=v))),
    "transition.earlier": Case("earlier", 0.3, lambda v: VP.transition(v, 0.5)),
    "transition.later": Case("later", 0.7, lambda v: VP.transition(0.5, v)),
    # losses
    "get_sde_loss_fn.eps": Case("eps", 1e-3, lambda v: loss(eps=v)),
    "get_optimizer.lr": Case("lr", 0.1, lambda v: optimizer_of(lr=v)),
    "get_optimizer.beta1": Case("beta1", 0.9, lambda v: optimizer_of(beta1=v)),
    "get_optimizer.eps": Case("eps", 1e-3, lambda v: optimizer_of(eps=v)),
    "get_optimizer.weight_decay": Case("weight_decay", 0.1, lambda v: optimizer_of(weight_decay=v)),
    "optimize_fn.step": Case("step", 3, lambda v: optimized(step=v, warmup=7)),
    "optimize_fn.lr": Case("lr", 0.1, lambda v: optimized(lr=v, warmup=7)),
    "optimize_fn.warmup": Case("warmup", 7, lambda v: optimized(warmup=v)),
    "optimize_fn.grad_clip": Case("grad_clip", 0.3, lambda v: optimized(grad_clip=v)),
    "ExponentialMovingAverage.decay": Case("decay", 0.9, averaged),
    # noise
    "seeds.seed": Case("seed", 3, lambda v: drawn(seed=v)),
    "seeds.ids": Case("ids", [5, 7], lambda v: drawn(ids=v)),
    # predictors and correctors
    "Corrector.snr": Case("snr", 0.3, lambda v: corrected("ald", snr=v)),
    "Corrector.n_steps": Case("n_steps", 2, lambda v: corrected("langevin", n_steps=v)),
    "euler_maruyama.t": Case("t", 0.7, lambda v: stepped("euler_maruyama", t=v)),
    "euler_maruyama.earlier": Case("earlier", 0.3, lambda v: stepped("euler_maruyama", earlier=v)),
    "reverse_diffusion.t": Case("t", 0.7, lambda v: stepped("reverse_diffusion", t=v)),
    "reverse_diffusion.earlier": Case("earlier", 0.3, lambda v: stepped("reverse_diffusion", earlier=v)),
    "ancestral_sampling.t": Case("t", 0.7, lambda v: stepped("ancestral_sampling", VE, t=v)),
    "ancestral_sampling.earlier": Case("earlier", 0.3, lambda v: stepped("ancestral_sampling", VE, earlier=v)),
    "shared_corrector_update_fn.snr": Case("snr", 0.3, lambda v: shared_corrector(snr=v)),
    "shared_corrector_update_fn.n_steps": Case("n_steps", 2, lambda v: shared_corrector(n_steps=v)),
    # samplers
    "get_pc_sampler.shape": Case("shape", [2, 3], lambda v: pc(v)),
    "get_pc_sampler.snr": Case("snr", 0.3, lambda v: pc(snr=v)),
    "get_pc_sampler.n_steps": Case("n_steps", 2, lambda v: pc(n_steps=v)),
    "get_pc_sampler.eps": Case("eps", 0.01, lambda v: pc(eps=v)),
    "get_pc_sampler.seeds": Case("seeds", 3, lambda v: pc(seeds=v)),
    "get_pc_sampler.grid": Case("grid", GRID, lambda v: pc(grid=v, eps=0.125)),
    "get_sampling_fn.shape": Case("shape", [2, 3], lambda v: configured(v)),
    "get_sampling_fn.eps": Case("eps", 0.01, lambda v: configured(eps=v)),
    "config.sampling.snr": Case("snr", 0.3, lambda v: configured(snr=v)),
    "config.sampling.n_steps_each": Case("n_steps", 2, lambda v: configured(n_steps_each=v)),
    "get_ode_sampler.shape": Case("shape", [2, 3], lambda v: ode(v)),
    "get_ode_sampler.rtol": Case("rtol", 0.03, lambda v: ode(rtol=v)),
    "get_ode_sampler.atol": Case("atol", 0.03, lambda v: ode(atol=v)),
    "get_ode_sampler.eps": Case("eps", 0.01, lambda v: ode(eps=v)),
    "get_ode_sampler.order": Case("order", 2, lambda v: unipc(order=v)),
    "get_ode_sampler.steps": Case("steps", 3, lambda v: unipc(steps=v)),
    "get_ode_sampler.grid": Case("grid", GRID, lambda v: unipc(grid=v, eps=0.125)),
    "get_ode_sampler.seeds": Case("seeds", 3, lambda v: ode(seeds=v)),
    "get_ode_sampler.max_steps": Case("max_steps", 100, lambda v: ode(max_steps=v)),
    "OdeSampler.stream.slots": Case("slots", 2, stream),
    "get_sde_sampler.shape": Case("shape", [2, 3], lambda v: reverse_sde(v)),
    "get_sde_sampler.steps": Case("steps", 4, lambda v: reverse_sde(steps=v)),
    "get_sde_sampler.grid": Case("grid", GRID, lambda v: reverse_sde(steps=None, grid=v, eps=0.125)),
    "get_sde_sampler.order": Case("order", 1, lambda v: reverse_sde(order=v)),
    "get_sde_sampler.rtol": Case("rtol", 0.3, lambda v: adaptive_sde(rtol=v)),
    "get_sde_sampler.atol": Case("atol", 0.3, lambda v: adaptive_sde(atol=v)),
    "get_sde_sampler.max_steps": Case("max_steps", 100, lambda v: adaptive_sde(max_steps=v)),
    "get_sde_sampler.eps": Case("eps", 0.01, lambda v: reverse_sde(eps=v)),
    "get_sde_sampler.seeds": Case("seeds", 3, lambda v: reverse_sde(seeds=v)),
    "SdeSampler.stream.slots": Case("slots", 2, sde_stream),
    "calibrate_grid.shape": Case("shape", [2, 2], lambda v: calibrated(v)),
    "calibrate_grid.nfe": Case("nfe", 3, lambda v: calibrated(nfe=v)),
    "calibrate_grid.order": Case("order", 2, lambda v: calibrated(order=v)),
    "calibrate_grid.eps": Case("eps", 0.01, lambda v: calibrated(eps=v)),
    "calibrate_grid.samples": Case("samples", 3, lambda v: calibrated(samples=v)),
    "calibrate_grid.seed": Case("seed", 3, lambda v: calibrated(seed=v)),
    # controllable generation
    "get_pc_inpainter.snr": Case("snr", 0.3, lambda v: inpaint(snr=v)),
    "get_pc_inpainter.n_steps": Case("n_steps", 2, lambda v: inpaint(n_steps=v)),
    "get_pc_inpainter.eps": Case("eps", 0.01, lambda v: inpaint(eps=v)),
    "get_pc_inpainter.seeds": Case("seeds", 3, lambda v: inpaint(seeds=v)),
    "get_pc_inpainter.grid": Case("grid", GRID, lambda v: inpaint(grid=v, eps=0.125)),
    "get_pc_colorizer.snr": Case("snr", 0.3, lambda v: colorize(snr=v)),
    "get_pc_colorizer.n_steps": Case("n_steps", 2, lambda v: colorize(n_steps=v)),
    "get_pc_colorizer.eps": Case("eps", 0.01, lambda v: colorize(eps=v)),
    "get_pc_colorizer.seeds": Case("seeds", 3, lambda v: colorize(seeds=v)),
    "get_pc_colorizer.grid": Case("grid", GRID, lambda v: colorize(grid=v, eps=0.125)),
    # likelihood and codes
    "get_likelihood_fn.rtol": Case("rtol", 0.03, lambda v: bits(rtol=v)),
    "get_likelihood_fn.atol": Case("atol", 0.03, lambda v: bits(atol=v)),
    "get_likelihood_fn.eps": Case("eps", 0.01, lambda v: bits(eps=v)),
    "get_likelihood_fn.epsilons": Case("epsilons", 2, lambda v: bits(epsilons=v)),
    "get_likelihood_fn.levels": Case("levels", 255.5, lambda v: bits(levels=v)),
    "get_likelihood_fn.max_steps": Case("max_steps", 100, lambda v: bits(max_steps=v)),
    "get_likelihood_fn.seeds": Case("seeds", 3, lambda v: bits(seeds=v)),
    "encode.eps": Case("eps", 0.01, lambda v: encoded(eps=v)),
    "encode.rtol": Case("rtol", 0.03, lambda v: encoded(rtol=v)),
    "encode.atol": Case("atol", 0.03, lambda v: encoded(atol=v)),
    "encode.order": Case("order", 2, lambda v: encoded(order=v, method="unipc")),
    "encode.steps": Case("steps", 3, lambda v: encoded(steps=v, method="rk4")),
    "encode.max_steps": Case("max_steps", 100, lambda v: encoded(max_steps=v)),
    "encode.grid": Case("grid", GRID[::-1], lambda v: encoded(grid=v, method="heun", eps=0.125)),
    "decode.eps": Case("eps", 0.01, lambda v: decoded(eps=v)),
    "decode.rtol": Case("rtol", 0.03, lambda v: decoded(rtol=v)),
    "decode.atol": Case("atol", 0.03, lambda v: decoded(atol=v)),
    "decode.order": Case("order", 2, lambda v: decoded(order=v, method="unipc")),
    "decode.steps": Case("steps", 3, lambda v: decoded(steps=v, method="rk4")),
    "decode.max_steps": Case("max_steps", 100, lambda v: decoded(max_steps=v)),
    "decode.grid": Case("grid", GRID, lambda v: decoded(grid=v, method="heun", eps=0.125)),
    "interpolate.weights": Case("weights", 3, lambda v: between(v)),
    "interpolate.weights (some)": Case("weights", [0.1, 0.7], lambda v: between(v)),
    "interpolate.eps": Case("eps", 0.01, lambda v: between(eps=v)),
    "interpolate.rtol": Case("rtol", 0.03, lambda v: between(rtol=v)),
    "interpolate.atol": Case("atol", 0.03, lambda v: between(atol=v)),
    "interpolate.order": Case("order", 2, lambda v: between(order=v, method="unipc")),
    "interpolate.steps": Case("steps", 3, lambda v: between(steps=v, method="rk4")),
    "interpolate.max_steps": Case("max_steps", 100, lambda v: between(max_steps=v)),
    "slerp.weight": Case("weight", 0.3, lambda v: encoding.slerp(X, X.flip(0), v)),
    # integration
    "solve.t_span": Case("t_span", [0.1, 0.7], lambda v: solved(v)),
    "solve.rtol": Case("rtol", 0.03, lambda v: solved(rtol=v)),
    "solve.atol": Case("atol", 0.03, lambda v: solved(atol=v)),
    "solve.order": Case("order", 2, lambda v: solved_by_unipc(order=v)),
    "solve.steps": Case("steps", 3, lambda v: solved(method="rk4", steps=v)),
    "solve.grid": Case("grid", [0.0, 0.3, 1.0], lambda v: solved(method="rk4", grid=v)),
    "solve.t_eval": Case("t_eval", [0.1, 0.7], lambda v: solved(t_eval=v)),
    "solve.first_step": Case("first_step", 0.3, lambda v: solved(first_step=v)),
    "solve.first_step (unipc)": Case("first_step", 0.3, lambda v: solved_by_unipc(first_step=v)),
    "solve.max_steps": Case("max_steps", 100, lambda v: solved(max_steps=v)),
    "stream.t_span": Case("t_span", [0.1, 0.7], lambda v: streamed(v)),
    "stream.count": Case("count", 4, lambda v: streamed(count=v)),
    "stream.slots": Case("slots", 1, lambda v: streamed(slots=v)),
    "stream.rtol": Case("rtol", 0.03, lambda v: streamed(rtol=v)),
}  # fmt: skip

INTEGERS: list[Callable[[int], Any]] = [
    np.int32, np.int64, np.uint8, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.int32),
]  # fmt: skip
FLOATS: list[Callable[[float], Any]] = [
    np.float16, np.float32, np.float64, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64),
]  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != "graph")
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def forms(plain: Any) -> list[tuple[Any, Any]]:
    """The number, or the numbers, in all forms, each with the same in Python's."""
    if isinstance(plain, int):
        return [(form(plain), plain) for form in INTEGERS]
    if isinstance(plain, float):
        return [(form(plain), float(form(plain))) for form in FLOATS]
    makers = INTEGERS if isinstance(plain[0], int) else FLOATS
    found: list[Any] = [[form(v) for v in plain] for form in makers]
    found += [form(plain) for form in (np.array, torch.tensor, tuple)]
    number = int if isinstance(plain[0], int) else float
    return [(values, [number(v) for v in values]) for values in found]


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_any_kind(name: str) -> None:
    """The result is that of Python's number with the same value."""
    case, known = CASES[name], {}
    for value, python in forms(case.plain):
        if repr(python) not in known:
            known[repr(python)] = case.call(python)
        assert same(case.call(value), known[repr(python)]), f"{value!r} does not count as {python}"


WRONG = [True, np.True_, torch.tensor(True), "1", b"1", math.nan, np.float32("nan"), 1j, [1], np.array([1]), object()]


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_number_is_refused(name: str) -> None:
    case = CASES[name]
    several = isinstance(case.plain, list)
    wrong = [*WRONG, 1.0, 0.5] if isinstance(case.plain[0] if several else case.plain, int) else WRONG
    if case.argument in ("weights", "warmup", "beta_max"):  # one of several kinds of value, or a float in truth
        wrong = [v for v in wrong if not isinstance(v, (list, float, np.ndarray))]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{case.argument}\b"):
            case.call([value, *case.plain[1:]] if several else value)


# What users call with numbers. (Config files: see the cases.)
PUBLIC: dict[str, Callable[..., Any]] = {
    **{name: getattr(sde_lib, name).__init__ for name in ("VPSDE", "subVPSDE", "VESDE")},
    "transition": sde_lib.AffineSDE.transition,
    **{
        name: getattr(losses, name)
        for name in ("get_sde_loss_fn", "get_smld_loss_fn", "get_ddpm_loss_fn", "get_step_fn")
    },
    "ExponentialMovingAverage": ExponentialMovingAverage.__init__,
    "seeds": noise.seeds,
    "Corrector": sampling.Corrector.__init__,
    **{
        name: function
        for name in sampling.__all__
        if inspect.isfunction(function := getattr(sampling, name)) and function.__module__ != mutils.__name__
    },
    "get_sde_sampler": stochastic.get_sde_sampler,
    "get_pc_inpainter": controllable_generation.get_pc_inpainter,
    "get_pc_colorizer": controllable_generation.get_pc_colorizer,
    "get_likelihood_fn": likelihood.get_likelihood_fn,
    **{name: getattr(encoding, name) for name in encoding.__all__},
    "solve": integrate.solve,
    "stream": integrate.stream,
}


def test_no_numeric_argument_is_left_out() -> None:
    numeric = re.compile(r"\b(int|float|Seeds)\b")
    asked = {
        f"{name}.{parameter.name}"
        for name, function in PUBLIC.items()
        for parameter in inspect.signature(function).parameters.values()
        if numeric.search(str(parameter.annotation)) and "Callable" not in str(parameter.annotation)
    }
    assert len(asked) > 70
    assert asked <= CASES.keys()


def test_coefficients_of_operations() -> None:
    """Where the operations take a number, or one a sample."""
    wanted = ops.affine(X, X, 0.1, 0.7)
    for form in (np.float64, np.array, lambda v: torch.tensor(v, dtype=torch.float64)):
        assert torch.equal(ops.affine(X, X, form(0.1), form(0.7)), wanted)
    assert torch.equal(ops.affine(X, None, np.float32(0.1)), ops.affine(X, None, float(np.float32(0.1))))
    with pytest.raises(TypeError, match=r"\bp: expected a number"):
        ops.affine(X, None, "0.1")  # type: ignore[arg-type]


# --- times ------------------------------------------------------------------------------------------------------------


def runge_kutta(grid: Any) -> Any:
    return ode(method="rk4", grid=grid)


def solved_in_angle(grid: Any) -> Any:
    flow = ProbabilityFlow(VP, mutils.get_score_fn(VP, network, continuous=True))
    return integrate.solve(flow, (1.0, 1e-3), X, "heun", coordinate="angle", grid=grid)


TAKES_GRID: dict[str, Callable[[Any], Any]] = {
    "solve": solved_in_angle,
    "get_ode_sampler": lambda grid: unipc(grid=grid),
    "get_ode_sampler, Runge-Kutta": runge_kutta,
    "get_pc_sampler": lambda grid: pc(grid=grid),
    "get_sde_sampler": lambda grid: reverse_sde(steps=None, grid=grid),
    "get_pc_inpainter": lambda grid: inpaint(grid=grid, eps=1e-3),
    "decode": lambda grid: decoded(method="heun", grid=grid),
}


@pytest.mark.parametrize("name", TAKES_GRID)
def test_a_grid_in_float32_has_exact_ends(name: str) -> None:
    times = torch.linspace(1.0, 1e-3, 5)
    inner = times[1:-1].tolist()
    wanted = TAKES_GRID[name]([1.0, *inner, 1e-3])
    for grid in (times, times.numpy(), list(times), iter(times.tolist()), [1.0 - 5e-7, *inner, 1e-3 + 5e-10]):
        assert same(TAKES_GRID[name](grid), wanted), grid


@pytest.mark.parametrize("name", TAKES_GRID)
@pytest.mark.parametrize(
    ("grid", "fault"),
    [
        ([0.999, 0.5, 1e-3], "got 0.999 as the first"),
        ([1.0, 0.5, 1.01e-3], "got 0.00101 as the last"),
        ([1.0, 0.5, 0.5, 1e-3], "got 0.5 at 1 and 0.5 after it"),
        ([1.0, 0.2, 0.5, 1e-3], "got 0.2 at 1 and 0.5 after it"),
        ([1.0, math.nan, 1e-3], "got nan at 1"),
        ([1.0, "0.5", 1e-3], "got '0.5' at 1"),
        ([1.0], r"got \[1.0\]"),
        (torch.tensor(1.0), r"got tensor\(1\.\)"),
        (torch.tensor([[1.0, 1e-3]]), r"got \[1.0, 0.001"),
        (3, "got 3"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_grid(name: str, grid: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=rf"grid: expected times that fall from .* = 1 to .* = 0\.001, {fault}"):
        TAKES_GRID[name](grid)


def test_times_at_which_the_state_is_wanted() -> None:
    """They need not begin and end at the ends of the interval; where they do in float32, that is where they are."""
    times = torch.linspace(0.0, 0.7, 4)
    found = solved((0.0, 0.7), t_eval=times)
    assert torch.equal(found.ys[0], X) and torch.equal(found.ys[-1], found.y)
    assert solved((0.0, 0.7), t_eval=[]).ys.shape == (0, 2, 3)
    assert torch.equal(*solved((0.0, 0.7), t_eval=[0.1, 0.1]).ys)
    for wrong, fault in (
        ([0.5, 0.1], "got 0.5 at 0 and 0.1 after it"),
        ([0.1, 0.8], "got 0.8 as the last"),
        ([-0.1, 0.5], "got -0.1 as the first"),
        ([0.1, None], "got None at 1"),
    ):
        with pytest.raises(ValueError, match=rf"t_eval: expected times that rise from t_span\[0\] = 0 .*, {fault}"):
            solved((0.0, 0.7), t_eval=wrong)


def test_a_grid_that_ends_at_zero() -> None:
    grid = torch.arange(1.0, -0.05, -0.1)
    assert grid[-1] != 0.0
    found = integrate.solve(decay, (1.0, 0.0), X, "rk4", grid=grid)
    assert found.times[-1] == 0.0


# --- what is not a number ---------------------------------------------------------------------------------------------

PREDICTOR, CORRECTOR = sampling.EulerMaruyamaPredictor, sampling.LangevinCorrector


def make_pc(
    sde: Any = VP, predictor: Any = PREDICTOR, corrector: Any = CORRECTOR, scaler: Any = None, **rest: Any
) -> Any:
    options = {"snr": 0.1, "continuous": True, "device": "cpu"} | rest
    return sampling.get_pc_sampler(sde, (2, 3), predictor, corrector, scaler, **options)


def make_ode(sde: Any = VP, scaler: Any = None, **options: Any) -> Any:
    return sampling.get_ode_sampler(sde, (2, 3), scaler, **({"device": "cpu"} | options))


def make_sde(sde: Any = VP, scaler: Any = None, **options: Any) -> Any:
    return stochastic.get_sde_sampler(sde, (2, 3), scaler, **({"device": "cpu"} | options))


def make_inpainter(
    sde: Any = VP, predictor: Any = PREDICTOR, corrector: Any = CORRECTOR, scaler: Any = None, **rest: Any
) -> Any:
    options = {"snr": 0.1, "continuous": True} | rest
    return controllable_generation.get_pc_inpainter(sde, predictor, corrector, scaler, **options)


def make_likelihood(sde: Any = VP, scaler: Any = None, **options: Any) -> Any:
    return likelihood.get_likelihood_fn(sde, scaler, **options)


def calibrate(sde: Any = VP, **options: Any) -> Any:
    return sampling.calibrate_grid(sde, network, (2, 3), **({"nfe": 2, "device": "cpu"} | options))


def one_step(predictor: Any = PREDICTOR, sde: Any = VP, probability_flow: Any = False, continuous: Any = True) -> Any:
    return sampling.shared_predictor_update_fn(X, T, sde, network, predictor, probability_flow, continuous)


def one_correction(corrector: Any = CORRECTOR, sde: Any = VP, continuous: Any = True) -> Any:
    return sampling.shared_corrector_update_fn(X, T, sde, network, corrector, continuous, 0.1, 1)


WITH_DEVICE = {"pc": make_pc, "ode": make_ode, "sde": make_sde, "calibrate": calibrate}


@pytest.mark.parametrize("name", WITH_DEVICE)
def test_a_device_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named with the remedy when the sampler is made; 'cuda' is the default."""
    make = WITH_DEVICE[name]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        ValueError, match=r"device: .* got 'cuda', but torch \S+ finds no CUDA device. Pass device='cpu'"
    ):
        make(device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"device: .* got 'cuda:2', but the last one is cuda:1. Pass device='cpu'"):
        make(device=torch.device("cuda", 2))
    with pytest.raises(ValueError, match=r"device: .* got 'xla', but torch \S+ cannot use it. Pass device='cpu'"):
        make(device="xla")
    with pytest.raises(ValueError, match=r"device: .* got 'meta', but its tensors have no values"):
        make(device="meta")
    for wrong in ("abacus", "cuda:x", None, 0.5):
        with pytest.raises(ValueError, match=r"device: expected a device of torch's, such as 'cpu', 'cuda' or"):
            make(device=wrong)


@pytest.mark.parametrize("name", ["pc", "ode", "sde"])
def test_the_default_device_is_looked_for_when_the_sampler_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    make = {
        "pc": lambda: sampling.get_pc_sampler(VP, (2, 3), None, None, None, 0.1),
        "ode": lambda: sampling.get_ode_sampler(VP, (2, 3), None),
        "sde": lambda: stochastic.get_sde_sampler(VP, (2, 3), None),
    }[name]
    with pytest.raises(ValueError, match="device: .* Pass device='cpu'"):
        make()


def test_no_inverse_scaler_leaves_the_samples_as_they_are() -> None:
    gray = torch.zeros(2, 3, 2, 2)
    colorizer = controllable_generation.get_pc_colorizer
    for run in (
        lambda scaler: make_pc(scaler=scaler, seeds=0)(network),
        lambda scaler: make_ode(scaler=scaler, seeds=0)(network),
        lambda scaler: make_sde(scaler=scaler, seeds=0, steps=3)(network),
        lambda scaler: make_inpainter(scaler=scaler, seeds=0)(network, X, X * 0),
        lambda scaler: colorizer(VP, PREDICTOR, None, scaler, 0.1, continuous=True, seeds=0)(network, gray),
        lambda scaler: make_likelihood(scaler=scaler, seeds=0)(network, X),
        lambda scaler: make_likelihood(scaler=scaler, seeds=0, levels=256)(network, X),
    ):
        assert same(run(None), run(lambda x: x))
    nats, bits = (make_likelihood(seeds=0, units=units)(network, X)[0] for units in ("nats", "bits/dim"))
    torch.testing.assert_close(bits, 8 - nats / (3 * math.log(2)))  # of data in [0, 1] with 256 levels


SDE_ARGUMENT: dict[str, Callable[[Any], Any]] = {
    "pc": make_pc,
    "ode": make_ode,
    "sde": make_sde,
    "inpainter": make_inpainter,
    "likelihood": make_likelihood,
    "calibrate": calibrate,
    "loss": lambda sde: losses.get_sde_loss_fn(sde, True),
    "step": lambda sde: losses.get_step_fn(sde, False),
    "encode": lambda sde: encoding.encode(sde, network, X),
    "decode": lambda sde: encoding.decode(sde, network, X),
    "score": lambda sde: mutils.get_score_fn(sde, network),
    "predictor": lambda sde: one_step(sde=sde),
    "corrector": lambda sde: one_correction(sde=sde),
}


@pytest.mark.parametrize("name", SDE_ARGUMENT)
def test_an_sde_is_an_object(name: str) -> None:
    with pytest.raises(NotImplementedError, match="^sde: expected VPSDE, .* got the class VPSDE and no object of it"):
        SDE_ARGUMENT[name](sde_lib.VPSDE)
    for wrong in ("vp", None):
        with pytest.raises(NotImplementedError, match=f"^sde: expected VPSDE, .* got {type(wrong).__name__}"):
            SDE_ARGUMENT[name](wrong)


@pytest.mark.parametrize("make", [make_pc, make_inpainter])
def test_predictors_and_correctors_are_classes(make: Callable[..., Any]) -> None:
    name = r"predictor: expected a class or None, got the name 'ald'. Pass sampling.get_predictor\('ald'\)."
    for call in (lambda v: make(predictor=v), one_step):
        with pytest.raises(ValueError, match=name):
            call("ald")
        for wrong in (PREDICTOR(VP, score), CORRECTOR):
            with pytest.raises(ValueError, match="predictor: expected a predictor's class or None, got"):
                call(wrong)
    for call in (lambda v: make(corrector=v), one_correction):
        with pytest.raises(ValueError, match=name.replace("predictor", "corrector")):
            call("ald")
        for wrong in (CORRECTOR(VP, score, 0.1, 1), PREDICTOR):
            with pytest.raises(ValueError, match="corrector: expected a corrector's class or None, got"):
                call(wrong)


class Module(torch.nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(x)


FLAGS: dict[str, Callable[[Any], Any]] = {
    "pc.probability_flow": lambda v: make_pc(probability_flow=v),
    "pc.continuous": lambda v: make_pc(continuous=v),
    "pc.denoise": lambda v: make_pc(denoise=v),
    "pc.progress": lambda v: make_pc(progress=v),
    "ode.denoise": lambda v: make_ode(denoise=v),
    "sde.denoise": lambda v: make_sde(denoise=v),
    "inpainter.denoise": lambda v: make_inpainter(denoise=v),
    "likelihood.progress": lambda v: make_likelihood(progress=v),
    "calibrate.progress": lambda v: calibrate(progress=v),
    "loss.train": lambda v: losses.get_sde_loss_fn(VP, v)(Module(), X),
    "loss.reduce_mean": lambda v: losses.get_sde_loss_fn(VP, True, reduce_mean=v),
    "loss.continuous": lambda v: losses.get_sde_loss_fn(VP, True, continuous=v),
    "loss.likelihood_weighting": lambda v: losses.get_sde_loss_fn(VP, True, likelihood_weighting=v),
    "smld.reduce_mean": lambda v: losses.get_smld_loss_fn(VE, True, reduce_mean=v),
    "ddpm.train": lambda v: losses.get_ddpm_loss_fn(VP, v),
    "step.continuous": lambda v: losses.get_step_fn(VP, False, continuous=v),
    "solve.pi": lambda v: solved(pi=v),
    "solve.progress": lambda v: solved(progress=v),
    "ema.use_num_updates": lambda v: ExponentialMovingAverage([], 0.9, use_num_updates=v),
    "score.train": lambda v: mutils.get_score_fn(VP, Module(), train=v),
    "score.continuous": lambda v: mutils.get_score_fn(VP, Module(), continuous=v),
    "one_step.probability_flow": lambda v: one_step(probability_flow=v),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    """A word, or the argument before or behind, would count as True."""
    argument = name.rpartition(".")[2]
    for value in (True, np.True_, 1, np.int64(1)):
        FLAGS[name](value)
    for wrong in ("False", 1e-3, 2, None, VP, [False]):
        with pytest.raises(ValueError, match=rf"{argument}: expected True or False, got"):
            FLAGS[name](wrong)


@pytest.mark.parametrize("name", ["pc", "ode", "sde", "inpainter", "likelihood"])
def test_an_inverse_scaler_is_a_function(name: str) -> None:
    make = {"pc": make_pc, "ode": make_ode, "sde": make_sde, "inpainter": make_inpainter}.get(name, make_likelihood)
    with pytest.raises(ValueError, match="inverse_scaler: expected a function of the samples, or None .*, got 0.16"):
        make(scaler=0.16)


MODEL_ARGUMENT: dict[str, Callable[[Any], Any]] = {
    "pc": lambda model: make_pc()(model),
    "ode": lambda model: make_ode()(model),
    "sde": lambda model: make_sde()(model),
    "inpainter": lambda model: make_inpainter()(model, X, X * 0),
    "likelihood": lambda model: make_likelihood()(model, X),
    "encode": lambda model: encoding.encode(VP, model, X),
    "loss": lambda model: losses.get_sde_loss_fn(VP, True)(model, X),
    "ddpm": lambda model: losses.get_ddpm_loss_fn(VP, True)(model, X),
    "score": lambda model: mutils.get_score_fn(VP, model),
}


@pytest.mark.parametrize("name", MODEL_ARGUMENT)
def test_a_model_is_a_network(name: str) -> None:
    with pytest.raises(ValueError, match="model: expected a network, a module or a function of .*, got the class Tanh"):
        MODEL_ARGUMENT[name](torch.nn.Tanh)
    for wrong in (None, {"model": network}):
        with pytest.raises(ValueError, match="model: expected a network, a module or a function of .*, got"):
            MODEL_ARGUMENT[name](wrong)


def test_the_function_of_optimization_manager_is_asked_for() -> None:
    for wrong in (None, "adam", 1e-3):
        with pytest.raises(ValueError, match="optimize_fn: expected the function of optimization_manager"):
            losses.get_step_fn(VP, True, wrong)
