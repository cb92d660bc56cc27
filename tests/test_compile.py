"""torch.compile without graph breaks, autocast, dynamic shapes.

Backend aot_eager traces everything a compiler is given (fake implementations, derivatives) and then runs the kernels as
they are: results are those of eager mode, bit for bit. Inductor, which is slow to compile, is asked twice.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_table import DTYPES, NOISE, OPS, Arguments, arguments
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from scoresde_ext import losses, noise, ops, sampling, sde_lib
from scoresde_ext.models import utils as mutils

N, SHAPE = 10, (4, 3, 2)
SDES = {
    "vp": sde_lib.VPSDE(0.1, 5.0, N),
    "subvp": sde_lib.subVPSDE(0.1, 5.0, N),
    "ve": sde_lib.VESDE(0.01, 50.0, N),
}
every_kind = pytest.mark.parametrize("kind", SDES)


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.linear(x) + torch.sin(0.01 * labels.to(x.dtype)).reshape(-1, *[1] * (x.dim() - 1))


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(f: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    """``fullgraph``: a graph break is an error."""
    return torch.compile(f, backend=backend, fullgraph=True, **options)


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


# --- ops --------------------------------------------------------------------------------------------------------------


def differentiated(f: Callable[..., Any], leaves: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """Results, and gradients that differ from element to element."""
    results = f()
    total = sum(r.square().sum() for r in tree_leaves(results))
    return results, torch.autograd.grad(total, leaves) if leaves else []


@pytest.mark.parametrize("name", OPS)
def test_ops(name: str) -> None:
    op = OPS[name]
    if name == "score_loss and gradient":  # the gradient is asked for below
        name, op = "score_loss", OPS["score_loss"]
    with_derivative = not name.startswith("rk_") and op.arrays[0] != "shape"
    for noise_kind in NOISE if op.noise else ("array",):
        for dtype in (torch.float32, torch.bfloat16):
            v = arguments(op, (3, 4, 2, 2), dtype, "per sample", noise_kind)
            v[op.arrays[0]] = v[op.arrays[0]].to(memory_format=torch.channels_last)
            leaves = [v[n].requires_grad_() for n in op.arrays] if with_derivative else []
            compiled = traced(lambda v, op=op: op.call(ops, v))
            assert_same(
                differentiated(lambda c=compiled, v=v: c(v), leaves),
                differentiated(lambda op=op, v=v: op.call(ops, v), leaves),
            )


def test_generators_and_controller() -> None:
    def f(key: Tensor, ids: Tensor, norm: Tensor, h: Tensor, after: Tensor) -> Any:
        return (
            ops.noise_normal(key, ids, 1, (3, 5)), ops.noise_uniform(key, None, 0, (3, 5)),
            ops.noise_integers(key, ids, 2, (3,), 10), ops.rk_control(norm, h, after, -0.2),
            ops.materialize(ops.Draw(key=key), norm),
        )  # fmt: skip

    inputs = (
        torch.tensor([1, 2]), torch.tensor([5, 7, 9]), torch.tensor([0.5, 2.0]).double(), torch.ones(2).double(),
        torch.tensor([True, False]),
    )  # fmt: skip
    assert_same(traced(f)(*inputs), f(*inputs))


@pytest.mark.parametrize("name", OPS)
def test_ops_with_dynamic_shapes(name: str) -> None:
    """What the first call compiled serves every batch size and number of elements."""
    op, counter, graphs = OPS[name], CompileCounterWithBackend("aot_eager"), []
    if name == "score_loss and gradient":
        op = OPS["score_loss"]
    compiled = traced(lambda v: op.call(ops, v), counter, dynamic=True)
    for shape in ((3, 4, 5), (7, 4, 5), (6, 3, 300)):
        v: Arguments = arguments(op, shape, torch.float32, "per sample", "key and ids")
        assert_same(compiled(v), op.call(ops, v))
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_under_autocast(dtype: torch.dtype) -> None:
    """Autocast changes nothing here: types are those of the arguments, and sums are float32 or more anyway."""
    for op in OPS.values():
        for noise_kind in ("array", "key") if op.noise else ("array",):
            v = arguments(op, (3, 4), dtype, "per sample", noise_kind)
            with torch.autocast("cpu", torch.bfloat16):
                inside = op.call(ops, v)
            assert_same(inside, op.call(ops, v))


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_functions(kind: str) -> dict[str, Callable[[Any, Tensor], Tensor]]:
    sde = SDES[kind]
    functions = {
        "likelihood weighting": losses.get_sde_loss_fn(sde, train=True),
        "plain": losses.get_sde_loss_fn(sde, train=True, reduce_mean=False, likelihood_weighting=False),
    }
    if kind == "vp":
        functions["ddpm"] = losses.get_ddpm_loss_fn(sde, train=True)
    if kind == "ve":
        functions["smld"] = losses.get_smld_loss_fn(sde, train=True)
    return functions


def with_gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@every_kind
def test_losses(kind: str) -> None:
    """The default source of noise: eager mode's numbers after torch.manual_seed, and new ones in every call."""
    model, batch = TinyNet(), torch.randn(SHAPE)
    for loss_fn in loss_functions(kind).values():
        compiled = traced(lambda x, loss_fn=loss_fn: loss_fn(model, x))
        torch.manual_seed(1)
        right = [with_gradients(loss_fn(model, batch), model) for _ in range(2)]
        for _ in range(2):
            torch.manual_seed(1)
            assert_same([with_gradients(compiled(batch), model) for _ in range(2)], right)
        assert right[0][0] != right[1][0]


