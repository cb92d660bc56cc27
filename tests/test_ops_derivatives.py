"""Derivatives of the ops, and what PyTorch asks of every operator: schema, fake implementation, tracing."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_table import COEFFICIENTS, OPS, Arguments, Op, arguments, compute_dtype
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from scoresde_ext import _C, ops, reference
from scoresde_ext.ops import Draw

KEY, IDS = torch.tensor([3, 5]), torch.tensor([4, 0, 2**40])
SHAPE = (3, 2, 5)
STREAM = Draw(key=KEY, ids=IDS, draw=2)


def array(dtype: torch.dtype = torch.float64, grad: bool = True, shape: Sequence[int] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def column(dtype: torch.dtype = torch.float64, n: int = 3) -> Tensor:
    return torch.randn(n, dtype=torch.float64).to(dtype)


# --- opcheck ----------------------------------------------------------------------------------------------------------


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of each torch.ops.scoresde_ext operator: with and without noise, derivatives, optional arrays."""
    f32, bf16 = torch.float32, torch.bfloat16
    last = array(f32, False, (3, 2, 4, 4)).to(memory_format=torch.channels_last)
    array_noise, stream = (array(f32, False), None, None, 0), (None, KEY, IDS, 2)

    def slopes(n: int) -> list[Tensor]:
        return [array(f32, False) for _ in range(n)]

    stage = (array(f32, False), slopes(1), [0.5, 2.0, 1.0, -1.0], column(f32, 1))
    return {
        "affine": [
            (array(), None, column(), None),
            (array(f32), array(f32), column(f32), column(f32, 1)),
            (last, last.contiguous(), column(f32), column(f32)),
        ],
        "affine_noise": [
            (array(), array(), column(), column(), column(), array(), None, None, 0),
            (array(bf16), None, column(f32), None, column(f32, 1), *stream),
            (last, None, column(f32), None, column(f32), None, KEY, None, 0),
        ],
        "affine_next": [
            (array(f32, False), array(f32, False), column(f32), column(f32), column(f32, 1), *array_noise),
            (array(bf16, False), None, column(f32), None, column(f32), *stream),
        ],
        "perturb": [
            (array(f32, False), column(f32), column(f32, 1), *array_noise),
            (array(), column(), column(), *stream),
        ],
        "perturb_keeping": [
            (array(f32, False), column(f32), column(f32, 1), KEY, IDS, 2, 2),
            (last, column(f32), column(f32), KEY, None, 0, 0),
        ],
        "score_loss": [
            (array(f32), column(f32), column(f32), column(f32), array(f32, False)[:2], KEY, IDS, 2, True, False),
            (array(), column(), column(), column(), array(grad=False), None, None, 0, True, True),
            (array(bf16), column(f32), column(f32), column(f32, 1), *stream, True, False),
            (array(f32, False), column(f32), None, column(f32, 1), None, None, None, 0, False, True),
            (array(f32, False), None, column(f32), column(f32), *array_noise, False, False),
        ],
        "combine": [
            ([array(f32, False), *slopes(2)], torch.randn(4, 3).double()),
            ([last, last.contiguous()], torch.randn(1, 2, 3)),
            ([array(bf16, False)], torch.randn(3, 1, 3).bfloat16()),
        ],
        "rk_stage": [
            (array(f32, False), slopes(2), [0.5, 0.0], column(f32)),
            (array(bf16, False), [], [], column(f32, 1)),
        ],
        "rk_drift_stage": [
            (*stage, slopes(1)[0], [], *slopes(1), column(f32), column(f32), 1, True),
            (*stage, None, [0.25], *slopes(1), column(f32), column(f32), 1, False),
            (*stage, None, [], *slopes(1), None, column(f32, 1), 0, True),
        ],
        "rk_error": [(array(f32, False), array(f32, False), slopes(2), [0.5, -1.0], column(f32, 1), 1e-3, 1e-3)],
        "rk_drift_error": [
            (*slopes(2), slopes(1), [0.5, -1.0], column(f32, 1), *slopes(1), column(f32), column(f32), 1e-3, 1e-3),
            (*slopes(2), [], [0.5], column(f32), *slopes(1), None, column(f32), 1e-3, 1e-3),
        ],
        "rk_control": [(column().abs(), column().abs(), torch.tensor([True, False, True]), -0.2)],
        "marginal": [(torch.rand(5), 1e-5, 1.0, 0, 0.1, 20.0), (torch.rand(5).double(), 0.0, 1.0, 2, 0.01, 50.0)],
        "put": [
            (array(f32, False), array(f32, False), torch.tensor([True, False, True])),
            (array(bf16, False), array(bf16, False), torch.tensor([True])),
        ],
        "noise_normal": [(KEY, None, 0, [3, 5]), (KEY, IDS, 1, [3])],
        "noise_with_squares": [(KEY, None, 0, [3, 5]), (KEY, IDS, 1, [3])],
        "noise_uniform": [(KEY, None, 0, [3, 5]), (KEY, IDS, 1, [3])],
        "noise_integers": [(KEY, None, 0, [3, 5], 7), (KEY, IDS, 1, [3], 2**32)],
    }  # fmt: skip


