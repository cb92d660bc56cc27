"""The small operations between operators, against torch's."""

import math

import pytest
import torch
from torch import Tensor

from scoresde_ext import integrate, sde_lib
from scoresde_ext._C import host
from scoresde_ext.integrate import time_vector
from scoresde_ext.models import utils as mutils

DTYPES = (torch.float32, torch.float64)


def columns(dtype: torch.dtype) -> list[Tensor]:
    """Of several lengths, contiguous and not."""
    return [v for n in (1, 2, 7, 1000) for v in (torch.rand(n, dtype=dtype), torch.rand(n, 3, dtype=dtype)[:, 1])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_filled(dtype: torch.dtype) -> None:
    for n in (0, 1, 5, 300):
        for number in (0.1, -0.0, math.inf, 1e38, 1e-46):
            assert torch.equal(host.filled(n, number, dtype == torch.float64), torch.full((n,), number, dtype=dtype))


def test_next_draw() -> None:
    key = torch.tensor([7, 2**40])
    assert host.next_draw(key).tolist() == [7, 2**40 + 1]
    assert key.tolist() == [7, 2**40]
    with pytest.raises(ValueError, match="key: expected"):
        host.next_draw(torch.tensor([7]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_extremes(dtype: torch.dtype) -> None:
    for v in columns(dtype):
        assert host.total(v) == pytest.approx(v.double().sum().item(), rel=1e-14)
        assert host.extremes(v) == (v.min().item(), v.max().item())
        w = torch.rand(len(v), dtype=dtype)
        wanted = v.double().sqrt().sum() / w.double().sqrt().sum()
        assert host.norm_ratio(v, w) == pytest.approx(wanted.item(), rel=torch.finfo(dtype).eps)
    v[3] = math.nan
    assert all(math.isnan(end) for end in host.extremes(v)) and math.isnan(host.total(v))
    zeros = torch.zeros(3, dtype=dtype)
    assert host.norm_ratio(torch.ones(3), zeros) == math.inf and math.isnan(host.norm_ratio(zeros, zeros))
    for wrong in (torch.rand(2, 2), torch.rand(2, device="meta")):
        with pytest.raises(ValueError, match="numbers: expected"):
            host.total(wrong)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_labels_of_one_time(dtype: torch.dtype) -> None:
    """To the bit those of a column of times."""
    like = torch.empty(3, 5, dtype=dtype)
    for sde in (sde_lib.VPSDE(), sde_lib.subVPSDE(), sde_lib.VESDE()):
        for continuous in (True, False):
            score_fn = mutils.get_score_fn(sde, lambda x, labels: x, continuous=continuous)
            for t in (1e-5, 0.1, 1 / 3, 0.9999, 1.0):
                label, labels = score_fn.label(t, like), score_fn.labels(time_vector(t, like))
                assert torch.equal(label, labels) and label.dtype == labels.dtype and label.shape == (3,)


def test_transformed_programs_have_torch_s_operations() -> None:
    """What torch.func wraps has no memory to look at."""
    sde = sde_lib.VPSDE()
    score_fn = mutils.get_score_fn(sde, lambda x, labels: x * labels[:, None], continuous=True)
    x, t = torch.rand(3, 4), torch.full((3,), 0.5)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return score_fn(x, t + torch.zeros(3)).sum()

    by_x, by_t = torch.func.grad(score, argnums=(0, 1))(x, t)
    x.requires_grad_(), t.requires_grad_()
    wanted = torch.autograd.grad(score(x, t), (x, t))
    torch.testing.assert_close((by_x, by_t), wanted)
    solve = torch.func.grad(lambda x: integrate.solve(lambda t, y: -y, (0.0, 1.0), x).y.sum())
    assert torch.equal(solve(x.detach()), torch.zeros(3, 4))


def test_numbers_that_are_negated_when_they_are_read() -> None:
    """As torch.neg and conj().imag leave them; and zeros that have no memory."""
    for dtype in DTYPES:
        for column in columns(dtype):
            negated = torch._neg_view(-column)
            assert host.extremes(negated) == host.extremes(column)
            assert host.total(negated) == host.total(column)
            assert host.norm_ratio(negated, column) == 1.0
        assert host.extremes(torch._efficientzerotensor((5,), dtype=dtype)) == (0.0, 0.0)
    t = torch.complex(torch.zeros(3), -torch.rand(3)).conj().imag
    x = torch.ones(3, 2)
    assert torch.equal(sde_lib.VPSDE().sde(x, t)[0], sde_lib.VPSDE().sde(x, t.resolve_neg())[0])
