"""The recorded ODE and likelihood cases, solved once a process: one test judges their arrays, another their nfe."""

import functools

from torch import Tensor

from golden import arrays, cases, make_network, make_sde, to_unit_range
from scoresde_ext import likelihood, noise, sampling


@functools.cache
def sample_by_ode(name: str) -> tuple[Tensor, int]:
    """The sample and nfe of a case of section "ode", drawn as upstream drew it."""
    case = cases("ode")[name]
    sde, shape = make_sde(case), tuple(case["shape"])
    z_unit = arrays("ode")["z_unit"]
    if name.endswith("_defaults"):
        sampler = sampling.get_ode_sampler(sde, shape, to_unit_range, eps=case["eps"], device="cpu")
        with noise.replay([z_unit]):  # the prior is drawn as unit normals; VE scales them itself
            return sampler(make_network(case))
    sampler = sampling.get_ode_sampler(
        sde, shape, lambda x: x, denoise=case["denoise"], rtol=case["rtol"], atol=case["atol"], method=case["method"],
        eps=case["eps"], device="cpu",
    )  # fmt: skip
    z = z_unit * case["p1"] if case["kind"] == "ve" else z_unit
    with noise.replay([z_unit] if case["denoise"] else []):  # the denoising step draws, and uses only its mean
        return sampler(make_network(case), z)


@functools.cache
def likelihood_of(name: str) -> tuple[Tensor, Tensor, int]:
    """(bits per dimension, latent code, nfe) of a case of section "likelihood"."""
    case, section = cases("likelihood")[name], arrays("likelihood")
    likelihood_fn = likelihood.get_likelihood_fn(
        make_sde(case), to_unit_range, hutchinson_type=case["hutchinson_type"], rtol=case["rtol"], atol=case["atol"],
        method=case["method"], eps=case["eps"],
    )  # fmt: skip
    # Rademacher signs are drawn as integers 0 and 1
    epsilon = section["rademacher01"].long() if case["hutchinson_type"] == "Rademacher" else section["gaussian_eps"]
    with noise.replay([epsilon]):
        return likelihood_fn(make_network(case), section[case["data"]])
