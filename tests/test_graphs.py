"""Loops that a device runs by itself, on a device that is not there (fake_device.py): the same results in every mode as
step by step, nothing waited for inside a step, captures kept and released, and what happens where none can be made."""

import functools
import gc
import random
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import FakeCuda, FakeDevice, NoWaiting, Waited
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scoresde_ext import graphs, integrate, noise, predictors, sampling, sde_lib
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.integrate import Solution, SolverError
from scoresde_ext.integrate.multistep import Adaptive
from scoresde_ext.integrate.runge_kutta import JointOnDevice, PerSample
from scoresde_ext.integrate.stepping import Stepping
from scoresde_ext.models import utils as mutils
from scoresde_ext.ode import precision_floor

SHAPE = (5, 3)
ADAPTIVE: dict[str, dict[str, Any]] = {
    "RK45": {},
    "RK23, per sample": {"method": "RK23", "control": "per_sample"},
    "DOP853": {"method": "DOP853"},
    "RK45 in the angle": {"coordinate": "angle"},
    "RK45 in the angle, per sample": {"coordinate": "angle", "control": "per_sample"},
    "UniPC": {"method": "unipc"},
    "UniPC, per sample": {"method": "unipc", "order": 2, "control": "per_sample"},
}
ON_GRIDS: dict[str, dict[str, Any]] = {
    "heun": {"method": "heun", "steps": 4},
    "UniPC on a grid": {"method": "unipc", "steps": 5},
}
every_mode = pytest.mark.parametrize("options", (ADAPTIVE | ON_GRIDS).values(), ids=ADAPTIVE | ON_GRIDS)
adaptive = pytest.mark.parametrize("options", ADAPTIVE.values(), ids=ADAPTIVE)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(3, 3), 1.0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.linear(x)) + 0.3 * x + 1e-3 * labels[:, None]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    device = FakeDevice()
    monkeypatch.setattr(graphs, "backend_of", lambda _: device)
    return device


def make(graph: str = "auto", sde: Any = None, **options: Any) -> Any:
    settings = {"rtol": 3e-2, "atol": 3e-2, "device": "cpu", "graph": graph} | options
    return sampling.get_ode_sampler(sde or sde_lib.VPSDE(), SHAPE, lambda x: x, **settings)


def z() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 5)[:, None]


FIELDS = ("y", "t", "status", "nfe", "evaluations", "n_accepted", "n_rejected", "times", "step_sizes", "error_norms")


def assert_same(a: Solution, b: Solution, but: tuple[str, ...] = ()) -> None:
    for name in FIELDS:
        one, other = getattr(a, name), getattr(b, name)
        if isinstance(one, Tensor):
            assert name in but or torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)), name
        else:
            assert one == other, name


# ---- results ----


@every_mode
def test_every_mode_gives_the_same_bits(options: dict[str, Any], device: FakeDevice) -> None:
    net, eager = Net(), make("off", **options).solve
    right = eager(net, z())
    assert right.graph == ("off", "asked for")
    for mode in ("while", "replay"):
        sampler = make(mode, **options)
        for _ in range(2):
            solution = sampler.solve(net, z())
            assert_same(solution, right)
        assert solution.graph.mode == ("replay" if options in ON_GRIDS.values() else mode)
    assert len(device.captures) == 2 and all(graph.replays for graph in device.captures)
    assert device.loops == (0 if options in ON_GRIDS.values() else 2)


