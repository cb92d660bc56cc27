"""Networks as people write them: exported, scripted and compiled modules, functions around modules, networks that write
to their input, and that return the same memory every time."""

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from every_run import SHAPE, VP, OwnSDE, Run, data, found, runs, same
from flows import CosineSDE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from scoresde_ext import (
    controllable_generation,
    encoding,
    integrate,
    likelihood,
    losses,
    reach,
    sampling,
    sde_lib,
    stochastic,
)
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.models import utils as mutils
from scoresde_ext.ode import precision_floor


class Net(nn.Module):
    """Training mode shows: half of the elements are dropped, and the running mean moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * x + 0.1 * self.norm(self.drop(self.linear(x))) + 1e-3 * torch.sin(labels)[:, None].to(x.dtype)


def make_net(train: bool = False) -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 3), torch.ones(64))  # running statistics
    return net.train(train)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# --- modules of every kind --------------------------------------------------------------------------------------------


def example() -> tuple[Tensor, Tensor]:
    return data(), torch.linspace(1, 999, 4)


KINDS: dict[str, Callable[[Net], Any]] = {
    "exported": lambda net: torch.export.export(net, example()).module(),
    "holding an exported one": lambda net: Holding(torch.export.export(net, example()).module()),
    "scripted": lambda net: torch.jit.script(net),
    "frozen": lambda net: torch.jit.freeze(torch.jit.script(net)),
    "traced": lambda net: torch.jit.trace(net, example()),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "compiled function": lambda net: torch.compile(lambda x, labels: net(x, labels), backend="eager"),
    "DataParallel": lambda net: nn.DataParallel(net),
    "partial": lambda net: functools.partial(lambda net, x, labels: net(x, labels), net),
}


class Holding(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.drop, self.net = nn.Dropout(0.5), net

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net(self.drop(x), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_every_kind(kind: str) -> None:
    """All give the numbers of the module itself, in silence."""
    net = make_net()
    made = KINDS[kind](net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("pc", "RK45", "unipc", "SDE", "likelihood", "loss"):
            torch.testing.assert_close(found(runs()[name], made), found(runs()[name], net), rtol=1e-5, atol=1e-6)


def test_an_exported_network_says_what_it_cannot_do() -> None:
    """Its dropout stays as it was recorded: one warning for a network, none where it has nothing of the kind."""
    trained = torch.export.export(make_net(train=True), example()).module()
    with pytest.warns(UserWarning, match=r"^model: it was exported in training mode .* in evaluation mode\.$") as said:
        sampler = sampling.get_pc_sampler(VP, SHAPE, None, None, same, 0.1, device="cpu")
        sampler(trained), sampler(trained)
    assert [warning.filename for warning in said] == [__file__]
    loss_fn = losses.get_sde_loss_fn(VP, train=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(trained, data())
    with pytest.warns(UserWarning, match="exported in evaluation mode"):
        loss_fn(torch.export.export(make_net(), example()).module(), data())


class Sealed(nn.Linear):
    """A part whose mode cannot be set."""

    def train(self, mode: bool = True) -> "Sealed":
        raise RuntimeError("sealed")


def test_the_other_parts_take_their_mode() -> None:
    net = Holding(nn.Sequential(Sealed(3, 3), nn.Dropout(0.5)))
    with pytest.warns(UserWarning, match=r"^model: its part Sealed cannot be put into evaluation mode \(sealed\)"):
        mutils.set_mode(net, train=False)
    assert not (net.training or net.drop.training or net.net.training or net.net[1].training)


def test_only_a_network_in_another_mode_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    monkeypatch.setattr(Net, "train", lambda *_: pytest.fail("switched"))
    mutils.set_mode(net, train=False)
    monkeypatch.undo()
    net.drop.train()  # a part alone
    mutils.set_mode(net, train=False)
    assert not net.drop.training


# --- modules behind functions -----------------------------------------------------------------------------------------

the_global: Any = None


def call_the_global(x: Tensor, labels: Tensor) -> Tensor:
    return the_global(x, labels)


class Callable_:
    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, labels)

    def method(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, labels)


class Slots:
    __slots__ = ("net", "unset")

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, labels)


class ReadsAGlobal:
    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        return the_global(x, labels)


def default(net: Any) -> Any:
    def network(x: Tensor, labels: Tensor, net: Any = net) -> Tensor:
        return net(x, labels)

    return network


def keyword_default(net: Any) -> Any:
    def network(x: Tensor, labels: Tensor, *, net: Any = net) -> Tensor:
        return net(x, labels)

    return network


def inner_reader(net: Any) -> Any:
    return lambda x, labels: (lambda: the_global(x, labels))()


def of_a_module(net: Any) -> Any:
    module = types.ModuleType("somebodys")
    module.net = net  # type: ignore[attr-defined]
    scope = {"somebodys": module, "__name__": "another"}
    exec("def network(x, labels): return somebodys.net(x, labels)", scope)
    return scope["network"]


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "closure": lambda net: lambda x, labels: net(x, labels),
    "default": default,
    "keyword default": keyword_default,
    "partial": lambda net: functools.partial(lambda net, x, labels: net(x, labels), net),
    "partial by keyword": lambda net: functools.partial(lambda x, labels, net: net(x, labels), net=net),
    "bound method": lambda net: Callable_(net).method,
    "method of the module": lambda net: net.forward,
    "object": Callable_,
    "object with slots": Slots,
    "object that reads a global": lambda net: ReadsAGlobal(),
    "decorated": lambda net: torch.no_grad()(lambda x, labels: net(x, labels)),
    "cached": lambda net: functools.lru_cache(Callable_(net)),
    "global": lambda net: lambda x, labels: the_global(x, labels),
    "global of a helper": lambda net: lambda x, labels: call_the_global(x, labels),
    "global of an inner function": inner_reader,
    "attribute of a module": of_a_module,
    "list": lambda net: (lambda nets: lambda x, labels: nets[0](x, labels))([net]),
    "dictionary": lambda net: (lambda nets: lambda x, labels: nets["net"](x, labels))({"net": net}),
    "attribute of an object": lambda net: (lambda kept: lambda x, labels: kept.net(x, labels))(Callable_(net)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_module_behind_a_function_is_sampled_in_evaluation_mode(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, right = make_net(train=True), make_net()
    monkeypatch.setitem(globals(), "the_global", net)
    network = WRAPPED[how](net)
    assert reach.modules_of(network) == (net,)
    for name in ("pc", "unipc in steps"):
        assert torch.equal(found(runs()[name], network), found(runs()[name], right))
    assert not net.drop.training and torch.equal(net.norm.running_mean, right.norm.running_mean)
    losses.get_sde_loss_fn(VP, train=True)(network, data())
    assert net.training and net.drop.training


def test_a_frozen_teacher_keeps_its_mode_in_training() -> None:
    student, teacher = make_net(), make_net()
    teacher.requires_grad_(False)

    def network(x: Tensor, labels: Tensor) -> Tensor:
        return student(x, labels) + teacher(x, labels)

    losses.get_sde_loss_fn(VP, train=True)(network, data())
    assert student.training and not teacher.training
    mutils.set_mode(network, train=True)
    assert not teacher.training
    teacher.train()
    mutils.set_mode(network, train=False)
    assert not (student.training or teacher.training)


def test_a_module_behind_a_function_gives_its_dtype() -> None:
    """Inputs are cast for it, and the tolerance is held at its rounding."""
    net, seen = make_net().bfloat16(), []

    def network(x: Tensor, labels: Tensor) -> Tensor:
        seen.append((x.dtype, labels.dtype))
        return net(x, labels.to(x.dtype))

    with pytest.warns(UserWarning, match="rtol, atol: held at 0.001"):
        assert found(sampling_at(1e-6), network).dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    both = mutils.CheckedNetwork(lambda x, labels: net(x, labels) + Net.forward(make_net(), x, labels))
    assert both.dtype == torch.bfloat16
    other = make_net()
    assert mutils.CheckedNetwork(lambda x, labels: net(x, labels) + other(x, labels)).dtype is None  # which of them?


def sampling_at(tolerance: float) -> Run:
    sampler = sampling.get_ode_sampler(VP, SHAPE, same, rtol=tolerance, atol=tolerance, device="cpu")
    return lambda model: sampler(model)[0]


def test_convolutions_behind_a_function_are_known_to_round_to_tf32() -> None:
    net = nn.Conv1d(1, 1, 1)
    for model, floor in ((lambda x, labels: net(x), 1e-4), (lambda x, labels: x, 0.0)):
        flow = ProbabilityFlow(VP, mutils.get_score_fn(VP, model, continuous=True))
        assert precision_floor(flow, torch.device("cuda"), torch.float32)[0] == floor


class Trap:
    """Looking for modules must not run anything of this."""

    def __init__(self) -> None:
        self.itself, self.many = self, list(range(10_000))

    @property
    def net(self) -> Any:
        raise AssertionError("run")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("run")

    def __iter__(self) -> Any:
        raise AssertionError("run")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("run")

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * x


def test_the_search_runs_nothing_and_ends() -> None:
    trap = Trap()
    assert reach.modules_of(trap) == () and len(reach.reached(trap)) <= reach.MOST
    assert torch.equal(found(runs()["pc"], trap), found(runs()["pc"], lambda x, labels: 0.3 * x))


def test_the_search_runs_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for a training step only where the function holds something else than before."""
    net, searches = make_net(), []
    search = reach.reached
    monkeypatch.setattr(reach, "reached", lambda network: searches.append(network) or search(network))
    network = lambda x, labels: net(x, labels)  # noqa: E731
    for name in ("pc", "RK45"):
        searches.clear()
        found(runs()[name], network)
        assert len(searches) <= 2
    searches.clear()
    loss_fn = losses.get_sde_loss_fn(VP, train=True)
    for _ in range(3):
        loss_fn(network, data())
    assert len(searches) == 1
    net = make_net()
    loss_fn(network, data())
    assert net.training and len(searches) == 2


