"""Sampling and training on a GPU: loops in graphs, nothing waited for inside a step, the CPU's results.

No GPU has run these yet. What they ask is asked of a recorded CPU in test_graphs.py.
"""

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_check.smoke import Net
from scoresde_ext import graphs, integrate, losses, noise, ops, sampling, sde_lib
from scoresde_ext.integrate.multistep import Adaptive
from scoresde_ext.integrate.runge_kutta import PerSample
from scoresde_ext.ops import Draw

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: loops have not been run on a GPU", allow_module_level=True)

DEVICE = torch.device("cuda")
OPTIONS: dict[str, dict[str, Any]] = {
    "RK45": {},
    "RK45, per sample": {"control": "per_sample"},
    "RK45 in the angle": {"coordinate": "angle"},
    "UniPC": {"method": "unipc"},
    "UniPC, per sample": {"method": "unipc", "control": "per_sample"},
    "heun": {"method": "heun", "steps": 5},
    "UniPC on a grid": {"method": "unipc", "steps": 8},
}
every_method = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def plain_float32() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def make(graph: str, device: Any = DEVICE, **options: Any) -> Any:
    settings = {"rtol": 1e-3, "atol": 1e-3, "device": device, "graph": graph, "seeds": 0} | options
    return sampling.get_ode_sampler(sde_lib.VPSDE(0.1, 5.0), (33, 6), lambda x: x, **settings)


@every_method
def test_every_mode_gives_the_same_bits(options: dict[str, Any]) -> None:
    net = Net().to(DEVICE)
    right = make("off", **options).solve(net)
    assert right.graph == ("off", "asked for")
    for mode in ("while", "replay", "auto"):
        sampler = make(mode, **options)
        for _ in range(2):
            found = sampler.solve(net)
            assert torch.equal(found.y, right.y) and found.nfe == right.nfe
            assert torch.equal(found.times.nan_to_num(-1), right.times.nan_to_num(-1))
        assert found.graph.mode in ("while", "replay")
        if "steps" not in options and not graphs.Cuda(DEVICE).loops_missing() and mode != "replay":
            assert found.graph.mode == "while"


@every_method
def test_results_are_the_cpus(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    net = Net()
    here = make("off", "cpu", **options).solve(net)
    there = make("auto", **options).solve(net.to(DEVICE))
    assert there.nfe == here.nfe
    torch.testing.assert_close(there.y.cpu(), here.y, rtol=1e-3, atol=1e-3)


@every_method
def test_nothing_in_a_step_waits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    for cls in (PerSample, Adaptive):

        def step(self: Any, plain: Any = cls.step) -> None:
            nonlocal steps
            steps += 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                plain(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(cls, "step", step)
    assert make("off", **options).solve(Net().to(DEVICE)).success
    assert steps > 0 or "steps" in options


@pytest.mark.parametrize("what", ["draws", "waits"])
def test_a_network_that_cannot_be_captured(what: str) -> None:
    class Bad(Net):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            out = super().forward(x, labels)
            return out + 1e-3 * torch.randn_like(x) if what == "draws" else out * float(labels[0] >= 0)

    net = Bad().to(DEVICE)
    torch.manual_seed(1)
    right = make("off").solve(net)
    torch.manual_seed(1)
    sampler = make("auto")
    with pytest.warns(UserWarning, match="random numbers" if what == "draws" else "waits for the device"):
        found = sampler.solve(net)
    assert torch.equal(found.y, right.y) and found.graph.mode == "off"


class Conditional(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cond, self.config = torch.zeros(6), {"shift": 0.0}

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x, labels) + self.cond + self.config["shift"]


def test_each_call_samples_with_its_own_condition() -> None:
    net, sampler = Conditional().to(DEVICE), make("auto")
    for value in (-0.5, 0.0, 0.5):
        net.cond, net.config["shift"] = torch.full((6,), value, device=DEVICE), 0.1 * value
        for _ in range(2):
            found = sampler.solve(net)
            assert found.graph.mode != "off" and torch.equal(found.y, make("off").solve(net).y)
    captures = len(sampler.cache.kept)
    net.cond.fill_(0.3)
    assert torch.equal(sampler.solve(net).y, make("off").solve(net).y)
    assert len(sampler.cache.kept) == captures == 3


def test_a_capture_that_failed() -> None:
    """The first error is said; the thread is on its stream, and torch's generator draws, as before."""

    class Bad(Net):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            if torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return super().forward(x, labels)

    net, stream = Bad().to(DEVICE), torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="its capture failed"):
        found = make("auto").solve(net)
    assert "previous error" not in found.graph.why and "Capture must end" not in found.graph.why
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device=DEVICE).isfinite().all()
    net = Net().to(DEVICE)
    assert torch.equal(make("auto").solve(net).y, make("off").solve(net).y)


def test_graphs_that_outlive_others() -> None:
    """None works in memory of cuBLAS that goes with another."""
    net, samplers = Net().to(DEVICE), [make("auto") for _ in range(3)]
    right = make("off").solve(net).y
    for sampler in samplers:
        sampler.solve(net)
    del samplers[0], sampler
    torch.cuda.empty_cache()
    rubbish = [torch.full((2**20,), math.nan, device=DEVICE) for _ in range(32)]
    for sampler in samplers:
        assert torch.equal(sampler.solve(net).y, right)
    assert all(t.isnan().all() for t in rubbish)