@every_mode
def test_results_are_the_hosts(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions and counts too. Under joint control the numbers of a step are tensors here and floats there, whose
    functions round differently."""
    net = Net()
    host = make(**options).solve(net, z())
    assert host.graph == graphs.ON_CPU
    monkeypatch.setattr(graphs, "backend_of", lambda _: FakeDevice())
    found = make(**options).solve(net, z())
    if options.get("control") == "per_sample" or options in ON_GRIDS.values():
        assert_same(found, host)
    else:
        assert_same(found, host, but=("y", "t", "times", "step_sizes", "error_norms"))
        for name in ("y", "times", "step_sizes"):
            torch.testing.assert_close(getattr(found, name), getattr(host, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["RK45", "RK23, per sample", "UniPC"])
def test_dense_output_and_full_logs(name: str, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is taken before it is full, and the loop goes on."""
    net, sde = Net(), sde_lib.VPSDE(0.1, 5.0)
    flow = ProbabilityFlow(sde, mutils.get_score_fn(sde, net, continuous=True))

    def solve(mode: str) -> Solution:
        options = {"method": "RK45"} | ADAPTIVE[name]
        return integrate.solve(flow, (1.0, 0.1), z(), t_eval=[0.7, 0.1], rtol=3e-2, atol=3e-2, graph=mode, **options)

    right = solve("off")
    monkeypatch.setattr(Stepping, "LOG", 2)
    for mode in ("while", "replay"):
        found = solve(mode)
        assert_same(found, right)
        assert torch.equal(found.ys, right.ys)
        assert found.ys.isfinite().all()


# ---- nothing waits ----


def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on a step that waits is an error. Returns a list that grows by a name for every step made."""
    made: list[str] = []
    for cls in (PerSample, Adaptive):

        def step(self: Any, plain: Any = cls.step) -> None:
            made.append(type(self).__name__)
            with NoWaiting():
                plain(self)

        monkeypatch.setattr(cls, "step", step)
    return made


@adaptive
def test_nothing_in_a_step_waits(options: dict[str, Any], device: FakeDevice, monkeypatch: Any) -> None:
    made = guarded(monkeypatch)
    for sde in (sde_lib.VPSDE(), sde_lib.subVPSDE()):
        assert make("off", sde, **options).solve(Net(), z()).success
    assert len(made) >= 6


@pytest.mark.parametrize(
    "wait",
    [Tensor.item, Tensor.tolist, Tensor.cpu, bool, float, Tensor.nonzero, lambda t: t[t > 0], Tensor.numpy],
    ids=["item", "tolist", "cpu", "bool", "float", "nonzero", "mask", "numpy"],
)
def test_a_planted_wait_is_found(wait: Any, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded(monkeypatch)
    plain = PerSample.arrive
    monkeypatch.setattr(PerSample, "arrive", lambda self: (wait(self.h[:1]), plain(self)))
    with pytest.raises((Waited, SolverError), match="waits for the device"):
        make("off", control="per_sample").solve(Net(), z())


# ---- failures ----


class Bad(Net):
    """Sample 1 gets ``value`` below t = 0.5, as often as the network is called there."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        out = super().forward(x, labels)
        row = torch.arange(len(x))[:, None] == 1
        return torch.where(row & (labels[:, None] < 499.5), self.value, out)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@adaptive
def test_failures_are_the_hosts(options: dict[str, Any], value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net, options = Bad(value), options | {"on_failure": "status"}
    host = make(**options).solve(net, z())
    assert host.status.tolist() == [0, 1, 0, 0, 0]
    monkeypatch.setattr(graphs, "backend_of", lambda _: FakeDevice())
    for mode in ("off", "replay") if value != value else ("while",):
        found = make(mode, **options).solve(net, z())
        assert torch.equal(found.status, host.status)
        assert torch.equal(found.evaluations[0], host.evaluations[0])
        torch.testing.assert_close(found.y, host.y, rtol=1e-4, atol=1e-5, equal_nan=True)


@adaptive
def test_spent_steps_are_the_hosts(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = options | {"on_failure": "status", "max_steps": 3}
    host = make(**options).solve(Net(), z())
    assert set(host.status.tolist()) == {integrate.Status.MAX_STEPS}
    monkeypatch.setattr(graphs, "backend_of", lambda _: FakeDevice())
    for mode in ("off", "while"):
        found = make(mode, **options).solve(Net(), z())
        assert torch.equal(found.status, host.status)
        assert found.nfe == host.nfe


# ---- choice ----


def test_auto(device: FakeDevice) -> None:
    net = Net()
    assert make().solve(net, z()).graph.mode == "while"
    assert "torch.nn.Module" in make().solve(lambda x, t: -x, z()).graph.why
    assert make("replay").solve(lambda x, t: -x, z()).graph == ("replay", "asked for")
    solution = integrate.solve(lambda t, y: -y, (0.0, 1.0), z())
    assert solution.graph.mode == "off"
    device.missing = "the driver is of CUDA 12.2, 12.4 is needed"
    assert make().solve(net, z()).graph == ("replay", device.missing)
    with pytest.warns(UserWarning, match="'while' is replaced by 'replay', for the driver is of CUDA 12.2"):
        assert make("while").solve(net, z()).graph.mode == "replay"


def test_a_function_around_a_module_is_captured_like_the_module(device: FakeDevice) -> None:
    """One with the same code that holds the same is the same; another tensor, number or module is another."""
    net, sampler, shift = Net(), make(), torch.zeros(3)

    def network(net: nn.Module, shift: Tensor, scale: float) -> Any:
        return lambda x, t: scale * net(x, t) + shift

    def run(*held: Any) -> int:
        assert sampler.solve(network(*held), z()).graph.mode == "while"
        return len(sampler.cache.kept)

    assert [run(net, shift, 1.0), run(net, shift, 1.0)] == [1, 1]
    assert [run(net, shift, 2.0), run(net, shift + 1, 1.0), run(Net(), shift, 1.0)] == [2, 3, 4]
    assert torch.equal(sampler.solve(network(net, shift + 1, 1.0), z()).y, make("off").solve(Shifted(net), z()).y)
    generator = torch.Generator()  # what it would do at each step is not known
    choice = sampler.solve(lambda x, t: net(x, t) * (generator is not None), z()).graph
    assert choice.mode == "off" and "'generator' is a torch._C.Generator" in choice.why


class Shifted(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t) + 1


def test_the_cpu_has_no_graphs() -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("called")

    for graph in ("while", "replay", "fast", None):
        with pytest.raises(ValueError, match="^graph: "):
            make(graph)
        with pytest.raises(ValueError, match="^graph: "):
            integrate.solve(never, (0.0, 1.0), z(), graph=graph)
        with pytest.raises(ValueError, match="^graph: "):
            sampling.get_pc_sampler(sde_lib.VPSDE(), SHAPE, None, None, lambda x: x, 0.1, device="cpu", graph=graph)


class Draws(Net):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x, labels) + 1e-3 * torch.randn_like(x)


class Looks(Net):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x, labels) * (1.0 if labels[0].item() > 0 else 2.0)


class Allocates(Net):
    device: Any = None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.device.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().forward(x, labels)


@pytest.mark.parametrize(
    "network, why",
    [(Draws, "random numbers"), (Looks, "waits for the device"), (Allocates, "not permitted when stream is capturing")],
)
def test_a_network_that_cannot_be_captured(network: Any, why: str, device: FakeDevice) -> None:
    """One message, and the results of eager mode: the generator is where it would be."""
    net = network()
    net.device = device
    torch.manual_seed(5)
    right = make("off").solve(net, z())
    sampler = make()
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=why) as found:
        solution = sampler.solve(net, z())
    assert len(found) == 1
    assert_same(solution, right)
    assert solution.graph.mode == "off" and why in solution.graph.why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampler.solve(net, z()).graph.mode == "off"