@pytest.mark.torch("2.9")  # with noise.seeds inside what is compiled
@every_kind
def test_losses_with_streams(kind: str) -> None:
    """noise.seeds inside the compiled function, and around calls of it: the draws go on from call to call."""
    model, batch = TinyNet(), torch.randn(SHAPE)
    loss_fn = losses.get_sde_loss_fn(SDES[kind], train=True)

    def inside(x: Tensor) -> Tensor:
        with noise.seeds(7, range(4)):
            return loss_fn(model, x)

    with noise.seeds(7, range(4)):
        right = [with_gradients(loss_fn(model, batch), model) for _ in range(6)]
    assert len({r[0].item() for r in right}) == 6
    assert_same(with_gradients(traced(inside)(batch), model), right[0])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = traced(lambda x: loss_fn(model, x), counter)
    with noise.seeds(7, range(4)):
        assert_same([with_gradients(compiled(batch), model) for _ in range(6)], right)
    assert counter.frame_count <= 2  # once for the first number of a draw, once for all


def test_losses_with_dynamic_shapes() -> None:
    model, loss_fn = TinyNet(), losses.get_sde_loss_fn(SDES["vp"], train=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = traced(lambda x: loss_fn(model, x), counter, dynamic=True)
    compiled(torch.randn(4, 3, 2))
    begun = counter.frame_count  # twice: once more when the numbers of the SDE have turned out to be constants
    for shape in ((4, 3, 2), (5, 3, 2), (7, 9, 2)):
        batch = torch.randn(shape)
        torch.manual_seed(1)
        right = with_gradients(loss_fn(model, batch), model)
        torch.manual_seed(1)
        # The reduction is a symbolic number there: its product may round otherwise.
        for a, b in zip(with_gradients(compiled(batch), model), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == begun <= 2


@pytest.mark.parametrize("compiled", [False, True])
@every_kind
def test_losses_under_autocast(kind: str, compiled: bool) -> None:
    """The network in bfloat16, as if written so by hand; the loss in float32, gradients for float32 parameters."""
    model, batch = TinyNet(), torch.randn(64, 3, 2)

    def by_hand(x: Tensor, labels: Tensor) -> Tensor:
        weight, bias = (p.bfloat16() for p in model.parameters())
        return nn.functional.linear(x.bfloat16(), weight, bias) + torch.sin(0.01 * labels.to(x.dtype)).reshape(-1, 1, 1)

    for loss_fn in loss_functions(kind).values():

        def run(x: Tensor, loss_fn: Any = loss_fn) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return loss_fn(model, x)

        torch.manual_seed(1)
        right = with_gradients(loss_fn(by_hand, batch), model)
        torch.manual_seed(1)
        for a, b in zip(with_gradients((traced(run) if compiled else run)(batch), model), right, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_second_derivative_of_a_compiled_score() -> None:
    """A gradient of the network with respect to its input, inside one graph, as a gradient penalty has it."""
    x = torch.randn(SHAPE)

    def penalty(x: Tensor) -> Tensor:
        out = x.sin()
        loss = ops.score_loss(out, 2.0, None, 0.5).sum()
        return loss + out.sum()

    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert_same(torch.autograd.grad(traced(penalty)(leaf), leaf), torch.autograd.grad(penalty(other), other))


# --- updates ----------------------------------------------------------------------------------------------------------

UPDATES = [
    (kind, update)
    for kind in SDES
    for update in ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "langevin", "ald")
    if (kind, update) != ("subvp", "ancestral_sampling")
]


def stepper(kind: str, update: str, model: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    score_fn = mutils.get_score_fn(SDES[kind], model, train=False, continuous=True)
    if update in ("langevin", "ald"):
        return sampling.get_corrector(update)(SDES[kind], score_fn, 0.16, 2).update_fn
    return sampling.get_predictor(update)(SDES[kind], score_fn).update_fn


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("kind", "update"), UPDATES)
def test_updates(kind: str, update: str, grad: bool) -> None:
    """Predictors and correctors compile whole; also where gradients of the network are recorded."""
    step = stepper(kind, update, TinyNet())
    x, t = torch.randn(SHAPE), torch.tensor([1.0, 0.7, 0.5, 0.01])
    compiled = traced(step)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        right = step(x, t)
        torch.manual_seed(1)
        assert_same(compiled(x, t), right)


def test_updates_in_a_run() -> None:
    """Under noise.run, as in a sampler: the number of the draw does not make a new graph each step."""
    # Different times: one for all is computed with in double precision, which a compiled step does not see.
    step, x, t = stepper("vp", "reverse_diffusion", TinyNet()), torch.randn(SHAPE), torch.tensor([1.0, 0.7, 0.5, 0.01])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = traced(step, counter)
    results = []
    for one in (step, compiled):
        torch.manual_seed(1)
        with torch.no_grad(), noise.run("cpu"):
            results.append([one(x, t) for _ in range(12)])
    assert_same(results[1], results[0])
    assert counter.frame_count <= 2


# --- inductor ---------------------------------------------------------------------------------------------------------


needs_plain_path = pytest.mark.skipif(
    " " in torch.__file__, reason="inductor hands paths to the compiler unquoted, and torch is installed under a blank"
)


@needs_plain_path
def test_inductor_loss() -> None:
    """Inductor draws from torch's generator in its own way: as good, and repeatable, but not eager mode's numbers."""
    model, batch = TinyNet(), torch.randn(4096, 3, 2)
    loss_fn = losses.get_sde_loss_fn(SDES["vp"], train=True)
    compiled = traced(lambda x: loss_fn(model, x), "inductor")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(with_gradients(compiled(batch), model))
    assert_same(runs[0], runs[1])
    assert runs[0][0] != runs[2][0]
    eager = torch.stack([loss_fn(model, batch).detach() for _ in range(20)])
    # Means of 4096 samples: one run is a draw like the twenty.
    assert abs(runs[0][0] - eager.mean()) < 8 * eager.std()


@needs_plain_path
@pytest.mark.torch("2.9")
def test_inductor_with_streams() -> None:
    """With streams the numbers are the kernels', and only the network's own arithmetic is inductor's."""
    model, batch = TinyNet(), torch.randn(SHAPE)
    loss_fn = losses.get_sde_loss_fn(SDES["ve"], train=True, likelihood_weighting=False)

    def run(x: Tensor) -> Tensor:
        with noise.seeds(7, range(4)):
            return loss_fn(model, x)

    for a, b in zip(
        with_gradients(traced(run, "inductor")(batch), model), with_gradients(run(batch), model), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
    assert math.isfinite(run(batch).item())


# --- torch.export -----------------------------------------------------------------------------------------------------


class Exported(nn.Module):
    """A function as torch.export takes it, with the network that it calls."""

    def __init__(self, f: Callable[..., Any], network: nn.Module) -> None:
        super().__init__()
        self.f, self.network = f, network

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.f(x, t)


EXPORTS: dict[str, Callable[[Any, Any], Callable[..., Any]]] = {
    "sde": lambda sde, score_fn: sde.sde,
    "discretize": lambda sde, score_fn: sde.discretize,
    "marginal_prob": lambda sde, score_fn: sde.marginal_prob,
    "reverse sde": lambda sde, score_fn: sde.reverse(score_fn).sde,
    "probability flow": lambda sde, score_fn: lambda x, t: sde.reverse(score_fn, True).sde(x, t)[0],
    "reverse discretize": lambda sde, score_fn: sde.reverse(score_fn).discretize,
    "score": lambda sde, score_fn: score_fn,
    **{
        name: lambda sde, score_fn, name=name: sampling.get_predictor(name)(sde, score_fn).update_fn
        for name in ("euler_maruyama", "reverse_diffusion", "ancestral_sampling")
    },
    **{
        name: lambda sde, score_fn, name=name: sampling.get_corrector(name)(sde, score_fn, 0.16, 2).update_fn
        for name in ("langevin", "ald")
    },
    "loss": lambda sde, score_fn: lambda x, t: losses.get_sde_loss_fn(sde, train=False)(score_fn.network.model, x),
}


@pytest.mark.parametrize(
    ("name", "kind", "strict"),
    [
        *((name, "vp", False) for name in EXPORTS if name != "langevin"),
        pytest.param("langevin", "vp", False, marks=pytest.mark.torch("2.9")),
        *((name, "ve", False) for name in ("score", "reverse_diffusion", "ancestral_sampling")),
        *((name, "subvp", True) for name in ("reverse sde", "loss")),
    ],
)
def test_export_with_a_free_batch_size(name: str, kind: str, strict: bool) -> None:
    model = TinyNet()
    f = EXPORTS[name](SDES[kind], mutils.get_score_fn(SDES[kind], model, train=False, continuous=True))
    batch = torch.export.Dim("batch", min=1)
    arguments = torch.randn(4, 3, 2), torch.rand(4)
    shapes = {"x": {0: batch}, "t": {0: batch}}
    exported = torch.export.export(Exported(f, model), arguments, dynamic_shapes=shapes, strict=strict).module()
    for size in (4, 7, 1):
        x, t = torch.randn(size, 3, 2), torch.rand(size)
        torch.manual_seed(1)
        right = f(x, t)
        torch.manual_seed(1)
        for a, b in zip(tree_leaves(exported(x, t)), tree_leaves(right), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # one time for all is computed with in double


@pytest.mark.parametrize("name", ["sde", "reverse sde", "reverse_diffusion", "ald"])
def test_dynamic_shapes(name: str) -> None:
    """One graph for all batch sizes."""
    f = EXPORTS[name](SDES["vp"], mutils.get_score_fn(SDES["vp"], TinyNet(), train=False, continuous=True))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = traced(f, counter, dynamic=True)
    for size in (4, 7, 5):
        x, t = torch.randn(size, 3, 2), torch.rand(size)
        torch.manual_seed(1)
        right = f(x, t)
        torch.manual_seed(1)
        assert_same(compiled(x, t), right)
        if size == 4:
            begun = counter.frame_count  # twice: once more when the numbers of the SDE have turned out to be constants
    assert counter.frame_count == begun <= 2
