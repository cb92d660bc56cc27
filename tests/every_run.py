"""Everything in the package that runs a network, by name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scoresde_ext import controllable_generation, encoding, likelihood, losses, sampling, sde_lib, stochastic

SHAPE = (4, 3)
VP = sde_lib.VPSDE(0.1, 5.0, 20)


class OwnSDE(sde_lib.SDE):
    """One that is known by its methods alone; its labels are the times themselves."""

    T = 1.0

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * x, torch.ones_like(t)

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x * torch.exp(-0.5 * t)[:, None], torch.sqrt(1 - torch.exp(-t))

    def prior_sampling(self, shape: Any) -> Tensor:
        return torch.randn(*shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(1)


def same(x: Any) -> Any:
    return x


def data() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


Run = Callable[[Any], Tensor]


def runs(sde: Any = VP) -> dict[str, Run]:
    """Everything that runs a network, by name."""
    langevin = (sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, same, 0.1)
    loose: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2}

    def ode(z: Tensor | None = None, **options: Any) -> Run:
        return lambda model: sampling.get_ode_sampler(sde, SHAPE, same, device="cpu", **loose | options)(model, z)[0]

    def pc(**options: Any) -> Run:
        sampler = sampling.get_pc_sampler(sde, SHAPE, *langevin, continuous=True, device="cpu", **options)
        return lambda model: sampler(model)[0]

    inpainter = controllable_generation.get_pc_inpainter(sde, *langevin, continuous=True)
    found = {
        "pc": pc(),
        "RK45": ode(denoise=True),
        "DOP853 of float64, per sample": ode(data().double(), method="DOP853", control="per_sample"),
        "heun": ode(method="heun", steps=3),
        "encode": lambda model: encoding.encode(sde, model, data(), **loose),
        "inpainter": lambda model: inpainter(model, data(), torch.tensor([1.0, 0.0, 1.0])),
        "likelihood": lambda model: likelihood.get_likelihood_fn(sde, same, **loose)(model, data())[0],
        "loss": lambda model: losses.get_sde_loss_fn(sde, train=False)(model, data()),
    }
    if not isinstance(sde, sde_lib.AffineSDE):
        return found
    return found | {
        "pc on a grid": pc(grid=[1.0, 0.5, 1e-3]),
        "angle": ode(coordinate="angle"),
        "unipc": ode(method="unipc"),
        "unipc, per sample": ode(method="unipc", control="per_sample"),
        "unipc in steps": ode(method="unipc", steps=6),
        "dpmpp_2m": ode(method="dpmpp_2m", steps=6),
        "SDE": lambda model: stochastic.get_sde_sampler(sde, SHAPE, same, steps=4, device="cpu")(model)[0],
        "adaptive SDE": lambda model: stochastic.get_sde_sampler(
            sde, SHAPE, same, method="adaptive", rtol=0.1, atol=0.1, device="cpu"
        )(model)[0],
    }


def found(run: Run, model: Any) -> Tensor:
    torch.manual_seed(5)
    return run(model)
