"""Training under autocast, DistributedDataParallel and FSDP. (torch.compile: test_compile.py; CUDA graphs:
test_gpu_loops.py.)"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scoresde_ext import losses, noise, sde_lib
from scoresde_ext.models.ema import ExponentialMovingAverage

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


OPTIM = SimpleNamespace(optimizer="Adam", lr=0.1, beta1=0.9, eps=1.0, weight_decay=0.0, warmup=0, grad_clip=1e-3)


def trained(net: nn.Module, spoilt: bool) -> tuple[list[list[Tensor]], str]:
    """Gradients, weights and averages after two steps, and the error of a third with Inf in a gradient."""
    config, parameters = SimpleNamespace(optim=OPTIM), list(net.parameters())
    average = ExponentialMovingAverage(parameters, 0.9)
    state = {"model": net, "optimizer": losses.get_optimizer(config, parameters), "ema": average, "step": 0}
    step_fn = losses.get_step_fn(SDES["vp"], True, losses.optimization_manager(config), reduce_mean=True)
    for step in range(2):
        with noise.seeds(step, range(SIZE)):
            step_fn(state, make_batch())
    after = [
        [t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for t in tensors]
        for tensors in ([p.grad for p in parameters], parameters, average.shadow_params)
    ]
    if spoilt:
        parameters[-1].register_post_accumulate_grad_hook(lambda p: p.grad.mul_(torch.inf))
    try:
        step_fn(state, make_batch())
    except FloatingPointError as error:
        return after, str(error)
    return after, ""


def train_on(rank: int, folder: str) -> None:
    """One rank's part of a batch, then one rank's part of the weights; what it ends with is written down."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        net, part = nn.parallel.DistributedDataParallel(make_net()), SIZE // RANKS
        gradients = []
        for kind in SDES:
            net.zero_grad()
            loss_of(kind, net, make_batch()[rank * part :][:part], first=rank * part).backward()
            gradients.append([p.grad.clone() for p in net.parameters()])
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
        sharded = trained(fully_shard(make_net(), mesh=mesh), spoilt=rank == 1)
        torch.save({"ddp": gradients, "fsdp": sharded}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(train_on, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_ddp(ranks: list[dict[str, Any]]) -> None:
    """Two ranks with half a batch each end with the gradients of the whole: the noise goes with the sample."""
    net = make_net()
    for i, kind in enumerate(SDES):
        right = torch.autograd.grad(loss_of(kind, net, make_batch()), list(net.parameters()))
        for found in ranks:
            for a, b in zip(found["ddp"][i], right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fsdp(ranks: list[dict[str, Any]]) -> None:
    """Each rank holds a part of every weight. The norm is that of the whole gradient; where one rank meets Inf, all
    stop."""
    right, _ = trained(make_net(), spoilt=False)
    gradients, _, _ = right
    assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(1e-3, rel=1e-2)  # clipped
    for found in ranks:
        after, error = found["fsdp"]
        torch.testing.assert_close(after, right, rtol=1e-4, atol=1e-7)
        assert error.startswith("step 2: expected a finite gradient")
