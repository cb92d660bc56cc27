"""torch.compile around a function that samples: a graph break, and the numbers of eager mode."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from every_run import SHAPE, VP, data, found, runs, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from scoresde_ext import encoding, integrate, sampling


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0.1 * self.linear(x) + 0.3 * x + 1e-2 * torch.sin(labels)[:, None]


def streamed(model: Any) -> Tensor:
    sampler = sampling.get_ode_sampler(
        VP, SHAPE, same, rtol=1e-2, atol=1e-2, device="cpu", control="per_sample", seeds=0
    )
    return torch.cat([group.y for group in sampler.stream(model, 2)])


MORE: dict[str, Callable[[Any], Tensor]] = {
    "integrate.solve": lambda model: integrate.solve(lambda t, y: model(y, t).detach(), (0.0, 1.0), data()).y,
    "interpolate": lambda model: encoding.interpolate(VP, model, data(), -data(), 2, rtol=1e-2, atol=1e-2),
    "calibrate_grid": lambda model: torch.tensor(
        sampling.calibrate_grid(VP, model, SHAPE, nfe=3, samples=4, device="cpu").times
    ),
    "stream": streamed,
}
RUNS = {name: run for name, run in runs().items() if name != "loss"} | MORE  # losses: test_compile.py


@pytest.mark.parametrize("name", RUNS)
def test_a_compiled_function_that_samples(name: str) -> None:
    run, net = RUNS[name], Net().eval()
    counter = CompileCounter()

    def around(scale: Tensor) -> Tensor:
        return run(net) * scale.exp()

    scale = torch.ones(())
    torch.manual_seed(5)
    compiled = torch.compile(around, backend=counter)(scale)
    assert torch.equal(compiled, found(lambda _: around(scale), net))
    assert counter.frame_count <= 2  # what stands around the run


def test_a_compiled_network_stays_compiled() -> None:
    counter = CompileCounter()
    net = Net().eval()
    compiled = torch.compile(net, backend=counter)
    run = runs()["unipc in steps"]
    torch.manual_seed(5)
    assert torch.equal(torch.compile(lambda: run(compiled), backend="eager")(), found(run, net))
    assert counter.frame_count >= 1


def test_sampling_does_not_import_the_compiler() -> None:
    """It takes seconds."""
    program = (
        "import sys; from scoresde_ext import sampling, sde_lib; "
        "sampling.get_ode_sampler(sde_lib.VPSDE(), (1, 2), lambda x: x, steps=1, method='heun', device='cpu')"
        "(lambda x, labels: 0.5 * x); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