# --- networks that write to their input, or return the same memory ----------------------------------------------------


def reads(x: Tensor, labels: Tensor) -> Tensor:
    return 0.3 * torch.tanh(x) - 0.1 * torch.relu(x) + 1e-2 * torch.sin(labels)[:, None]


def writes_to_x(x: Tensor, labels: Tensor) -> Tensor:
    first = 0.3 * torch.tanh(x)
    return first - 0.1 * torch.relu_(x) + 1e-2 * torch.sin(labels)[:, None]


def writes_to_labels(x: Tensor, labels: Tensor) -> Tensor:
    last = 1e-2 * torch.sin(labels)[:, None]
    labels /= 999
    return 0.3 * torch.tanh(x) - 0.1 * torch.relu(x) + last


class SameMemory:
    """As torch.compile has it in its mode reduce-overhead."""

    def __init__(self) -> None:
        self.buffers: dict[Any, Tensor] = {}

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        buffer = self.buffers.setdefault((x.shape, x.dtype), torch.empty_like(x))
        return buffer.copy_(reads(x, labels)) if not x.requires_grad else reads(x, labels)


def returns_its_input(x: Tensor, labels: Tensor) -> Tensor:
    return x


MANNERS: dict[str, tuple[Any, Any]] = {
    "writes to x": (writes_to_x, reads),
    "writes to labels": (writes_to_labels, reads),
    "same memory": (SameMemory(), reads),
    "returns x": (returns_its_input, lambda x, labels: x.clone()),
    "returns a view of x": (lambda x, labels: x.view(x.shape), lambda x, labels: x.clone()),
}
SDES = {"vp": VP, "ve": sde_lib.VESDE(0.1, 1.0, 20), "own": OwnSDE(20), "own affine": CosineSDE(N=20)}


