"""Networks of other dtypes than the data: every loss, sampler, likelihood and job, with parameters and outputs in any
floating dtype, with and without autocast."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_formulas import LOSSES, Decay, coefficients
from torch import Tensor, nn

from scoresde_ext import controllable_generation, likelihood, losses, noise, sampling, sde_lib, stochastic
from scoresde_ext.__main__ import main

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Kind = tuple[torch.dtype, torch.dtype | None, torch.dtype | None]  # of the parameters, of autocast, of the output
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


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", ["generated", "replayed"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, source: str, dtype: torch.dtype) -> None:
    """Values and gradients are upstream's formula in float64 on what the network saw and returned."""
    loss_fn, _, _, mean = LOSSES[name]
    x0 = torch.randn(B, D).to(dtype)
    in_loss = torch.float64 if dtype == torch.float64 else torch.float32  # what the loss is computed in
    like, discrete = torch.empty(B, dtype=in_loss), name in ("smld", "ddpm")
    with noise.seeds(3, range(B)):
        u = noise.integers(1000, like) if discrete else noise.uniform(like)
        z = noise.normal_tensor(x0)
    m, s, c, d = coefficients(name, u)
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


class HalfDecay(Decay):
    """Gives all in the dtype of the data."""

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        drift, g = super().sde(x, t)
        return drift.to(x.dtype), g.to(x.dtype)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().marginal_prob(x, t)
        return mean.to(x.dtype), std.to(x.dtype)


@pytest.mark.parametrize("weighted", [False, True])
def test_users_sde_in_half_precision(weighted: bool) -> None:
    """Squares and sums are float32's: in float16 they would be Inf."""
    x0 = torch.zeros(1000, 100).half()
    loss_fn = losses.get_sde_loss_fn(HalfDecay(1000), True, reduce_mean=False, likelihood_weighting=weighted)
    with noise.replay([torch.full((1000,), 0.5), torch.full((1000, 100), 40.0)]):
        loss = loss_fn(lambda x, labels: torch.zeros_like(x), x0)
    assert loss.dtype == torch.float32
    wanted = 0.5 * 100 * 40.0**2 * (2 / -np.expm1(-1.0) if weighted else 1)
    assert loss.item() == pytest.approx(wanted, rel=5e-3)


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
def test_jobs(sampler: str, tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK)

    def samples(dtype: str, output: str) -> np.ndarray:
        out = tmp_path / f"{dtype} {output}"
        steps = "--nfe 60 --corrector ald" if sampler == "pc" else "--nfe 8"
        settings = (
            f"--samples 4 --batch 4 --seed 3 --device cpu --format npy --sampler {sampler} --dtype {dtype} {steps}"
        )
        network = f"{tmp_path}/network.py:{output}"
        assert main(["sample", "--network", network, "--out", str(out), "--dtype", dtype, *settings.split()]) == 0
        (shard,) = out.glob("samples*.npy")
        return np.load(shard)

    right = samples("float32", "float32")
    kinds = [("float32", "float64"), ("float32", "float16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
    for dtype, output in kinds:
        found = samples(dtype, output)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, right, atol=1e-6 if output == "float64" else 0.1)