class Counts(Net):
    calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, labels)


def test_a_network_that_changes_when_it_is_called(device: FakeDevice) -> None:
    """A graph would not count. It is tried no more, though each call finds another network."""
    net, sampler = Counts(), make()
    with pytest.warns(UserWarning, match="changes 'calls' each time it is called"):
        solution = sampler.solve(net, z())
    assert solution.graph.mode == "off"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sampler_now in (sampler, sampler, make("off")):
            before = net.calls
            assert_same(sampler_now.solve(net, z()), solution)
            assert net.calls - before == solution.nfe + 6  # a step ahead
        assert "changes 'calls'" in sampler.solve(net, z()).graph.why
    plain = Net()
    assert [sampler.solve(plain, z()).graph.mode for _ in range(3)] == ["off", "while", "while"]


HOST_DRAWS: dict[str, Callable[[], Any]] = {
    "Python": lambda: random.random(),
    "numpy": lambda: np.random.rand(),
    "torch": lambda: torch.rand(()),
}


@pytest.mark.parametrize("generator", HOST_DRAWS)
def test_random_numbers_of_the_host(generator: str, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on the device tells that a number is another each time."""
    # The device's generator is another one.
    monkeypatch.setattr(device, "random_state", lambda: torch.zeros(1))
    monkeypatch.setattr(device, "set_random_state", lambda state: None)
    draw = HOST_DRAWS[generator]

    class Drops(Net):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x, labels) * (1.0 + 1e-3 * draw())

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    net = Drops()
    seed()
    right = make("off").solve(net, z())
    seed()
    with pytest.warns(UserWarning, match=f"random numbers from the generator of {generator}"):
        assert_same(make().solve(net, z()), right)


# ---- torch.cuda ----


@pytest.fixture(params=[True, False], ids=["workspaces go with a graph", "workspaces stay"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch, frees=request.param)


class OnCuda(Net):
    """One with products by cuBLAS, and, where it fails, an allocation that a capture does not survive."""

    fails = False

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        torch.cuda.fake.product()  # type: ignore[attr-defined]
        if self.fails:
            torch.cuda.fake.forbidden()  # type: ignore[attr-defined]
        return super().forward(x, labels)


@pytest.mark.parametrize("name", ["RK45", "UniPC, per sample", "heun"])
def test_cuda_gives_the_same_bits(name: str, cuda: FakeCuda) -> None:
    options, net = (ADAPTIVE | ON_GRIDS)[name], OnCuda()
    right = make("off", **options).solve(net, z())
    for mode in ("while", "replay", "auto"):
        sampler = make(mode, **options)
        for _ in range(2):
            assert_same(sampler.solve(net, z()), right)
    assert cuda.modes == ["thread_local"] * 3  # a capture each
    assert cuda.loops == (0 if name == "heun" else 4)
    assert cuda.current is cuda.first


def test_a_capture_that_failed(cuda: FakeCuda) -> None:
    """The first error is said, not that the capture cannot be ended; the thread is back on its stream, and torch's
    generator draws again."""
    net = OnCuda()
    net.fails = True
    with pytest.warns(UserWarning, match="its capture failed .*operation not permitted when stream is capturing"):
        solution = make().solve(net, z())
    assert_same(solution, make("off").solve(net, z()))
    assert cuda.current is cuda.first
    cuda.draw()
    net.fails = False
    assert make().solve(net, z()).graph.mode == "while"


def test_what_a_capture_raises_keeps_its_cause(cuda: FakeCuda) -> None:
    def work() -> None:
        try:
            cuda.forbidden()
        except RuntimeError as error:
            raise ValueError("of the network") from error

    with pytest.raises(ValueError, match="of the network") as raised:
        graphs.Cuda(torch.device("cpu")).capture(work)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert cuda.current is cuda.first


def test_workspaces_of_cublas(cuda: FakeCuda) -> None:
    """All captures of a device are on one stream; each graph works in memory of its own, which no other that goes
    takes along, and nothing stays behind."""
    net, samplers = OnCuda(), [make() for _ in range(3)]
    right = make("off").solve(net, z())
    for sampler in samplers:
        assert_same(sampler.solve(net, z()), right)
        assert not cuda.workspaces
    del samplers[0], sampler
    gc.collect()
    cuda.workspaces.clear()
    for sampler in samplers:
        assert_same(sampler.solve(net, z()), right)
        assert sampler.solve(net, z()).graph.mode == "while"
    assert cuda.streams == {cuda.first, *graphs.Cuda._streams.values()} and len(cuda.streams) == 2
    with pytest.warns(UserWarning, match="its capture failed"):
        net.fails = True
        make().solve(net, z())
    assert set(cuda.workspaces) <= {cuda.first}


def test_one_capture_at_a_time(cuda: FakeCuda) -> None:
    """What another thread rehearsed on the stream of a capture would become part of the graph."""
    free: list[bool] = []

    def work() -> None:
        thread = threading.Thread(target=lambda: free.append(graphs.Cuda._alone.acquire(blocking=False)))
        thread.start()
        thread.join()

    backend = graphs.Cuda(torch.device("cpu"))
    backend.rehearse(work, guarded=False)
    backend.capture(work)
    assert free == [False, False]


def test_a_torch_that_keeps_its_graphs_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, net = FakeCuda(monkeypatch, keeps_graphs=False), OnCuda()
    for _ in range(2):
        solution = make().solve(net, z())
        assert solution.graph.mode == "replay" and "does not give captured graphs out" in solution.graph.why
        assert_same(solution, make("off").solve(net, z()))
    assert len(cuda.modes) == 2


def refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that makes no loop of a captured step."""
    why = "CUDA could not make a loop of the captured step: operation not supported"
    if kind == "torch.cuda":
        found: Any = FakeCuda(monkeypatch)
        found.refuses_loops = why
        return found
    found = FakeDevice(refuses=why)
    monkeypatch.setattr(graphs, "backend_of", lambda _: found)
    return found


@pytest.mark.parametrize("kind", ["a device", "torch.cuda"])
@pytest.mark.parametrize("mode", ["auto", "while"])
def test_a_loop_that_cuda_refuses(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory comes from cudaMallocAsync: the captured step is launched step by step."""
    device = refused(kind, monkeypatch)
    net, sampler = Net(), make(mode)
    right = make("off").solve(net, z())
    with pytest.warns(UserWarning, match="'while' is replaced by 'replay', for .* operation not supported") as said:
        for _ in range(3):
            solution = sampler.solve(net, z())
            assert_same(solution, right)
            assert solution.graph.mode == "replay" and "operation not supported" in solution.graph.why
    assert len(said) == 1
    if kind == "a device":
        assert device.asked == 1 and len(device.captures) == 1


# ---- captured loops are kept ----


def test_captures_are_kept_while_they_are_right(device: FakeDevice) -> None:
    net, other, sampler = Net(), Net(), make()

    def check(network: nn.Module, captures: int) -> None:
        assert_same(sampler.solve(network, z()), make("off").solve(network, z()))
        assert len(device.captures) == captures

    check(net, 1)
    check(net, 1)
    net.linear.weight.data.mul_(0.5)  # in place: the graph reads it
    check(net, 1)
    net.linear.weight = nn.Parameter(0.1 * torch.ones(3, 3))
    check(net, 2)
    net.gain = 0.5
    check(net, 3)
    check(other, 4)
    check(net, 4)
    torch.testing.assert_close(sampler.solve(net, z().double()).y, make("off").solve(net, z().double()).y)
    assert len(device.captures) == 5


def test_conditions_that_are_set_from_call_to_call(device: FakeDevice) -> None:
    """As an attribute, in a dict, in a config, of a function, by a hook: each call samples with its own."""

    class Conditional(Net):
        def __init__(self) -> None:
            super().__init__()
            self.cond, self.named = torch.zeros(3), {"c": torch.zeros(3)}
            self.config = types.SimpleNamespace(shift=0.0)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x, labels) + self.cond + self.named["c"] + self.config.shift + by.shift  # type: ignore[attr-defined]

    def by() -> None: ...

    by.shift = 0.0  # type: ignore[attr-defined]
    net = Conditional()
    hooks: list[Any] = []

    def hooked(value: float) -> None:
        for hook in hooks:
            hook.remove()
        hooks[:] = [net.register_forward_hook(lambda net, inputs, out: out + value)]

    ways: list[Callable[[float], Any]] = [
        lambda value: setattr(net, "cond", torch.full((3,), value)),
        lambda value: net.named.update(c=torch.full((3,), value)),
        lambda value: setattr(net.config, "shift", value),
        lambda value: setattr(by, "shift", value),
        hooked,
    ]
    options: dict[str, Any] = {"method": "euler", "steps": 3}
    for network in (net, functools.partial(net), lambda x, t: net(x, t)):
        for way in ways:
            sampler = make(**options)
            for value in (-5.0, 0.0, 5.0):
                way(value)
                found = sampler.solve(network, z())
                assert found.graph.mode == "replay"
                assert_same(found, make("off", **options).solve(network, z()))
            way(0.0)


def test_captures_that_are_never_used_again(device: FakeDevice) -> None:
    """As many in a row as are kept: then steps run one by one, which is said once, until a network comes again."""
    net, sampler = Net(), make(method="euler", steps=2)
    modes = []
    with pytest.warns(UserWarning, match="was not used again.*copy_") as said:
        for i in range(8):
            net.gain = float(i)
            modes.append(sampler.solve(net, z()).graph.mode)
    assert modes == ["replay"] * 4 + ["off"] * 4 and len(said) == 1
    assert [sampler.solve(net, z()).graph.mode for _ in range(3)] == ["replay"] * 3
    assert len(device.captures) == 5 and len(sampler.cache.kept) == 4
    net.gain = 9.0
    assert sampler.solve(net, z()).graph.mode == "replay"
    by_name = make("replay", method="euler", steps=2)
    for i in range(6):
        net.gain = float(i)
        assert by_name.solve(net, z()).graph == ("replay", "the number of steps is known: nothing has to be asked")
    assert len(by_name.cache.kept) == 4


def test_a_network_that_keeps_something_from_its_first_call_on(device: FakeDevice) -> None:
    class Keeps(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[Any, Tensor] = {}

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            if x.shape not in self.kept:
                self.kept[x.shape] = torch.full_like(x, 0.1)
            return super().forward(x, labels) + self.kept[x.shape]

    net, sampler = Keeps(), make()
    for _ in range(3):
        assert sampler.solve(net, z()).graph.mode == "while"
    assert len(device.captures) == 1


def test_the_sde_and_what_it_holds(device: FakeDevice) -> None:
    class Mine(sde_lib.VPSDE):
        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(speed=[1.0])

        def sde_coefficients(self, t: Any) -> Any:
            f, g = super().sde_coefficients(t)
            return f * self.config.speed[0], g

    sde, net = Mine(), Net()
    sampler = make(sde=sde)
    for speed in (1.0, 0.5):
        sde.config.speed[0] = speed
        for _ in range(2):
            found = sampler.solve(net, z())
            assert found.graph.mode == "while", found.graph
            assert_same(found, make("off", sde).solve(net, z()))
    assert len(device.captures) == 2


# ---- torch's settings ----


@pytest.fixture
def switches() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"


SWITCHES: dict[str, Callable[[], Any]] = {
    "matrix products": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
}
if hasattr(torch.backends, "fp32_precision"):
    SWITCHES |= {
        "new, matrix products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "new, convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        "new, all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    }


@pytest.mark.parametrize("switch", SWITCHES)
def test_precision_switches(switch: str, device: FakeDevice, switches: None) -> None:
    """Those of torch up to 2.8, which cannot be read where one of the newer was set, and the newer."""
    net, sampler = Net(), make()
    flow = ProbabilityFlow(sde_lib.VPSDE(), mutils.get_score_fn(sde_lib.VPSDE(), nn.Linear(3, 3), continuous=True))
    assert precision_floor(flow, torch.device("cuda"), torch.float32)[0] == 0
    sampler.solve(net, z())
    SWITCHES[switch]()
    sampler.solve(net, z())
    sampler.solve(net, z())
    assert len(device.captures) == 2
    rounds = "convolutions" not in switch
    assert precision_floor(flow, torch.device("cuda"), torch.float32)[0] == (1e-4 if rounds else 0)
    flow = ProbabilityFlow(sde_lib.VPSDE(), mutils.get_score_fn(sde_lib.VPSDE(), nn.Conv1d(3, 3, 1), continuous=True))
    assert precision_floor(flow, torch.device("cuda"), torch.float32)[0] == (0 if "convolutions" in switch else 1e-4)


SETTINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "default dtype": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "cudnn.benchmark": lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True),
    "inference mode": lambda: torch.inference_mode(),
    "default device": lambda: torch.device("meta"),
    "hooks of all modules": lambda: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


def test_autocast_on_a_gpu() -> None:
    """What matters is the device of the state; the network has no parameters."""
    device = torch.device("cuda")
    before = graphs.fingerprint(nn.ReLU(), device)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert graphs.fingerprint(nn.ReLU(), device) != before
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert graphs.fingerprint(nn.ReLU(), device) == before


@contextmanager
def _set(function: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    function(value)
    yield
    function(before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_torch(setting: str) -> None:
    """Also for a network without parameters."""
    net = nn.ReLU()
    before = graphs.fingerprint(net, torch.device("cpu"))
    with SETTINGS[setting]():
        assert graphs.fingerprint(net, torch.device("cpu")) != before
    assert graphs.fingerprint(net, torch.device("cpu")) == before


def test_captures_in_inference_mode_are_its_own(device: FakeDevice) -> None:
    """Their memory cannot be written to outside of it."""
    net, sampler = Net(), make()
    right = make("off").solve(net, z())
    for _ in range(2):
        with torch.inference_mode():
            assert_same(sampler.solve(net, z()), right)
        assert_same(sampler.solve(net, z()), right)


def test_a_mode_that_sees_operations_sees_all(device: FakeDevice) -> None:
    sampler, seen = make(), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            assert "FlopCounterMode" in sampler.solve(Net(), z()).graph.why
        seen.append(counter.get_total_flops())
    assert seen[0] == seen[1] > 0 and not device.captures


def test_captures_under_autocast(device: FakeDevice) -> None:
    """A capture reads the weights themselves, not what autocast keeps of them until its context ends."""
    net, sampler = Net(), make(rtol=0.1, atol=0.1)
    for scale in (1.0, 0.5):
        net.linear.weight.data.mul_(scale)
        with torch.autocast("cpu", torch.bfloat16):
            found = sampler.solve(net, z())
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(found, make("off", rtol=0.1, atol=0.1).solve(net, z()))
    assert len(device.captures) == 1
    assert_same(sampler.solve(net, z()), make("off", rtol=0.1, atol=0.1).solve(net, z()))
    assert len(device.captures) == 2


def test_captures_are_released_with_their_sampler(device: FakeDevice) -> None:
    """At once: nothing has to look for cycles."""
    net, sampler = Net(), make()
    sampler.solve(net, z())
    (captured,) = sampler.cache.kept.values()
    memory, condition = weakref.ref(captured.memory[0]), weakref.ref(net.linear.bias)
    del captured
    net.linear.bias = nn.Parameter(torch.zeros(3))
    gc.collect()
    assert memory() is not None and condition() is not None
    device.captures.clear()
    gc.disable()
    try:
        del sampler
        assert memory() is None and condition() is None
    finally:
        gc.enable()


def test_only_the_latest_captures_are_kept(device: FakeDevice) -> None:
    sampler = make("replay", method="euler", steps=2)
    for _ in range(6):
        sampler.solve(Net(), z())
    assert len(sampler.cache.kept) == 4


# ---- predictor and corrector ----


def pc(graph: str, **options: Any) -> Any:
    predictor, corrector = sampling.get_predictor("reverse_diffusion"), sampling.get_corrector("langevin")
    return sampling.get_pc_sampler(
        sde_lib.VPSDE(0.1, 2.0, 7), SHAPE, predictor, corrector, lambda x: x, 0.1, device="cpu", continuous=True,
        graph=graph, **options,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"seeds": 3}, {"seeds": (3, [4, 1, 9, 0, 2])}, {"grid": [1.0, 0.4, 1e-3]}])
def test_predictor_and_corrector(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    monkeypatch.setattr(predictors, "check_inputs", lambda *_: None)  # looks at the times, on the CPU alone
    torch.manual_seed(2)
    right, second = pc("auto", **options)(net), pc("auto", **options)(net)
    device = FakeDevice()
    monkeypatch.setattr(graphs, "backend_of", lambda _: device)
    for mode in ("off", "replay", "auto"):
        sampler = pc(mode, **options)
        torch.manual_seed(2)
        for wanted in (right, second):
            samples, n = sampler(net)
            assert torch.equal(samples, wanted[0]) and n == wanted[1]
        assert sampler.graph.mode == ("off" if mode == "off" else "replay")
    assert len(device.captures) == 2
    # Twice seven steps, the last of which is no part of the graph: it alone makes a mean.
    assert {graph.replays for graph in device.captures} == {2 if "grid" in options else 12}


def test_steps_that_a_graph_would_not_repeat(device: FakeDevice) -> None:
    class Mine(sampling.ReverseDiffusionPredictor):
        pass

    sampler = sampling.get_pc_sampler(sde_lib.VPSDE(0.1, 1.0, 2), SHAPE, Mine, None, lambda x: x, 0.1, device="cpu")
    sampler(Net())
    assert "of your own" in sampler.graph.why
    sampler = pc("auto")
    with noise.replay([torch.randn(SHAPE) for _ in range(15)]):
        sampler(Net())
    assert "recorded noise" in sampler.graph.why
    assert not device.captures


def test_the_devices_control_is_used(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    made = guarded(monkeypatch)
    make("off").solve(Net(), z())
    assert set(made) == {JointOnDevice.__name__}