@pytest.mark.parametrize("kind", SDES)
@pytest.mark.parametrize("manner", MANNERS)
def test_networks_cannot_spoil_a_run(manner: str, kind: str) -> None:
    network, right = MANNERS[manner]
    for name, run in runs(SDES[kind]).items():
        assert torch.equal(found(run, network), found(run, right)), name


@pytest.mark.parametrize("method", ["RK45", "DOP853", "heun"])
@pytest.mark.parametrize("control", ["joint", "per_sample"])
def test_right_hand_sides_cannot_spoil_a_run(method: str, control: str) -> None:
    """Of one array and of several; in float64 the times that a function gets may be those of the run."""
    options: dict[str, Any] = {"method": method, "control": control} | ({"steps": 5} if method == "heun" else {})
    y0 = data().double()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -y * t[:, None]

    def writes(t: Tensor, y: Tensor) -> Tensor:
        return y.mul_(t.neg_()[:, None])

    def two(f: Any) -> Any:
        return lambda t, ys: (f(t, ys[0].clone()), ys[1].neg_() if f is writes else -ys[1])

    def end(f: Any, y0: Any) -> Any:
        return integrate.solve(f, (0.0, 1.0), y0, **options).y

    assert torch.equal(end(writes, y0), end(f, y0))
    pair = (y0, torch.ones(4, dtype=torch.float64))
    for a, b in zip(end(two(writes), pair), end(two(f), pair), strict=True):
        assert torch.equal(a, b)