def test_captures_beside_a_thread_that_pins_memory() -> None:
    net, stop = Net().to(DEVICE), threading.Event()

    def pin() -> None:
        while not stop.is_set():
            torch.empty(2**16).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(3):
            assert make("auto").solve(net).graph.mode != "off"
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", ["vp", "ve"])
@pytest.mark.parametrize("options", [{}, {"seeds": 3}, {"grid": [1.0, 0.5, 0.1, 1e-3]}])
def test_predictor_and_corrector(kind: str, options: dict[str, Any]) -> None:
    sde = sde_lib.VPSDE(0.1, 2.0, 20) if kind == "vp" else sde_lib.VESDE(0.01, 5.0, 20)
    predictor, corrector = sampling.get_predictor("reverse_diffusion"), sampling.get_corrector("langevin")
    net, found = Net().to(DEVICE), []
    for mode in ("off", "replay", "auto"):
        sampler = sampling.get_pc_sampler(
            sde, (9, 6), predictor, corrector, lambda x: x, 0.1, device=DEVICE, continuous=True, graph=mode, **options
        )
        for _ in range(2):
            torch.manual_seed(4)
            found.append(sampler(net)[0])
        assert sampler.graph.mode == ("off" if mode == "off" else "replay")
    assert all(torch.equal(found[0], x) for x in found)


def test_the_digits_are_the_cpus() -> None:
    benchmarks = pytest.importorskip("benchmarks.problems")
    network = benchmarks.digits_network("vp")
    found = []
    for device in ("cpu", "cuda"):
        sampler = sampling.get_ode_sampler(
            sde_lib.VPSDE(), (16, 1, 8, 8), lambda x: x, rtol=1e-4, atol=1e-4, device=device, seeds=0
        )
        found.append(sampler.solve(network.to(device)))
    here, there = found
    assert abs(there.nfe - here.nfe) <= 12
    torch.testing.assert_close(there.y.cpu(), here.y, rtol=0, atol=5e-3)


def test_a_failed_sample_is_named() -> None:
    class Bad(Net):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            row = torch.arange(len(x), device=x.device)[:, None] == 3
            return torch.where(row & (labels[:, None] < 500), math.nan, super().forward(x, labels))

    for mode in ("off", "replay", "while"):
        for control in ("joint", "per_sample"):
            found = make(mode, control=control, on_failure="status").solve(Bad().to(DEVICE))
            assert found.status.tolist() == [int(i == 3) for i in range(33)]


def test_the_memory_of_captured_loops_is_given_back() -> None:
    net = Net().to(DEVICE)
    make("while").solve(net)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        make("while").solve(net)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("op", ["perturb", "affine_noise", "score_loss"])
def test_noise_of_channels_last_is_made_in_place(op: str) -> None:
    """The same numbers, and no other memory than the results'."""
    x = torch.randn(4, 8, 64, 64, device=DEVICE)
    last, key = x.to(memory_format=torch.channels_last), Draw(key=torch.tensor([3, 4], device=DEVICE))
    c = torch.rand(4, device=DEVICE)
    call = {
        "perturb": lambda x: (ops.perturb(x, c, c, key),),
        "affine_noise": lambda x: ops.affine_noise(x, x, c, c, c, key),
        "score_loss": lambda x: (ops.score_loss(x, c, c, c, key),),
    }[op]
    right = call(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = call(last)
    results = sum(r.numel() * r.element_size() for r in found)
    assert torch.cuda.max_memory_allocated() - before <= results + 2**16
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if op == "score_loss" else 0, atol=0)


# ---- training ----


def loss_of(batch: Tensor, net: nn.Module) -> Tensor:
    return losses.get_sde_loss_fn(sde_lib.VPSDE(), train=True)(net, batch)


def test_the_loss_in_a_graph_of_the_users() -> None:
    """Every replay draws other noise, and gives what eager mode gives for the same draws."""
    net, batch = Net().to(DEVICE), torch.randn(16, 6, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            loss_of(batch, net).backward()
    torch.cuda.current_stream().wait_stream(stream)
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(batch, net)
        loss.backward()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append((loss.clone(), [p.grad.clone() for p in net.parameters()]))
    assert len({value.item() for value, _ in seen}) == 3
    assert all(g.isfinite().all() for _, grads in seen for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_under_autocast(dtype: torch.dtype) -> None:
    net, batch = Net().to(DEVICE), torch.randn(16, 6, device=DEVICE)
    with noise.seeds(0, range(16)):
        right = loss_of(batch, net)
    with torch.autocast("cuda", dtype), noise.seeds(0, range(16)):
        found = loss_of(batch, net)
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)


def test_the_compiled_loss() -> None:
    net, batch = Net().to(DEVICE), torch.randn(16, 6, device=DEVICE)
    with noise.seeds(0, range(16)):
        right = loss_of(batch, net)
    with noise.seeds(0, range(16)):
        found = torch.compile(loss_of, fullgraph=True)(batch, net)
    torch.testing.assert_close(found, right)


def test_training_under_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(Net().to(DEVICE), device_ids=[0])
        loss_of(torch.randn(16, 6, device=DEVICE), net).backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_an_integral_on_the_gpu() -> None:
    y0 = torch.linspace(0.5, 2.0, 7, device=DEVICE)[:, None]
    for graph in ("off", "replay", "while"):
        found = integrate.solve(lambda t, y: -y, (0.0, 1.0), y0, rtol=1e-6, atol=1e-6, graph=graph)
        torch.testing.assert_close(found.y, y0 * math.exp(-1.0), rtol=1e-4, atol=1e-5)
