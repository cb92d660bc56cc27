"""On the CPU, samplers compute coefficients with numbers where all samples have one time: as with tensors, but in
double precision."""

import pytest
import torch
from torch import Tensor

from scoresde_ext import checks, noise, predictors, sampling, sde_lib
from scoresde_ext.models import utils as mutils

N = 1000
SDES = {"vp": sde_lib.VPSDE(N=N), "subvp": sde_lib.subVPSDE(N=N), "ve": sde_lib.VESDE(N=N)}
UPDATES = [
    (kind, update)
    for kind in SDES
    for update in ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "langevin", "ald")
    if (kind, update) != ("subvp", "ancestral_sampling")
]


def network(x: Tensor, labels: Tensor) -> Tensor:
    return torch.tanh(x) + 0.1


def updated(kind: str, update: str, continuous: bool, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    score_fn = mutils.get_score_fn(SDES[kind], network, continuous=continuous)
    if update in ("langevin", "ald"):
        step = sampling.get_corrector(update)(SDES[kind], score_fn, 0.16, 2)
    else:
        step = sampling.get_predictor(update)(SDES[kind], score_fn)
    with noise.seeds(3, range(len(x))):
        return step.update_fn(x, t)


@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
@pytest.mark.parametrize(("kind", "update"), UPDATES)
def test_the_same_as_with_tensors(kind: str, update: str, continuous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = 2.0 * torch.randn(6, 3, 5)
    for time in (1.0, 0.61803, 0.1, 1e-3):
        t = torch.full((6,), time)
        numbers = updated(kind, update, continuous, x, t)
        with monkeypatch.context() as patched:
            patched.setattr(predictors, "_times", lambda step, x, t: t)
            tensors = updated(kind, update, continuous, x, t)
            # The same formulas without rounding to float32, for continuous times. Discrete ones have float32's rows.
            exact = updated(kind, update, True, x.double(), t.double()) if update == "euler_maruyama" else tensors
        for one, other, best in zip(numbers, tensors, exact, strict=True):
            assert one.dtype == torch.float32
            scale = other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * scale)
            if continuous and update == "euler_maruyama":
                assert (one - best).abs().max() <= (other - best).abs().max() + 2e-7 * scale


def test_only_where_it_is_seen_to_be_one() -> None:
    score_fn = mutils.get_score_fn(SDES["vp"], network, continuous=True)
    step = sampling.get_predictor("euler_maruyama")(SDES["vp"], score_fn)
    x, t = torch.randn(3, 2), torch.full((3,), 0.3)
    assert predictors._times(step, x, t) == t[0].item()
    assert predictors._times(step, x, t[:1].expand(3)) == t[0].item()
    for other in (torch.tensor([0.3, 0.3, 0.4]), t.double()):
        assert predictors._times(step, x, other) is other
    assert predictors._times(step, x[:0], t[:0]).shape == (0,)

    class Mine(sde_lib.VPSDE):
        """Its coefficients may know tensors alone."""

    assert predictors._times(sampling.get_predictor("euler_maruyama")(Mine(), score_fn), x, t) is t


def test_wrong_times_are_named() -> None:
    x = torch.zeros(3)
    for wrong in ([0.1, -0.1, 0.2], [0.1, 0.2, 1.1], [0.5, float("nan"), 0.5], [float("inf")] * 3):
        with pytest.raises(ValueError, match=r"t: expected times in \[0, T = 1\]"):
            checks.check_inputs(x, torch.tensor(wrong), 1)


@pytest.mark.parametrize("n", [2, 10, 777, 1000, 4096])
def test_rows_of_the_discrete_tables(n: int) -> None:
    """Those of a float32 tensor, also next to where they change."""
    vp, ve = sde_lib.VPSDE(N=max(n, 21)), sde_lib.VESDE(N=n)
    for sde in (vp, ve):
        edges = torch.arange(sde.N) / (sde.N - 1)
        neighbours = [torch.nextafter(edges, torch.tensor(end)) for end in (0.0, 1.0)]
        times = torch.cat([torch.linspace(1, 1e-3, sde.N), edges, *neighbours])
        assert [sde._index(t) for t in times.tolist()] == sde._index(times).tolist()
    for t in (0.0, 0.3, 1.0):
        of_numbers, of_tensors = ve.adjacent_sigmas(t), ve.adjacent_sigmas(torch.tensor([t]))
        assert of_numbers == tuple(v.item() for v in of_tensors)
        assert vp.discrete_beta(t) == vp.discrete_beta(torch.tensor([t])).item()
