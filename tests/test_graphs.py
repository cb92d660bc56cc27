"""Loops that a device runs by itself, on a device that is not there (fake_device.py): the same results in every mode as
step by step, nothing waited for inside a step, captures kept and released, and what happens where none can be made."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, NoWaiting, Waited
from torch import Tensor, nn

from scoresde_ext import graphs, integrate, noise, predictors, sampling, sde_lib
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.integrate import Solution, SolverError
from scoresde_ext.integrate.multistep import Adaptive
from scoresde_ext.integrate.runge_kutta import JointOnDevice, PerSample
from scoresde_ext.integrate.stepping import Stepping
from scoresde_ext.models import utils as mutils

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
    assert torch.equal(sampler.solve(network(net, shift + 1, 1.0), z()).y, sampler.solve(Shifted(net), z()).y)
    generator = torch.Generator()  # what it would do at each step is not known
    assert "torch.nn.Module" in sampler.solve(lambda x, t: net(x, t) * (generator is not None), z()).graph.why


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
    net, sampler = Net(), make()
    sampler.solve(net, z())
    (captured,) = sampler.cache.kept.values()
    memory = weakref.ref(captured.memory[0])
    del captured, net
    gc.collect()
    assert memory() is not None
    del sampler
    gc.collect()
    device.captures.clear()
    gc.collect()
    assert memory() is None


def test_only_the_latest_captures_are_kept(device: FakeDevice) -> None:
    sampler = make(method="euler", steps=2)
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
