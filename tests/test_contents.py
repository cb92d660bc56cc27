"""What a network consists of, as a key: whatever of it can be reached changes the key, and nothing else does."""

import collections
import dataclasses
import datetime
import functools
import itertools
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.attention
from torch import Tensor, nn

from scoresde_ext import contents as walk
from scoresde_ext.contents import Contents, NotComparable, contents

CPU = torch.device("cpu")
SCALE = [1.0]
log = logging.getLogger("a network's")
helpers = types.ModuleType("helpers")
helpers.gain, helpers.unused = 1.0, (i for i in ())  # type: ignore[attr-defined]


class Settings:
    gain = 1.0  # of a class that is used as a record
    never_named = (i for i in ())


@dataclasses.dataclass
class Options:
    gain: float = 1.0


class Slots:
    __slots__ = ("gain", "missing")

    def __init__(self) -> None:
        self.gain = 1.0


Pair = collections.namedtuple("Pair", ["a", "b"])


class Angle(float):
    unit = "degree"


def scaled(x: Tensor, by: float = 1.0, *, shift: float = 0.0) -> Tensor:
    return x * by * SCALE[0] + shift


@functools.lru_cache(maxsize=2)
def table(n: int) -> Tensor:
    return torch.zeros(n)


class Net(nn.Module):
    """Holds a value of every kind."""

    offset = 0.0
    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cond, self.gain = nn.Linear(3, 3), torch.zeros(3), 1.0
        self.config = types.SimpleNamespace(model=types.SimpleNamespace(scale=1.0, names=["a", "b"]))
        self.options, self.slots, self.angle = Options(), Slots(), Angle(1.0)
        self.pair, self.nested = Pair(torch.zeros(1), 2), {"a": [{"b": (torch.zeros(2), {3})}]}
        self.layers, self.plain = [nn.Linear(3, 3), nn.Linear(3, 3)], [1, 2.0, "three"]
        self.array, self.order = np.zeros(4), collections.OrderedDict(x=1, y=2)
        self.queue, self.numbers = collections.deque([1, 2]), {1: "one", 2: "two"}
        self.function, self.partial = scaled, functools.partial(scaled, by=1.0)
        self.closure = self.around(torch.zeros(3))
        self.part = slice(0, 3)
        self.now, self.attention = datetime.datetime.now(), nn.attention.SDPBackend.MATH
        self.device, self.kind, self.log, self.itself = CPU, torch.float32, log, weakref.ref(self)
        self.first, self.second = {"a": 1, "b": 2}, {"c": 3, "d": 4}
        self.sentinel, self.unknown = object(), float("nan")

    @staticmethod
    def around(value: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x + value

    @property
    def shift(self) -> float:
        return self.offset

    def head(self, x: Tensor) -> Tensor:
        log.debug("called")
        return self.linear(x) * Settings.gain * helpers.gain + self.shift  # type: ignore[attr-defined]

    @torch.no_grad()
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return scaled(self.head(x)) + table(3)

    def train_step(self) -> None:
        """No network calls it: what it names is not looked at."""
        print(GENERATOR, self.count)


GENERATOR = (i for i in range(3))


def key(*roots: Any, **options: Any) -> Contents:
    return contents(*roots, device=CPU, **options)


def set_item(holder: Any, index: Any, value: Any) -> None:
    holder[index] = value


def wrapped(net: Net) -> None:
    plain = net.linear.forward
    net.linear.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Net], Any]] = {
    "tensor": lambda net: setattr(net, "cond", torch.zeros(3)),
    "another view": lambda net: setattr(net, "cond", net.cond[:2]),
    "its data": lambda net: setattr(net.cond, "data", torch.zeros(3)),
    "transposed": lambda net: setattr(net.linear.weight, "data", net.linear.weight.data.t()),
    "parameter": lambda net: setattr(net.linear, "weight", nn.Parameter(torch.zeros(3, 3))),
    "buffer": lambda net: net.register_buffer("late", torch.zeros(1)),
    "attribute of a tensor": lambda net: setattr(net.linear.weight, "scale", 2.0),
    "number": lambda net: setattr(net, "gain", 2.0),
    "its type": lambda net: setattr(net, "gain", 1),
    "a number of its own class": lambda net: setattr(net, "angle", Angle(2.0)),
    "attribute of a number": lambda net: setattr(net.angle, "unit", "radian"),
    "zero's sign": lambda net: (setattr(net, "gain", 0.0), key(net), setattr(net, "gain", -0.0)),
    "mode": lambda net: net.eval(),
    "layer": lambda net: setattr(net, "linear", nn.Linear(3, 3, bias=False)),
    "attribute of a config": lambda net: setattr(net.config.model, "scale", 2.0),
    "list of a config": lambda net: net.config.model.names.append("c"),
    "dataclass": lambda net: setattr(net.options, "gain", 2.0),
    "slot": lambda net: setattr(net.slots, "gain", 2.0),
    "slot not set": lambda net: setattr(net.slots, "missing", 2.0),
    "named tuple": lambda net: setattr(net, "pair", Pair(net.pair.a, 3)),
    "nested": lambda net: set_item(net.nested["a"][0], "b", (torch.zeros(2), {3})),
    "set": lambda net: net.nested["a"][0]["b"][1].add(4),
    "module in a list": lambda net: set_item(net.layers, 1, nn.Linear(3, 3)),
    "parameter of a module in a list": lambda net: setattr(net.layers[0], "bias", nn.Parameter(torch.zeros(3))),
    "list": lambda net: set_item(net.plain, 0, 7),
    "array": lambda net: set_item(net.array, 2, 1.0),
    "to the next": lambda net: set_item(net.first, "c", net.second.pop("c")),
    "order": lambda net: net.order.move_to_end("x"),
    "slice": lambda net: setattr(net, "part", slice(0, 2)),
    "deque": lambda net: net.queue.rotate(),
    "dict": lambda net: set_item(net.numbers, 1, "eins"),
    "key": lambda net: set_item(net.numbers, 3, "three"),
    "function": lambda net: setattr(net, "function", table),
    "default": lambda net: setattr(scaled, "__defaults__", (2.0,)),
    "keyword's default": lambda net: setattr(scaled, "__kwdefaults__", {"shift": 1.0}),
    "keyword's default as an attribute": lambda net: setattr(scaled, "shift", scaled.__kwdefaults__.pop("shift")),
    "code": lambda net: setattr(scaled, "__code__", (lambda x, by=1.0, *, shift=0.0: x).__code__),
    "attribute of a function": lambda net: setattr(scaled, "note", 1.0),
    "partial": lambda net: setattr(net, "partial", functools.partial(scaled, by=2.0)),
    "closure": lambda net: setattr(net, "closure", net.around(torch.zeros(3))),
    "cell": lambda net: setattr(net.closure.__closure__[0], "cell_contents", torch.zeros(3)),  # type: ignore[attr-defined]
    "bound method": lambda net: setattr(net, "function", net.head),
    "hook": lambda net: net.linear.register_forward_hook(lambda *_: None),
    "pre-hook": lambda net: net.register_forward_pre_hook(lambda *_: None),
    "method of an object": wrapped,
    "method of a class": lambda net: setattr(Net, "head", lambda self, x: x),
    "class attribute": lambda net: setattr(Net, "offset", 1.0),
    "class as a record": lambda net: setattr(Settings, "gain", 2.0),
    "global": lambda net: set_item(SCALE, 0, 2.0),
    "global of a module": lambda net: setattr(helpers, "gain", 2.0),
    "date": lambda net: setattr(net, "now", net.now + datetime.timedelta(1)),
    "attention": lambda net: setattr(net, "attention", nn.attention.SDPBackend.FLASH_ATTENTION),
    "dtype": lambda net: setattr(net, "kind", torch.float64),
    "sentinel": lambda net: setattr(net, "sentinel", object()),
    "remembered tensor": lambda net: table(5),
}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    defaults, keywords, code = scaled.__defaults__, dict(scaled.__kwdefaults__), scaled.__code__
    head = Net.head
    yield
    scaled.__defaults__, scaled.__kwdefaults__, scaled.__code__ = defaults, keywords, code
    vars(scaled).clear()
    Net.head, Net.offset, Net.count, Settings.gain, SCALE[0] = head, 0.0, 0, 1.0, 1.0  # type: ignore[method-assign]
    helpers.gain = 1.0  # type: ignore[attr-defined]
    table.cache_clear()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_network_changes_its_key(change: Callable[[Net], Any]) -> None:
    net = Net()
    before = key(net)
    assert key(net) == before and hash(key(net)) == hash(before)
    change(net)
    assert key(net) != before
    assert key(net) == key(net)