def test_inference_mode() -> None:
    """Its tensors do not count what is written to them."""
    with torch.inference_mode():
        assert torch.equal(found(runs()["pc"], writes_to_x), found(runs()["pc"], reads))


def test_a_network_that_only_reads_gets_no_copies() -> None:
    given = []
    network = mutils.get_model_fn(lambda x, labels: given.append(x.data_ptr()) or 0.3 * x)
    x, labels = example()
    for _ in range(3):
        network(x, labels)
    assert given[0] != x.data_ptr() and given[1:] == [x.data_ptr()] * 2


def test_writing_later_than_at_the_first_evaluation_is_an_error() -> None:
    calls: list[int] = []

    def network(x: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return F.relu(x, inplace=len(calls) > 3)

    with pytest.raises(RuntimeError, match=r"^model: expected inputs to be left as they are.* x\.clone\(\)\.$"):
        found(runs()["pc"], network)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_a_gradient_in_latents_or_data_that_is_not_recorded_is_said() -> None:
    """Parameters that can be trained are normal there: nothing is said of them."""
    x, net = data().requires_grad_(), make_net()
    options: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2}
    sde = stochastic.get_sde_sampler(VP, SHAPE, same, steps=2, device="cpu")
    inpainter = controllable_generation.get_pc_inpainter(VP, None, None, same, 0.1)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "z": lambda x: sampling.get_ode_sampler(VP, SHAPE, same, device="cpu", **options)(net, x)[0],
        "z of an SDE": lambda x: sde(net, x)[0],
        "data of a likelihood": lambda x: likelihood.get_likelihood_fn(VP, same, **options)(net, x)[0],
        "data": lambda x: encoding.encode(VP, net, x, **options),
        "latents": lambda x: encoding.decode(VP, net, x, **options),
        "a, b": lambda x: encoding.interpolate(VP, net, x, x, 2, **options),
        "data of an inpainter": lambda x: inpainter(net, x, torch.ones(3)),
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match=rf"^{name.partition(' of ')[0]}: a gradient is wanted") as said:
            assert not call(x).requires_grad
        assert [warning.filename for warning in said] == [__file__], name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(x.detach())
            with torch.no_grad():
                call(x)


def test_the_search_under_a_mode_of_torchs() -> None:
    """A profiler that sees every operation is no compiler."""
    net = make_net(train=True)
    with FlopCounterMode(display=False):
        found(runs()["pc"], lambda x, labels: net(x, labels))
    assert not net.drop.training
