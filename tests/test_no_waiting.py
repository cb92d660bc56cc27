"""Steps on tensors of another device than the CPU, one without memory (meta): the operations that a step would send to
a GPU, of which none makes the host wait or reads the host's memory."""

import copy
from typing import Any

import pytest
import torch
from fake_device import WAITING_OPS, FakeDevice
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scoresde_ext import graphs, integrate, noise, sampling, sde_lib
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.integrate import multistep
from scoresde_ext.models import utils as mutils

aten = torch.ops.aten


class HostTouched(RuntimeError):
    """An operation reads a tensor of the host, or a value of the device."""


class OnlyTheDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # On the host itself there is nothing to wait for: numbers for an SDE of one's own are made there.
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in inputs if t.dim() or t.device.type != "cpu"}
        chosen = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in chosen)
        if devices - {"cpu"} and (func in WAITING_OPS or by_mask):
            raise HostTouched(f"{func} waits for the device")
        result = func(*args, **kwargs)
        results = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        if len(devices | results) > 1 and inputs:
            raise HostTouched(f"{func} goes between devices: {devices} to {results}")
        return result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0.1 * self.linear(x) + 1e-3 * labels[:, None]


class Mine(sde_lib.AffineSDE):
    """Its times are searched."""

    def __init__(self) -> None:
        super().__init__(100)

    def marginal_coefficients(self, t: Any) -> Any:
        return torch.exp(-0.5 * t), torch.sqrt(-torch.expm1(-t))

    def sde_coefficients(self, t: Any) -> Any:
        return -0.5 * torch.ones_like(t), torch.ones_like(t)


def on_device(value: Any) -> Any:
    """A copy whose tensors are on the device."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)([on_device(part) for part in value])
    if isinstance(value, multistep.Point):
        new = copy.copy(value)
        vars(new).update({name: on_device(part) for name, part in vars(value).items()})
        return new
    return value


class Begun(Exception):
    """Where a device would begin to step."""


def begun(flow: ProbabilityFlow, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run for a device, begun on the CPU."""
    runs: list[Any] = []

    def keep(_: Any, loop: Any, *__: Any, **___: Any) -> None:
        runs.append(loop)
        raise Begun

    monkeypatch.setattr(graphs, "backend_of", lambda _: FakeDevice())
    monkeypatch.setattr(graphs.Plan, "run", keep)
    choices = {"method": "RK45", "rtol": 1e-2, "atol": 1e-2} | options
    with pytest.raises(Begun):
        integrate.solve(flow, (1.0, 1e-2), torch.randn(4, 3), **choices)
    return runs[0]


def step_on_device(loop: Any, network: Any) -> None:
    """Two steps; at the first, what is needed for good may be moved to the device."""
    network.model = Net().to("meta")
    for name, value in vars(loop).items():
        setattr(loop, name, on_device(value))
    with torch.no_grad():
        loop.step()
        with OnlyTheDevice():
            loop.step()


METHODS: dict[str, dict[str, Any]] = {
    "RK45": {},
    "RK45, per sample": {"control": "per_sample", "t_eval": [0.5]},
    "RK45 with pi": {"pi": True},
    "RK45 in the angle": {"coordinate": "angle"},
    "RK23 in the angle, per sample": {"method": "RK23", "coordinate": "angle", "control": "per_sample"},
    "UniPC": {"method": "unipc", "t_eval": [0.5]},
    "UniPC, per sample": {"method": "unipc", "control": "per_sample"},
    "heun": {"method": "heun", "steps": 3},
    "UniPC on a grid": {"method": "unipc", "steps": 3},
}
SDES = {"vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE, "ve": lambda: sde_lib.VESDE(0.1, 2.0), "mine": Mine}


@pytest.mark.parametrize("kind", SDES)
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_the_integrators(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sde = SDES[kind]()
    flow = ProbabilityFlow(sde, mutils.get_score_fn(sde, Net(), continuous=True))
    step_on_device(begun(flow, METHODS[name], monkeypatch), flow.score_fn.network)


@pytest.mark.parametrize("wait", [Tensor.item, lambda t: torch.ones(3).to(t.device)], ids=["item", "copy"])
def test_a_planted_wait_is_found(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sde, steps = sde_lib.VPSDE(), []
    flow = ProbabilityFlow(sde, mutils.get_score_fn(sde, Net(), continuous=True))
    run = begun(flow, {}, monkeypatch)
    monkeypatch.setattr(run, "arrive", lambda: wait(run.h) if steps else steps.append(1))
    with pytest.raises(HostTouched, match="waits for the device|goes between devices"):
        step_on_device(run, flow.score_fn.network)


class Passes(TorchDispatchMode):
    """Counts the arrays of a shape that operations read and write, those with a coefficient of zero left out."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        weights = next((a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], float)), None)
        for value in (*args, result):  # an array that is given to be written to is the result
            parts = value if isinstance(value, (list, tuple)) else [value]
            used = [w != 0 for w in weights] if weights and value is args[1 if "stage" in str(func) else 2] else None
            for i, part in enumerate(parts):
                if isinstance(part, Tensor) and part.shape == self.shape and (used is None or used[i]):
                    self.count += "alias" not in str(func) and "clone" not in str(func) and "detach" not in str(func)
        return result


def test_passes_over_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/gpu.md says of an RK45 step, without the network's own."""
    sde = sde_lib.VPSDE()
    flow = ProbabilityFlow(sde, mutils.get_score_fn(sde, Net(), continuous=True))
    run = begun(flow, {}, monkeypatch)
    out = torch.randn(4, 3)
    monkeypatch.setattr(flow, "network", lambda x, t: out)
    with torch.no_grad(), Passes((4, 3)) as passes:
        run.step()
    assert passes.count == 45


KINDS = [("vp", True), ("vp", False), ("ve", True), ("ve", False), ("subvp", True)]
PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral_sampling")


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("kind, continuous", KINDS)
def test_steps_of_predictors_and_correctors(kind: str, continuous: bool, predictor: str, corrector: str) -> None:
    if kind == "subvp" and predictor == "ancestral_sampling":
        pytest.skip("it is known for VP and VE")
    sde = SDES[kind]()
    steps = (sampling.get_predictor(predictor), sampling.get_corrector(corrector), 0.1, 1, False, continuous)
    loop = sampling.PCLoop(sde, Net(), *steps)
    score_fn = loop.corrector.score_fn  # type: ignore[attr-defined]
    with noise.seeds(0, range(4)):
        streams = noise.streams_in_force(torch.device("cpu"))
        for name, value in vars(streams).items():
            setattr(streams, name, on_device(value))
        run = sampling._EqualSteps(loop, torch.randn(4, 3), streams, torch.linspace(1.0, 0.1, 5))
        step_on_device(run, score_fn.network)