WRAPPINGS: dict[str, Callable[[nn.Module], Any]] = {
    "a module": lambda net: nn.Sequential(net),
    "DataParallel": lambda net: nn.DataParallel(net),
    "a closure": lambda net: lambda x, t: net(x, t),
    "a partial": lambda net: functools.partial(lambda net, x, t: net(x, t), net),
    "a bound method": lambda net: net.forward,
    "a list in a dict": lambda net: functools.partial(lambda x, t, nets: nets["a"][0](x, t), nets={"a": [net]}),
    "an argument by default": lambda net: lambda x, t, net=net: net(x, t),
    "no_grad": lambda net: torch.no_grad()(lambda x, t: net(x, t)),
    "deep": lambda net: functools.reduce(lambda f, _: lambda x, t: f(x, t), range(50), net),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_wrapped_network(wrap: Callable[[nn.Module], Any]) -> None:
    net = Net()
    network = wrap(net)
    before = key(network)
    assert before.modules >= 1 and key(network) == before
    net.config.model.scale = 2.0
    changed = key(network)
    assert changed != before
    net.cond = torch.zeros(3)
    assert key(network) not in (before, changed)


def test_what_does_not_change_a_network() -> None:
    """Tensors that are written to, equal values, and what no evaluation uses."""
    net = Net()
    before = key(net)
    net.linear.weight.data.mul_(2)
    net.cond.add_(1)
    net.config = types.SimpleNamespace(model=types.SimpleNamespace(scale=1.0, names=["a", "b"]))
    net.gain, net.cond, net.unknown = float("1.0"), net.cond[:], float("nan")
    net.closure = net.around(net.closure.__closure__[0].cell_contents)  # type: ignore[attr-defined]
    log.setLevel(logging.ERROR)
    Net.count = 5
    assert key(net) == before


def test_tensors_that_the_device_does_not_read() -> None:
    """A step on a GPU has a number of a CPU tensor as it was at the capture."""
    net, device = Net(), torch.device("cuda")
    net.register_buffer("number", torch.tensor(2.0))
    for change in (lambda: net.number.fill_(3), lambda: net.number.data.fill_(4), lambda: net.cond.add_(1)):
        before = contents(net, device=device)
        assert contents(net, device=device) == before
        change()
        assert contents(net, device=device) != before
    with torch.inference_mode():
        net.cond = torch.zeros(3)
        before = contents(net, device=device)
        net.cond.add_(1)
    assert contents(net, device=device) != before


HIDDEN: dict[str, Callable[[], Any]] = {
    "Generator": lambda: torch.Generator(),
    "generator": lambda: (i for i in range(3)),
    "count": lambda: itertools.count(),
    "Random": lambda: __import__("random").Random(1),
    "TextIOWrapper": lambda: sys.__stdout__,
    "objects": lambda: np.array([object()]),
    "bytes": lambda: np.zeros(walk.LARGE // 8 + 1),
    "values": lambda: [0.5] * (walk.MOST + 1),
    "memory of its own": lambda: torch.zeros(2).to_sparse(),
    "_local": lambda: threading.local(),
    "ScriptModule": lambda: torch.jit.script(nn.ReLU()),
}


@pytest.mark.parametrize("what", HIDDEN)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_cannot_be_compared_is_said(what: str) -> None:
    net = Net()
    net.nested["a"].append(HIDDEN[what]())
    with pytest.raises(NotComparable, match=what):
        key(net)


def test_code_that_reaches_anything() -> None:
    net = Net()
    assert key(lambda x, t: net.eval()(x, t)).modules == 4  # no such call
    with pytest.raises(NotComparable, match=r"calls eval\(\)"):
        key(lambda x, t: eval("net")(x, t) + net(x, t))


def test_names_that_are_not_known_before() -> None:
    """Code that calls getattr may use any member of its classes."""

    class Chooses(nn.Module):
        strength: ClassVar = [1.0]

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return getattr(self, "of_" + "a")(x)

        def of_a(self, x: Tensor) -> Tensor:
            return x * self.strength[0]

    class Chosen(nn.Module):
        strength: ClassVar = [1.0]

        def of_a(self, x: Tensor) -> Tensor:
            return x * self.strength[0]

    chosen = Chosen()
    for network, cls in ((Chooses(), Chooses), (lambda x, t: getattr(chosen, "of_" + "a")(x), Chosen)):
        before = key(network)
        cls.strength[0] = 2.0  # type: ignore[attr-defined]
        assert key(network) != before


def test_a_network_that_reaches_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    before = key(net)
    monkeypatch.setattr(walk, "MOST", len(before.parts) // 6)
    with pytest.raises(NotComparable, match=f"more than {walk.MOST} values"):
        key(net)


def test_a_method_that_the_user_puts_into_a_class_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: SCALE[0] * plain(self, x))
    net = nn.Linear(3, 3)
    before = key(net)
    SCALE[0] = 2.0
    assert key(net) != before


def test_modules_that_a_function_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("of_the_users")
    module.__file__, module.gain = "/of_the_users.py", 1.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_the_users", module)

    class Imports(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            from of_the_users import gain  # type: ignore[import-not-found]

            return gain * x

    net = Imports()
    before = key(net)
    module.gain = 2.0  # type: ignore[attr-defined]
    assert key(net) != before


def test_nothing_is_run_and_cycles_end() -> None:
    class Trap:
        def __init__(self) -> None:
            self.itself, self.values = self, [1.0]

        def __getattr__(self, name: str) -> Any:
            raise AssertionError("run")

        __eq__ = __hash__ = __iter__ = __len__ = __bool__ = __getattr__  # type: ignore[assignment]

    net = Net()
    net.trap, net.cycle = Trap(), [net.nested]
    net.nested["a"].append(net.cycle)
    net.parent = [net]
    before = key(net)
    assert key(net) == before
    vars(net.trap)["values"].append(2.0)
    assert key(net) != before


def test_a_tensor_of_a_class_of_its_own() -> None:
    """What it does to operations is not run; one that only holds others has their memory."""

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError("run")

    net = Net()
    net.cond = torch.zeros(3).as_subclass(Logged)
    before = key(net)
    assert key(net) == before
    net.cond = torch.zeros(3).as_subclass(Logged)
    assert key(net) != before


def test_generated_code_and_compiled_networks() -> None:
    net = Net()
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    before = key(graph)
    assert key(graph) == before
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target == "1":
            with graph.graph.inserting_after(node):
                new = graph.graph.call_function(torch.neg, (node,))
            node.replace_all_uses_with(new)
            new.args = (node,)
            break
    graph.recompile()
    assert key(graph) != before
    compiled = torch.compile(net, backend="eager")
    before = key(compiled)
    assert key(compiled) == before
    net.gain = 2.0
    assert key(compiled) != before


def test_the_tensors_are_kept() -> None:
    net = Net()
    kept, before = weakref.ref(net.cond), key(net)
    net.cond = torch.zeros(3)
    assert kept() is not None
    del before
    assert kept() is None


def test_the_difference_has_a_name() -> None:
    net = Net()
    before = key(net)
    net.config.model.scale = 2.0
    assert before.difference(key(net)) == "'scale'"


def test_a_sampler_does_not_fail_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another thread writes to a dict that is looked at."""

    def changed(_: Any) -> Any:
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(walk, "attributes", changed)
    with pytest.raises(NotComparable, match="RuntimeError: dictionary changed size"):
        key(Net())
