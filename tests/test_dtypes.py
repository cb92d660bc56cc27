"""Networks of other dtypes than the data: every loss, sampler, likelihood and job, with parameters and outputs in any
floating dtype, with and without autocast."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scoresde_ext import controllable_generation, likelihood, losses, noise, sampling, sde_lib, stochastic
from scoresde_ext.__main__ import main

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Kind = tuple[torch.dtype, torch.dtype | None, torch.dtype | None]  # of the parameters, of autocast, of the output
EPS = 1e-5
B, D = 16, 6


def kinds() -> Iterator[Kind]:
    return itertools.product(DTYPES, (None, torch.bfloat16, torch.float16), (None, *DTYPES))


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


class Net(nn.Module):
    """About std(t) (0.9 x + 0.05) for labels 999 t of VP, and what it saw and returned."""

    def __init__(self, output: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.output = output
        with torch.no_grad():
            self.layer.weight.copy_(0.9 * torch.eye(D))
            self.layer.bias.fill_(0.05)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        t = labels / 999
        std = torch.sqrt(-torch.expm1(-0.1 * t - 0.5 * 19.9 * t * t))
        out = self.layer(x) * std[:, None].to(x.dtype)
        self.x, self.out = x, out if self.output is None else out.to(self.output)
        if self.out.requires_grad:
            self.out.retain_grad()
        return self.out


# --- losses -----------------------------------------------------------------------------------------------------------


class Decay(sde_lib.SDE):
    """dx = -x dt + sqrt(2) dw, by upstream's methods alone."""

    T = 1.0

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return -x, math.sqrt(2) * torch.ones_like(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(-t)[:, None] * x, torch.sqrt(-torch.expm1(-2 * t))

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        raise NotImplementedError


def vp(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    """m, s; c and d of the residual ``c out + d z``, in upstream's formula."""
    log_m = -0.25 * t * t * 19.9 - 0.5 * t * 0.1
    s, g = (-torch.expm1(2 * log_m)).sqrt(), (0.1 + 19.9 * t).sqrt()
    k = -1 / s  # score = k out
    return (log_m.exp(), s, k * g, g / s) if weighted else (log_m.exp(), s, k * s, torch.ones_like(t))


def subvp(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    log_m = -0.25 * t * t * 19.9 - 0.5 * t * 0.1
    s, g = -torch.expm1(2 * log_m), ((0.1 + 19.9 * t) * -torch.expm1(4 * log_m)).sqrt()
    return (log_m.exp(), s, -g / s, g / s) if weighted else (log_m.exp(), s, -torch.ones_like(t), torch.ones_like(t))


def ve(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    s = 0.1 * 50**t
    g = s * math.sqrt(2 * math.log(50))
    return (torch.ones_like(t), s, g, g / s) if weighted else (torch.ones_like(t), s, s, torch.ones_like(t))


def decay(t: Tensor, weighted: bool) -> tuple[Tensor, ...]:
    s = (-torch.expm1(-2 * t)).sqrt()
    g = math.sqrt(2) * torch.ones_like(t)
    return (torch.exp(-t), s, g, g / s) if weighted else (torch.exp(-t), s, s, torch.ones_like(t))


def smld(labels: Tensor, _: bool) -> tuple[Tensor, ...]:
    sigma = torch.exp(torch.linspace(math.log(0.1), math.log(5), 1000)).flip(0).double()[labels]
    return torch.ones_like(sigma), sigma, sigma, torch.ones_like(sigma)


def ddpm(labels: Tensor, _: bool) -> tuple[Tensor, ...]:
    product = torch.cumprod(1 - torch.linspace(0.1 / 1000, 20 / 1000, 1000), 0)
    m, s = product.sqrt().double()[labels], (1 - product).sqrt().double()[labels]
    return m, s, torch.ones_like(m), -torch.ones_like(m)


VP, VE = sde_lib.VPSDE(), sde_lib.VESDE(0.1, 5.0)
Formula = Callable[[Tensor, bool], tuple[Tensor, ...]]
CONTINUOUS: dict[str, tuple[sde_lib.SDE, Formula]] = {
    "vp": (VP, vp), "subvp": (sde_lib.subVPSDE(), subvp), "ve": (VE, ve), "user's": (Decay(1000), decay),
}  # fmt: skip
LOSSES: dict[str, tuple[losses.LossFn, Formula, bool, bool]] = {
    f"{kind}, {'g^2' if weighted else 'std^2'}, {'mean' if mean else 'sum'}": (
        losses.get_sde_loss_fn(sde, True, reduce_mean=mean, likelihood_weighting=weighted), formula, weighted, mean,
    )
    for kind, (sde, formula) in CONTINUOUS.items()
    for weighted, mean in ((True, True), (False, False))
} | {
    "smld": (losses.get_smld_loss_fn(VE, True), smld, False, False),
    "ddpm": (losses.get_ddpm_loss_fn(VP, True), ddpm, False, True),
}  # fmt: skip


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["generated", "replayed"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, source: str, dtype: torch.dtype) -> None:
    """Values and gradients are upstream's formula in float64 on what the network saw and returned."""
    loss_fn, formula, weighted, mean = LOSSES[name]
    x0 = torch.randn(B, D).to(dtype)
    in_loss = torch.float64 if dtype == torch.float64 else torch.float32  # what the loss is computed in
    like, discrete = torch.empty(B, dtype=in_loss), name in ("smld", "ddpm")
    with noise.seeds(3, range(B)):
        u = noise.integers(1000, like) if discrete else noise.uniform(like)
        z = noise.normal_tensor(x0)
    m, s, c, d = (v[:, None] for v in formula(u if discrete else u.double() * (1 - EPS) + EPS, weighted))
    reduction = 1 / (B * D) if mean else 0.5 / B
    for kind in kinds():
        parameters, cast, output = kind
        net = Net(output).to(parameters)
        with noise.seeds(3, range(B)) if source == "generated" else noise.replay([u, z]), autocast(cast):
            loss = loss_fn(net, x0)
        loss.backward()
        assert loss.dtype == in_loss, kind

        def same(found: Tensor, right: Tensor, size: Tensor, eps: float, kind: Kind = kind) -> None:
            """To rounding errors of what the number was computed from."""
            torch.testing.assert_close(found.double(), right, rtol=0, atol=8 * eps * size.max().item(), msg=str(kind))

        same(
            net.x, m * x0.double() + s * z.double(), m * x0.abs() + s * z.abs(), max(map(rounding, (dtype, parameters)))
        )
        out, of_loss = net.out.detach().double(), 4 * rounding(in_loss)
        if source == "generated":
            of_loss = max(of_loss, rounding(dtype))  # z is not rounded to half precision there
        r, parts = c * out + d * z.double(), (c * out).abs() + (d * z.double()).abs()
        same(loss.detach(), reduction * r.square().sum(), reduction * parts.square().sum(), of_loss)
        right = reduction * 2 * c * r
        same(net.out.grad, right, reduction * 2 * c.abs() * parts, max(of_loss, rounding(net.out.dtype)))
        for p in net.parameters():
            assert p.grad.dtype == parameters and p.grad.isfinite().all() and p.grad.any(), kind


# --- samplers ---------------------------------------------------------------------------------------------------------

SDE, SHAPE = sde_lib.VPSDE(N=40), (8, D)
RULES = {"rtol": 1e-2, "atol": 1e-2}


def identity(x: Tensor) -> Tensor:
    return x


def mask() -> Tensor:
    return (torch.arange(8 * D).reshape(SHAPE) % 2).float()


RUNS: dict[str, Callable[[nn.Module], Tensor]] = {
    **{
        f"pc, {predictor}, {corrector}": lambda net, p=predictor, c=corrector: sampling.get_pc_sampler(
            SDE, SHAPE, sampling.get_predictor(p), sampling.get_corrector(c), identity, 0.16, continuous=True,
            device="cpu",
        )(net)[0]
        for predictor, corrector in (
            ("euler_maruyama", "none"), ("reverse_diffusion", "langevin"), ("ancestral_sampling", "ald"),
        )
    },
    **{
        f"ode, {method}, {control}": lambda net, m=method, c=control: sampling.get_ode_sampler(
            SDE, SHAPE, identity, denoise=True, method=m, control=c, device="cpu", **RULES
        )(net)[0]
        for method in ("RK45", "unipc") for control in ("joint", "per_sample")
    },
    "sde": lambda net: stochastic.get_sde_sampler(SDE, SHAPE, identity, device="cpu")(net)[0],
    "inpainter": lambda net: controllable_generation.get_pc_inpainter(
        SDE, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, 0.16, continuous=True
    )(net, torch.ones(SHAPE), mask()),
    "likelihood": lambda net: likelihood.get_likelihood_fn(SDE, identity, **RULES)(net, torch.randn(SHAPE))[0],
}  # fmt: skip


def some_kinds() -> list[Kind]:
    """All of a float32 network; of others those without autocast, with their own output and float32's."""
    return [k for k in kinds() if k[0] == torch.float32 or (k[1] is None and k[2] in (None, torch.float32))]


@pytest.mark.parametrize("run", RUNS)
def test_samplers(run: str) -> None:
    """Results are float32, and those of a float32 network but for the rounding of bfloat16 or float16."""
    torch.manual_seed(0)
    right = RUNS[run](Net())
    for kind in some_kinds():
        parameters, cast, output = kind
        torch.manual_seed(0)
        with autocast(cast):
            found = RUNS[run](Net(output).to(parameters))
        assert found.dtype == torch.float32, kind
        narrow = {torch.bfloat16, torch.float16} & {parameters, cast, output}
        bound = 20 * rounding(torch.bfloat16 if torch.bfloat16 in narrow else torch.float16) if narrow else 1e-4
        torch.testing.assert_close(found, right, rtol=bound, atol=bound, msg=lambda m, kind=kind: f"{kind}: {m}")


NETWORK = """
import torch
from job_networks import Tiny

class Answers(Tiny):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, labels):
        return super().forward(x, labels).to(self.output)

float32, float64, bfloat16, float16 = (
    lambda dtype=dtype: Answers(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
)
"""


@pytest.mark.parametrize("sampler", ["unipc", "unipc_sde", "pc"])
def test_jobs(sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    (tmp_path / "network.py").write_text(NETWORK)

    def samples(dtype: str, output: str) -> np.ndarray:
        out = tmp_path / f"{dtype} {output}"
        size = ["--samples", "4", "--batch", "4", "--nfe", "60" if sampler == "pc" else "8"]
        settings = ["--device", "cpu", "--seed", "3", "--format", "npy", "--sampler", sampler, "--dtype", dtype, *size]
        network = f"{tmp_path}/network.py:{output}"
        assert main(["sample", "--network", network, "--out", str(out), *settings]) == 0
        (shard,) = out.glob("samples*.npy")
        return np.load(shard)

    right = samples("float32", "float32")
    for dtype, output in (
        ("float32", "float64"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float16", "bfloat16"),
    ):
        found = samples(dtype, output)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, right, atol=1e-6 if output == "float64" else 0.1)
