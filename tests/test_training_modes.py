"""The training losses under autocast and under DistributedDataParallel. (torch.compile: test_compile.py; CUDA graphs:
test_gpu_loops.py.)"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scoresde_ext import losses, noise, sde_lib

SDES = {"vp": sde_lib.VPSDE(), "subvp": sde_lib.subVPSDE(), "ve": sde_lib.VESDE(0.1, 5.0)}
SIZE, RANKS = 8, 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layers(x) + 1e-3 * labels[:, None].to(x.dtype)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def make_batch() -> Tensor:
    return torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(1))


def loss_of(kind: str, net: nn.Module, batch: Tensor, first: int = 0) -> Tensor:
    """The loss; sample i of the batch has the noise of stream ``first + i``."""
    with noise.seeds(3, range(first, first + len(batch))):
        return losses.get_sde_loss_fn(SDES[kind], train=True, likelihood_weighting=False)(net, batch)


@pytest.mark.parametrize("kind", SDES)
def test_autocast(kind: str) -> None:
    """The network computes in bfloat16; loss and gradients are float32, and those of float32 to its rounding."""
    net, batch, seen = make_net(), make_batch(), []
    net.layers[2].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    right = loss_of(kind, net, batch)
    gradients = torch.autograd.grad(right, list(net.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(kind, net, batch)
    assert seen == [torch.float32, torch.bfloat16]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, right, rtol=3e-2, atol=0)
    for a, b in zip(torch.autograd.grad(found, list(net.parameters())), gradients, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.03 * b.abs().max().item())


def train_on(rank: int, folder: str) -> None:
    """One rank's part of a batch; the gradients that it ends with are written down."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        net, part = nn.parallel.DistributedDataParallel(make_net()), SIZE // RANKS
        gradients = []
        for kind in SDES:
            net.zero_grad()
            loss_of(kind, net, make_batch()[rank * part :][:part], first=rank * part).backward()
            gradients.append([p.grad.clone() for p in net.parameters()])
        torch.save(gradients, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp(tmp_path: Path) -> None:
    """Two ranks with half a batch each end with the gradients of the whole: the noise goes with the sample."""
    torch.multiprocessing.spawn(train_on, (str(tmp_path),), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    net = make_net()
    for i, kind in enumerate(SDES):
        right = torch.autograd.grad(loss_of(kind, net, make_batch()), list(net.parameters()))
        for gradients in found:
            for a, b in zip(gradients[i], right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