SAMPLES = samples()


def test_samples_cover_every_operator() -> None:
    registered = {
        s.split("::")[1].split(".")[0] for s in torch._C._dispatch_get_all_op_names() if "scoresde_ext::" in s
    }
    assert registered == set(SAMPLES)
    assert registered == {name for name in dir(_C.calls) if name[0] != "_"}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, these in SAMPLES.items() for i in range(len(these))])
def test_opcheck(name: str, number: int) -> None:
    torch.library.opcheck(getattr(torch.ops.scoresde_ext, name).default, SAMPLES[name][number])


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, these in SAMPLES.items() for i in range(len(these))])
def test_direct_call(name: str, number: int) -> None:
    """Past torch.ops: the same results to the bit."""
    arguments = SAMPLES[name][number]
    direct, through_torch = (copy.deepcopy(arguments) for _ in range(2))
    results = getattr(_C.calls, name)(*direct)
    expected = getattr(torch.ops.scoresde_ext, name).default(*through_torch)
    for got, wanted in zip(tree_leaves((results, direct)), tree_leaves((expected, through_torch)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, check_stride=isinstance(got, Tensor))


class Wrapped(Tensor):
    """A tensor that stands for another."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map_only(cls, lambda t: t.held, args), **(kwargs or {}))


# Tensors whose memory is not what they mean.
MEANINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
    "imaginary part of a conjugate": lambda t: (
        torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t
    ),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "wrapped": Wrapped,
    "functional": torch._to_functional_tensor,
}


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize(("name", "number"), [(name, i) for name, these in SAMPLES.items() for i in range(len(these))])
def test_tensors_whose_memory_is_not_what_they_mean(name: str, number: int, meaning: str) -> None:
    """Each argument in turn, by torch.ops and past it."""
    if name == "put" and meaning in ("zeros without memory", "functional"):
        pytest.skip("torch refuses to write there")
    leaves, spec = tree_flatten(SAMPLES[name][number])
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or (meaning[0] == "z" and leaf.shape[:1] == (2,)):  # noise that was kept
            continue
        for op in (getattr(torch.ops.scoresde_ext, name), getattr(_C.calls, name)):
            plain, changed = ([v.detach().clone() if isinstance(v, Tensor) else v for v in leaves] for _ in range(2))
            changed[i] = MEANINGS[meaning](changed[i])
            if meaning[0] == "z":
                plain[i].zero_()
            wanted, got = (op(*tree_unflatten(these, spec)) for these in (plain, changed))
            if name == "put":
                wanted, got = plain[0], changed[0]
            for g, w in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
                g = torch._from_functional_tensor(g) if torch._is_functional_tensor(g) else getattr(g, "held", g)
                assert torch.equal(g, w)


@pytest.mark.parametrize("meaning", [m for m in MEANINGS if m != "functional"])
def test_gradients_whose_memory_is_not_what_they_mean(meaning: str) -> None:
    """Of the loss, whose backward looks whether they are all ones."""
    out = torch.randn(3, 4, requires_grad=True)
    for scale in (1.0, -1.0):
        losses = ops.score_loss(out, 2.0, -1.0, 0.5, Draw(z=torch.ones_like(out)))
        (got,) = torch.autograd.grad(losses, out, MEANINGS[meaning](torch.full((3,), scale)))
        wanted = right_gradient(out) * (0.0 if meaning[0] == "z" else scale)
        torch.testing.assert_close(getattr(got, "held", got), wanted)
    loss = ops.score_loss(out, 2.0, -1.0, 0.5, Draw(z=torch.ones_like(out)))
    (got,) = torch.autograd.grad(torch.complex(torch.zeros_like(loss), loss).conj().imag.sum(), out)
    torch.testing.assert_close(got, -right_gradient(out))


def test_numbers_of_direct_calls() -> None:
    """A number stands for a tensor of one element, rounded as that would be."""
    x, out = array(torch.float32, False), array(torch.float32, False)
    for p in (0.1, 3, -0.0, math.inf, 1e39, 1e-46, math.nan):
        wanted = _C.calls.affine(x, out, torch.tensor([float(p)]), torch.tensor([0.7]))
        torch.testing.assert_close(_C.calls.affine(x, out, p, 0.7), wanted, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(TypeError):
        _C.calls.affine(x, out, "0.5", 0.7)


# --- first and second derivatives -------------------------------------------------------------------------------------

# Functions of some arrays, to be differentiated with respect to each of them.
FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "affine of x": (1, lambda x: ops.affine(x, None, C[0])),
    "affine of x, out": (2, lambda x, out: ops.affine(x, out, C[0], C[1])),
    "affine of out alone": (1, lambda out: ops.affine(A[0], out, C[0], 0.7)),
    "affine_noise of x, z": (2, lambda x, z: ops.affine_noise(x, None, C[0], None, C[1], Draw(z=z))),
    "affine_noise of x, out, z": (3, lambda x, out, z: ops.affine_noise(x, out, C[0], C[1], C[2], Draw(z=z))),
    "affine_noise of x, stream": (1, lambda x: ops.affine_noise(x, A[0], C[0], C[1], C[2], STREAM)),
    "mean alone": (2, lambda x, out: ops.affine_noise(x, out, C[0], C[1], C[2], STREAM)[0]),
    "next alone": (2, lambda out, z: ops.affine_noise(A[0], out, C[0], C[1], 0.3, Draw(z=z))[1]),
    "affine_next": (3, lambda x, out, z: ops.affine_next(x, out, C[0], C[1], C[2], Draw(z=z))),
    "perturb of x0, z": (2, lambda x0, z: ops.perturb(x0, C[0], C[1], Draw(z=z))),
    "perturb of z alone": (1, lambda z: ops.perturb(A[0], C[0], C[1], Draw(z=z))),
    "perturb of x0, stream": (1, lambda x0: ops.perturb(x0, 0.7, C[1], STREAM)),
    "score_loss": (1, lambda out: ops.score_loss(out, C[0], C[1], C[2], Draw(z=A[0]))),
    "score_loss of stream": (1, lambda out: ops.score_loss(out, C[0], 0.7, C[2], STREAM)),
    "score_loss without noise": (1, lambda out: ops.score_loss(out, C[0], None, 0.5)),
    "score_loss summed": (1, lambda out: ops.score_loss(out, C[0], C[1], C[2], STREAM).sum()),
    "score_loss in total": (1, lambda out: ops.score_loss(out, C[0], C[1], C[2], STREAM, total=True)),
    "score_loss in total, cubed": (1, lambda out: ops.score_loss(out, C[0], C[1], C[2], Draw(z=A[0]), total=True) ** 3),
    "score_loss, cubed": (1, lambda out: ops.score_loss(out, C[0], C[1], C[2], STREAM) ** 3),
    "score_loss of out, z": (2, lambda out, z: ops.score_loss(out, C[0], C[1], C[2], Draw(z=z))),
    "score_loss of a function": (
        1, lambda x: ops.score_loss(ops.affine(x, x.tanh(), 2.0, C[1]), C[0], 1.0, C[2], STREAM)
    ),
    "score_loss of a shape": (1, lambda x: x.sum() + ops.score_loss(x, None, C[0], C[2], STREAM)),
    "kept gradient": (
        1, lambda out: torch.ops.scoresde_ext.score_loss(out, C[0], C[1], C[2], None, KEY, IDS, 2, True, False)
    ),
    # Coefficients that require gradients are answered by the reference.
    "affine of coefficients": (3, lambda x, out, p: ops.affine(x, out, p[:, 0, 0], p[0, 0, :1])),
    "affine_noise of coefficients": (
        2, lambda p, z: ops.affine_noise(A[0], A[1], p[:, 0, 0], p[:, 0, 1], p[:, 1, 0], Draw(z=z))
    ),
    "perturb of coefficients": (2, lambda x0, m: ops.perturb(x0, m[:, 0, 0], m[:, 0, 1], STREAM)),
    "score_loss of coefficients": (
        2, lambda out, c: ops.score_loss(out, c[:, 0, 0], c[:, 0, 1], c[0, 0, 2:3], Draw(z=A[0]))
    ),
    "combine of arrays": (2, lambda x, y: ops.combine([x, A[0], y], [[0.5, 1.0, -2.0], [0.0, 2.0, 1.0]])),
    "combine of coefficients": (2, lambda c, x: ops.combine([x, A[0]], c[0, :, :2])),
    "combine of coefficients, one matrix a sample": (1, lambda c: ops.combine([A[0], A[1]], c.permute(1, 2, 0)[:, :2])),
}  # fmt: skip
torch.manual_seed(0)
A = [array(grad=False) for _ in range(2)]
C = [column() for _ in range(3)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name: str) -> None:
    count, function = FUNCTIONS[name]
    inputs = tuple(array() for _ in range(count))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded"])
def test_derivatives_of_other_layouts(layout: str) -> None:
    def changed(x: Tensor) -> Tensor:
        return {
            "channels last": lambda: x.to(memory_format=torch.channels_last),
            "transposed": lambda: x.transpose(1, 3).contiguous().transpose(1, 3),
            "expanded": lambda: x[:, :, :1, :1].expand(x.shape),
        }[layout]()

    z = torch.randn(3, 2, 2, 2, dtype=torch.float64)

    def function(x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        x, out = changed(x), changed(out)
        mean, after = ops.affine_noise(x, out, C[0], C[1], C[2], Draw(z=z))
        return mean, ops.perturb(after, C[0], C[1], STREAM), ops.score_loss(out, C[0], C[1], C[2], Draw(z=z))

    inputs = tuple(array(shape=(3, 2, 2, 2)) for _ in range(2))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def weighted(results: tuple[Tensor, ...], weights: Sequence[Tensor]) -> Tensor:
    return sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True))


def gradients(op: Op, f: Any, v: Arguments, names: Sequence[str], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = {n: v[n].detach().requires_grad_() for n in names if n in v}
    if "z" in names:
        leaves["z"] = v["draw"].z.detach().requires_grad_()
    changed = v | {n: leaf for n, leaf in leaves.items() if n != "z"}
    if "z" in leaves:
        changed["draw"] = Draw(z=leaves["z"])
    return torch.autograd.grad(weighted(op.call(f, changed), weights), list(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["affine", "affine_noise", "perturb", "score_loss", "combine"])
def test_gradients_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    """Upstream gradients that differ from element to element, in another layout than the inputs."""
    op, shape = OPS[name], (4, 3, 5, 5)
    names = [*op.arrays, *(["z"] if name in ("affine_noise", "perturb") else [])]
    for coefficients in COEFFICIENTS:
        v = arguments(op, shape, dtype, coefficients)
        v[op.arrays[0]] = v[op.arrays[0]].to(memory_format=torch.channels_last)
        # Powers of two: the products with upstream's gradients are then exact
        weights = [
            (2.0 ** torch.randint(-2, 3, shape[: 1 if is_sum else None])).to(compute_dtype(dtype)) for is_sum in op.sums
        ]
        double = {n: (c.double() if isinstance(c, Tensor) else c) for n, c in v.items() if n != "draw"}
        if op.noise:
            double["draw"] = Draw(z=v["draw"].z.double())
        right = gradients(op, reference, double, names, [w.double() for w in weights])
        got = gradients(op, ops, v, names, weights)
        # Roundings: of float32 terms, which may cancel; then two to the storage type.
        single, stored = torch.finfo(torch.float32), torch.finfo(dtype)
        for g, exact in zip(got, right, strict=True):
            assert g.dtype == dtype
            tolerance = 8 * single.eps * exact.abs().max() + stored.eps * (exact.abs() + stored.smallest_normal)
            assert ((g.double() - exact).abs() <= tolerance).all()


def loss_of(out: Tensor) -> Tensor:
    return ops.score_loss(out, 2.0, -1.0, 0.5, Draw(z=torch.ones_like(out))).sum()


def right_loss(out: Tensor) -> Tensor:
    return 0.5 * (2 * out - 1).square().sum()


def right_gradient(out: Tensor) -> Tensor:
    return 2 * 0.5 * 2 * (2 * out.detach() - 1)


# Ways from a leaf to the argument of the loss whose backward hands gradients on as they are.
PATHS = {
    "leaf": lambda x: x,
    "view": lambda x: x.view(4, 3),
    "transposed": lambda x: x.t(),
    "sum with a constant": lambda x: x + 1,
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every_path
@pytest.mark.parametrize("what", ["kept", "zeroed", "cleared", "scaled"])
def test_backward_again(what: str, path: Callable[[Tensor], Tensor]) -> None:
    """The gradient that the forward pass kept is not changed by what is done with the gradient handed out."""
    x = torch.randn(3, 4, requires_grad=True)
    out = path(x)
    loss, right = loss_of(out), torch.autograd.grad(right_loss(path(x)), x)[0]
    total = torch.zeros_like(x)
    for _ in range(3):
        loss.backward(retain_graph=True)
        total = total + right if what == "kept" else right
        torch.testing.assert_close(x.grad, total)
        if what == "zeroed":
            x.grad.zero_()
        elif what == "cleared":
            x.grad = None
        elif what == "scaled":
            x.grad.mul_(3)
            x.grad = None


@every_path
def test_gradient_asked_for_again(path: Callable[[Tensor], Tensor]) -> None:
    out = path(torch.randn(3, 4, requires_grad=True))
    loss = loss_of(out)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(loss, out, retain_graph=True)
        torch.testing.assert_close(gradient, right_gradient(out))
        gradient.fill_(7)


def test_gradients_of_two_losses_add_up() -> None:
    """Accumulation over micro-batches, and one output in two losses of one graph."""
    parameter = torch.randn(3, 4, requires_grad=True)
    for _ in range(3):
        loss_of(parameter).backward()
    torch.testing.assert_close(parameter.grad, 3 * right_gradient(parameter))
    parameter.grad = None
    out = 2 * parameter
    (loss_of(out) + 3 * loss_of(out)).backward()
    torch.testing.assert_close(parameter.grad, 2 * 4 * right_gradient(out))


def test_graph_is_freed_and_used_once() -> None:
    out = torch.randn(3, 4, requires_grad=True)
    loss = loss_of(out)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("scale", [2.0**16, -0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaled_loss(dtype: torch.dtype, scale: float) -> None:
    """A gradient scaler multiplies the loss, and divides the gradient later."""
    out = (torch.randint(-8, 8, (3, 4)) / 64).to(dtype).requires_grad_()
    (loss_of(out) * scale).backward()
    assert torch.equal(out.grad, (scale * right_gradient(out).double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scaling_saves_small_gradients(dtype: torch.dtype) -> None:
    """A mean over 2^24 elements makes gradients that float16 cannot hold. That is what scalers are for: the gradient is
    rounded to half precision after it was scaled."""
    out = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    z = torch.randn(3, 64, dtype=dtype)
    (ops.score_loss(out, 1.0, -1.0, 2.0**-24, Draw(z=z)).sum() * 2.0**24).backward()
    right = 2 * (out.detach().double() - z.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.grad.double(), right, rtol=2 * eps, atol=2 * eps)


def test_gradient_with_one_weight_a_sample() -> None:
    out = torch.randn(3, 4, requires_grad=True)
    losses = ops.score_loss(out, 2.0, -1.0, 0.5, Draw(z=torch.ones_like(out)))
    weights = torch.tensor([1.0, 0.0, 1.0])
    (losses * weights).sum().backward()
    torch.testing.assert_close(out.grad, right_gradient(out) * weights[:, None])


def test_create_graph() -> None:
    """Gradient penalties: the gradient of the loss is itself differentiated. d(2 w c r)/d out = 2 w c^2."""
    out = array()
    (gradient,) = torch.autograd.grad(loss_of(out), out, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), out, create_graph=True)
    torch.testing.assert_close(second, 2 * right_gradient(out) * 2 * 0.5 * 2**2)
    (third,) = torch.autograd.grad(second.sum(), out)
    torch.testing.assert_close(third, torch.full_like(out, 2 * 4.0**2))


@pytest.mark.parametrize("grad_mode", ["no_grad", "inference_mode", "detached"])
def test_nothing_is_recorded_where_nothing_is_asked(grad_mode: str) -> None:
    x = torch.randn(3, 4, requires_grad=grad_mode != "detached")
    p = torch.randn(3, requires_grad=grad_mode != "detached")
    draw = Draw(key=KEY)
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "detached": torch.enable_grad}[grad_mode]():
        results = [ops.affine(x, None, p), *ops.affine_noise(x, x, p, p, p, draw), ops.perturb(x, p, p, draw)]
        results += [ops.score_loss(x, p, p, p, draw), *ops.combine([x, x], torch.stack([p, p])[None])]
    assert not any(r.requires_grad for r in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["affine", "affine_noise", "perturb", "score_loss", "combine"])
def test_coefficients_that_require_gradients_change_nothing_else(name: str, dtype: torch.dtype) -> None:
    """Answered by the reference: with the dtypes, the rounding and the strides of the kernels."""
    op = OPS[name]
    for noise in ("array", "key and ids") if op.noise else ("array",):
        v = arguments(op, (3, 2, 4, 4), dtype, "per sample", noise)
        v[op.arrays[0]] = v[op.arrays[0]].to(memory_format=torch.channels_last)
        learned = {n: v[n].detach().requires_grad_() for n in op.coefficients}
        for kernel, plain in zip(op.call(ops, v), op.call(ops, v | learned), strict=True):
            assert plain.dtype == kernel.dtype and plain.stride() == kernel.stride()
            # Plain torch rounds every product to the storage type.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(plain.detach(), kernel, rtol=8 * eps, atol=8 * eps)


def test_missing_gradient_is_an_error() -> None:
    """The raw operator without with_grad has no gradient to give, and says so."""
    out = torch.randn(3, 4, requires_grad=True)
    loss, _ = torch.ops.scoresde_ext.score_loss(
        out, torch.ones(1), None, torch.ones(1), None, None, None, 0, False, False
    )
    with pytest.raises(RuntimeError, match="with_grad"):
        loss.sum().backward()


# --- what has no derivative -------------------------------------------------------------------------------------------


def floats_of(arguments: tuple[Any, ...]) -> list[int]:
    return [i for i, v in enumerate(tree_leaves(arguments)) if isinstance(v, Tensor) and v.is_floating_point()]


def changed_at(arguments: tuple[Any, ...], i: int, change: Callable[[Tensor], Tensor]) -> Any:
    leaves, spec = tree_flatten(arguments)
    leaves = [v.detach().clone() if isinstance(v, Tensor) else v for v in leaves]
    leaves[i] = change(leaves[i])
    return tree_unflatten(leaves, spec)


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_refuse_tangents(name: str) -> None:
    """scoresde_ext.ops answers in forward mode by plain torch. Past it tangents are refused, never dropped."""
    op = getattr(torch.ops.scoresde_ext, name)
    for sample in SAMPLES[name]:
        for i in floats_of(sample):
            with forward_ad.dual_level():
                dual = changed_at(sample, i, lambda t: forward_ad.make_dual(t, torch.ones_like(t)))
                with pytest.raises(NotImplementedError, match=f"{name} .*(forward|does not support it)"):
                    op(*dual)


@pytest.mark.parametrize(
    "name", [name for name in SAMPLES if name not in ("affine", "affine_noise", "perturb", "score_loss")]
)
def test_operators_refuse_derivatives(name: str) -> None:
    op = getattr(torch.ops.scoresde_ext, name)
    for sample in SAMPLES[name]:
        for i in floats_of(sample):
            learned = changed_at(sample, i, lambda t: t.requires_grad_())
            with pytest.raises(RuntimeError, match=f"{name} is not implemented|leaf Variable"):
                results = op(*learned)
                results = learned[0] if name == "put" else results
                sum(r.sum() for r in tree_leaves(results) if r.is_floating_point()).backward()


def test_put_is_seen_by_autograd() -> None:
    """What a backward pass would read has been written over."""
    for put in (ops.put, torch.ops.scoresde_ext.put, _C.calls.put):
        x, held = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2)
        product = (x * held).sum()
        put(held, torch.zeros(3, 2), torch.tensor([True, False, True]))
        assert held.sum() == 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_put_of_values_that_require_gradients() -> None:
    values, into, chosen = array(shape=(3, 2)), array(shape=(3, 2)), torch.tensor([True, False, True])
    written = 2 * into
    ops.put(written, 3 * values, chosen)
    torch.testing.assert_close(written, torch.where(chosen[:, None], 3 * values, 2 * into))
    written.sum().backward()
    torch.testing.assert_close(values.grad, 3.0 * chosen[:, None].double().expand(3, 2))
    torch.testing.assert_close(into.grad, 2.0 * (~chosen)[:, None].double().expand(3, 2))


# --- coefficients in half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_half_precision_under_a_loss_scale(dtype: torch.dtype, total: bool) -> None:
    """The gradient fits into half precision, the product of the scale and a weight does not."""
    out = (torch.randint(-8, 9, (3, 64)) / 2**12).to(dtype).requires_grad_()
    c, w = torch.tensor([1.3, 0.7, 1.1]).to(dtype), torch.tensor([1.7, 1.2, 1.0]).to(dtype)
    loss = ops.score_loss(out, c, -1.0, w, Draw(z=torch.zeros_like(out)), total=total)
    (2.0**16 * loss.sum()).backward()
    right = 2.0**17 * (w.double() * c.double() ** 2)[:, None] * out.detach().double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.grad.double(), right, rtol=2 * eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_in_half_precision(dtype: torch.dtype) -> None:
    """2 w c^2 with a c whose square half precision does not hold."""
    out, c, w = torch.zeros(3, 4, dtype=dtype, requires_grad=True), torch.full((3,), 300.0).to(dtype), 2.0**-10
    (first,) = torch.autograd.grad(ops.score_loss(out, c, None, w).sum(), out, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), out)
    right = torch.full((3, 4), 2 * w, dtype=torch.float64) * c.double()[:, None] ** 2
    torch.testing.assert_close(second.double(), right, rtol=torch.finfo(dtype).eps, atol=0)


def test_gradients_of_both_results_in_half_precision() -> None:
    """Their sum does not fit into half precision, its product with p does."""
    x = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    mean, after = ops.affine_noise(x, x, 0.125, 0.25, 1.0, Draw(key=KEY))
    (40_000 * (mean + after)).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 80_000 * 0.375, dtype=torch.float16))
