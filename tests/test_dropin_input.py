"""Bad input is refused before work starts, by an error that names the argument."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scoresde_ext import controllable_generation, likelihood, losses, noise, sampling, sde_lib
from scoresde_ext.models import utils as mutils
from scoresde_ext.models.ema import ExponentialMovingAverage

VP, SUBVP, VE = sde_lib.VPSDE(0.1, 2.0, 5), sde_lib.subVPSDE(0.1, 2.0, 5), sde_lib.VESDE(0.01, 50.0, 5)
X, T = torch.ones(4, 3), torch.full((4,), 0.5)
WITH_NAN = X.clone().index_fill(0, torch.tensor(2), math.nan)
REFUSED = (ValueError, TypeError, IndexError)


def identity(x: Any) -> Any:
    return x


def network(x: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * x


def untouched(x: Tensor, labels: Tensor) -> Tensor:
    """A network that no refused call may reach."""
    raise AssertionError("the network was run before the input was checked")


def refuses(call: Callable[[], Any], argument: str) -> None:
    """The call raises, and its message names the argument as a word of its own."""
    with pytest.raises(REFUSED, match=rf"\b{argument}\b"):
        call()


NUMBERS = [-1e-5, math.nan, math.inf]


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [sde_lib.VPSDE, sde_lib.subVPSDE, sde_lib.VESDE])
@pytest.mark.parametrize("N", [0, -3, 2.5])
def test_number_of_scales(cls: type, N: Any) -> None:
    refuses(lambda: cls(N=N), "N")


@pytest.mark.parametrize(
    ("cls", "argument", "value"),
    [(cls, "beta_min", value) for cls in (sde_lib.VPSDE, sde_lib.subVPSDE) for value in NUMBERS]
    + [(cls, "beta_max", value) for cls in (sde_lib.VPSDE, sde_lib.subVPSDE) for value in NUMBERS]
    + [(sde_lib.VESDE, "sigma_min", value) for value in [0.0, *NUMBERS]]
    + [(sde_lib.VESDE, "sigma_max", value) for value in [0.0, *NUMBERS]],
)
def test_sde_parameters(cls: type, argument: str, value: float) -> None:
    refuses(lambda: cls(**{argument: value}), argument)


@pytest.mark.parametrize("argument", ["rtol", "atol"])
@pytest.mark.parametrize("value", [*NUMBERS, "1e-5"])
def test_tolerances(argument: str, value: Any) -> None:
    options = {argument: value}
    refuses(lambda: sampling.get_ode_sampler(VP, (4, 3), identity, device="cpu", **options)(untouched), argument)
    refuses(lambda: likelihood.get_likelihood_fn(VP, identity, **options)(untouched, X), argument)


def test_method() -> None:
    refuses(lambda: sampling.get_ode_sampler(VP, (4, 3), identity, method="RK99", device="cpu")(untouched), "method")
    refuses(lambda: likelihood.get_likelihood_fn(VP, identity, method="RK99")(untouched, X), "method")


def test_hutchinson_type() -> None:
    with pytest.raises((NotImplementedError, ValueError), match="hutchinson_type"):
        likelihood.get_likelihood_fn(VP, identity, hutchinson_type="Cauchy")(untouched, X)


@pytest.mark.parametrize("eps", [-1e-3, 1.5, math.nan])
def test_eps(eps: float) -> None:
    refuses(lambda: pc_sampler(VP, (4, 3), eps=eps)(untouched), "eps")
    refuses(lambda: sampling.get_ode_sampler(VP, (4, 3), identity, eps=eps, device="cpu")(untouched), "eps")
    refuses(lambda: likelihood.get_likelihood_fn(VP, identity, eps=eps)(untouched, X), "eps")
    refuses(lambda: inpainter(eps=eps)(untouched, X, torch.ones(4, 3)), "eps")
    refuses(lambda: losses.get_sde_loss_fn(VP, True, eps=eps)(untouched, X), "eps")


@pytest.mark.parametrize("shape", [(), (4, -3), (4, 2.5), "4"], ids=str)
def test_shape(shape: Any) -> None:
    refuses(lambda: pc_sampler(VP, shape)(untouched), "shape")
    refuses(lambda: sampling.get_ode_sampler(VP, shape, identity, device="cpu")(untouched), "shape")


@pytest.mark.parametrize("snr", [-0.1, math.nan])
def test_snr(snr: float) -> None:
    refuses(lambda: pc_sampler(VP, (4, 3), snr=snr)(untouched), "snr")
    refuses(lambda: inpainter(snr=snr)(untouched, X, torch.ones(4, 3)), "snr")


@pytest.mark.parametrize("n_steps", [-1, 1.5])
def test_n_steps(n_steps: Any) -> None:
    refuses(lambda: pc_sampler(VP, (4, 3), n_steps=n_steps)(untouched), "n_steps")


def pc_sampler(sde: sde_lib.SDE, shape: Any, **options: Any) -> Any:
    options = {"snr": 0.16, "continuous": True, "device": "cpu"} | options
    return sampling.get_pc_sampler(
        sde, shape, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, **options
    )


def inpainter(snr: float = 0.16, **options: Any) -> Any:
    return controllable_generation.get_pc_inpainter(
        VP, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, snr, continuous=True, **options
    )


def colorizer() -> Any:
    return controllable_generation.get_pc_colorizer(
        VP, sampling.ReverseDiffusionPredictor, sampling.LangevinCorrector, identity, 0.16, continuous=True
    )


# --- t ----------------------------------------------------------------------------------------------------------------

TAKES_T: dict[str, Callable[[sde_lib.SDE, Tensor, Tensor], Any]] = {
    "marginal_prob": lambda sde, x, t: sde.marginal_prob(x, t),
    "sde": lambda sde, x, t: sde.sde(x, t),
    "discretize": lambda sde, x, t: sde.discretize(x, t),
    "score_fn": lambda sde, x, t: mutils.get_score_fn(sde, untouched, continuous=True)(x, t),
    "discrete_score_fn": lambda sde, x, t: mutils.get_score_fn(sde, untouched, continuous=False)(x, t),
    "euler_maruyama": lambda sde, x, t: sampling.EulerMaruyamaPredictor(sde, untouched).update_fn(x, t),
    "reverse_diffusion": lambda sde, x, t: sampling.ReverseDiffusionPredictor(sde, untouched).update_fn(x, t),
    "langevin": lambda sde, x, t: sampling.LangevinCorrector(sde, untouched, 0.16, 1).update_fn(x, t),
    "ald": lambda sde, x, t: sampling.AnnealedLangevinDynamics(sde, untouched, 0.16, 1).update_fn(x, t),
}
BAD_T = {
    "wrong length": torch.full((3,), 0.5),
    "wrong rank": torch.full((4, 1), 0.5),
    "scalar": torch.tensor(0.5),
    "integers": torch.ones(4, dtype=torch.int64),
    "above T": torch.tensor([0.5, 0.5, 1.5, 0.5]),
    "below 0": torch.tensor([0.5, 0.5, -0.1, 0.5]),
    "nan": torch.tensor([0.5, 0.5, math.nan, 0.5]),
}


@pytest.mark.parametrize("sde", [VP, SUBVP, VE], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("call", TAKES_T)
@pytest.mark.parametrize("problem", BAD_T)
def test_t(sde: sde_lib.SDE, call: str, problem: str) -> None:
    """Upstream broadcasts (B, 1) to (B, B), and indexes its tables from the end with a negative t."""
    refuses(lambda: TAKES_T[call](sde, X, BAD_T[problem]), "t")


@pytest.mark.parametrize("call", TAKES_T)
def test_integer_x(call: str) -> None:
    refuses(lambda: TAKES_T[call](VP, X.long(), T), "x")


@pytest.mark.parametrize("call", ["marginal_prob", "discretize"])
def test_x_and_t_on_different_devices(call: str) -> None:
    refuses(lambda: TAKES_T[call](VP, X.to("meta"), T), "t")


# --- data -------------------------------------------------------------------------------------------------------------

TAKES_DATA: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "sde_loss": ("batch", lambda x: losses.get_sde_loss_fn(VP, True)(untouched, x)),
    "ddpm_loss": ("batch", lambda x: losses.get_ddpm_loss_fn(VP, True)(untouched, x)),
    "smld_loss": ("batch", lambda x: losses.get_smld_loss_fn(VE, True)(untouched, x)),
    "likelihood": ("data", lambda x: likelihood.get_likelihood_fn(VP, identity)(untouched, x)),
    "ode": ("z", lambda x: sampling.get_ode_sampler(VP, (4, 3), identity, device="cpu")(untouched, x)),
    "inpaint": ("data", lambda x: inpainter()(untouched, x, torch.ones(4, 3))),
    "inpaint_mask": ("mask", lambda x: inpainter()(untouched, X, x)),
}
BAD_DATA = {
    "integers": X.long(),
    "nan": WITH_NAN,
    "not a tensor": X.numpy(),
    "scalar": torch.tensor(1.0),
}


@pytest.mark.parametrize("call", TAKES_DATA)
@pytest.mark.parametrize("problem", BAD_DATA)
def test_data(call: str, problem: str) -> None:
    argument, run = TAKES_DATA[call]
    refuses(lambda: run(BAD_DATA[problem]), argument)


@pytest.mark.parametrize("shape", [(3, 3), (4, 1), (3, 4), (4, 3, 1), (4,)], ids=str)
def test_shape_of_z(shape: tuple[int, ...]) -> None:
    """Upstream reshapes a z of another shape wherever the sizes happen to agree."""
    refuses(lambda: TAKES_DATA["ode"][1](torch.ones(shape)), "z")


@pytest.mark.parametrize("shape", [(3, 3), (3, 4), (4, 3, 1), (4,)], ids=str)
def test_shape_of_mask(shape: tuple[int, ...]) -> None:
    refuses(lambda: TAKES_DATA["inpaint_mask"][1](torch.ones(shape)), "mask")


@pytest.mark.parametrize("shape", [(4, 1), (1, 3), (3,)], ids=str)
def test_mask_that_broadcasts(shape: tuple[int, ...]) -> None:
    """One mask for all samples, or one for all channels: upstream takes them, so do we."""
    results = []
    for mask in (torch.ones(shape), torch.ones(shape).expand(4, 3)):
        torch.manual_seed(0)
        results.append(inpainter()(network, X, mask))
    assert torch.equal(*results)


@pytest.mark.parametrize("gray", [torch.ones(4, 1, 2, 2), torch.ones(4, 3).long(), torch.ones(3)], ids=str)
def test_gray(gray: Tensor) -> None:
    refuses(lambda: colorizer()(untouched, gray), "gray")


# --- networks ---------------------------------------------------------------------------------------------------------

BAD_NETWORKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "too few channels": lambda x, labels: x[:, :1],
    "one value a sample": lambda x, labels: x.sum(1),
    "extra axis": lambda x, labels: x[:, None],
    "batch of one": lambda x, labels: x[:1],
}
USES_NETWORK: dict[str, Callable[[Callable[[Tensor, Tensor], Any]], Any]] = {
    "score_fn": lambda model: mutils.get_score_fn(VP, model, continuous=True)(X, T),
    "pc": lambda model: pc_sampler(VP, (4, 3))(model),
    "ode": lambda model: sampling.get_ode_sampler(VP, (4, 3), identity, device="cpu")(model),
    "likelihood": lambda model: likelihood.get_likelihood_fn(VP, identity)(model, X),
    "inpaint": lambda model: inpainter()(model, X, torch.ones(4, 3)),
    "sde_loss": lambda model: losses.get_sde_loss_fn(VP, True)(model, X),
    "ddpm_loss": lambda model: losses.get_ddpm_loss_fn(VP, True)(model, X),
    "smld_loss": lambda model: losses.get_smld_loss_fn(VE, True)(model, X),
}


@pytest.mark.parametrize("use", USES_NETWORK)
@pytest.mark.parametrize("problem", BAD_NETWORKS)
def test_network_of_wrong_shape(use: str, problem: str) -> None:
    """All of these broadcast somewhere: upstream goes on with a wrong number."""
    with pytest.raises((ValueError, RuntimeError), match=r"\((4, 3)\)|\[4, 3\]"):  # the shape expected of it
        USES_NETWORK[use](BAD_NETWORKS[problem])


@pytest.mark.parametrize("use", USES_NETWORK)
def test_network_that_returns_no_tensor(use: str) -> None:
    with pytest.raises((TypeError, ValueError), match=r"\bmodel\b.*tuple"):
        USES_NETWORK[use](lambda x, labels: (x, labels))


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1.5, math.nan])
def test_decay(decay: float) -> None:
    refuses(lambda: ExponentialMovingAverage([torch.nn.Parameter(X)], decay), "decay")


# --- empty batches are not bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_nothing_to_sample(shape: tuple[int, ...]) -> None:
    with noise.replay(torch.zeros(2 * VP.N + 1, *shape)):
        samples, _ = pc_sampler(VP, shape)(network)
    assert samples.shape == shape
    samples, _ = sampling.get_ode_sampler(VP, shape, identity, device="cpu")(network)
    assert samples.shape == shape
