"""The ops on batches as a table: what each is called with. One test then covers all of them.

A test makes the arguments with :func:`arguments`, calls the kernels with ``op.call(ops, v)`` and the plain torch code
with ``op.call(reference, v)``. What the kernels should give is the reference in float64 on the same rounded numbers;
how far they may be from it follows from the magnitude of the terms: the reference again, on absolute values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scoresde_ext import ops, reference
from scoresde_ext.ops import Draw

Arguments = dict[str, Any]
Results = dict[str, tuple[Tensor, ...]]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COEFFICIENTS = ("floats", "one element", "no dimension", "per sample")
NOISE = ("array", "key", "key and ids")


@dataclass(frozen=True)
class Op:
    """One op with one choice of optional arguments.

    ``call`` returns a tuple of results: ``sums`` says which of them are sums over a sample, shape ``(B,)``; the others
    have the shape of the first array. ``weights`` are the coefficients of the slopes ``k0``, ``k1``, ...
    """

    call: Callable[[ModuleType, Arguments], tuple[Tensor, ...]]
    arrays: tuple[str, ...]
    coefficients: tuple[str, ...]
    noise: bool = False
    weights: tuple[float, ...] = ()
    sums: tuple[bool, ...] = (False,)


def _slopes(v: Arguments) -> list[Tensor]:
    return [v[name] for name in v if name[0] == "k" and name[1:].isdigit()]


def _loss(f: ModuleType, v: Arguments) -> tuple[Tensor, ...]:
    """The loss alone: nothing requires a gradient."""
    loss = f.score_loss(v.get("out", v.get("shape")), v.get("c"), v.get("d"), v["w"], v.get("draw"))
    return (loss[0] if f is reference else loss,)


def _loss_and_gradient(f: ModuleType, v: Arguments) -> tuple[Tensor, ...]:
    if f is reference:
        return reference.score_loss(v["out"], v["c"], v["d"], v["w"], v["draw"])
    out = v["out"].detach().requires_grad_()
    loss = ops.score_loss(out, v["c"], v["d"], v["w"], v["draw"])
    return loss.detach(), *torch.autograd.grad(loss.sum(), out)


def _combine(f: ModuleType, v: Arguments) -> tuple[Tensor, ...]:
    """Two lines of coefficients: a nested list, ``(M, K)``, or ``(M, K, B)`` where there is one a sample."""
    lines: Any = [[v[f"c{m}{k}"] for k in range(3)] for m in range(2)]
    if isinstance(v["c00"], Tensor):
        size = () if v["c00"].numel() == 1 else v["c00"].shape
        lines = torch.stack([torch.stack([c.reshape(size) for c in line]) for line in lines])
    return f.combine([v["a0"], v["a1"], v["a2"]], lines)


THIRDS = (1 / 3, 0.0, -4 / 3, 2 / 3)


def _drift_stage(f: ModuleType, v: Arguments, x: Any, factor: Any) -> tuple[Tensor, ...]:
    return f.rk_drift_stage(v["y"], _slopes(v), v["weights"], v["h"], x, v["out"], factor, v["q"])


def _last_stage(f: ModuleType, v: Arguments, lines: int, x: Any) -> tuple[Tensor, ...]:
    scaled = [tuple((m + 1) * w for w in v["weights"]) for m in range(lines)]
    return f.rk_last_stage(v["y"], _slopes(v), scaled, v["h"], x, v["out"], v["f"], v["q"])


def _drift_error(f: ModuleType, v: Arguments, factor: Any) -> tuple[Tensor, ...]:
    slope = (v["out"], factor, v["q"])
    return f.rk_drift_error(v["y0"], v["y1"], _slopes(v), v["weights"], v["h"], *slope, 1e-2, 1e-3)


THREE_SLOPES = ("y", "k0", "k1", "k2")

OPS = {
    "affine without out": Op(lambda f, v: (f.affine(v["x"], None, v["p"], None),), ("x",), ("p",)),
    "affine": Op(lambda f, v: (f.affine(v["x"], v["out"], v["p"], v["q"]),), ("x", "out"), ("p", "q")),
    "affine_noise without out": Op(
        lambda f, v: f.affine_noise(v["x"], None, v["p"], None, v["n"], v["draw"]),
        ("x",), ("p", "n"), noise=True, sums=(False, False),
    ),
    "affine_noise": Op(
        lambda f, v: f.affine_noise(v["x"], v["out"], v["p"], v["q"], v["n"], v["draw"]),
        ("x", "out"), ("p", "q", "n"), noise=True, sums=(False, False),
    ),
    "affine_next": Op(
        lambda f, v: (f.affine_next(v["x"], v["out"], v["p"], v["q"], v["n"], v["draw"]),),
        ("x", "out"), ("p", "q", "n"), noise=True,
    ),
    "perturb": Op(lambda f, v: (f.perturb(v["x0"], v["m"], v["s"], v["draw"]),), ("x0",), ("m", "s"), noise=True),
    "score_loss": Op(_loss, ("out",), ("c", "d", "w"), noise=True, sums=(True,)),
    "score_loss of out": Op(_loss, ("out",), ("c", "w"), sums=(True,)),
    "score_loss of noise": Op(_loss, ("shape",), ("d", "w"), noise=True, sums=(True,)),
    "score_loss and gradient": Op(
        _loss_and_gradient, ("out",), ("c", "d", "w"), noise=True, sums=(True, False)
    ),
    "combine": Op(
        _combine, ("a0", "a1", "a2"), ("c00", "c01", "c02", "c10", "c11", "c12"), sums=(False, False),
    ),
    "rk_stage": Op(
        lambda f, v: (f.rk_stage(v["y"], _slopes(v), v["weights"], v["h"]),),
        ("y", "k0", "k1", "k2", "k3"), ("h",), weights=THIRDS,
    ),
    "rk_drift_stage": Op(
        lambda f, v: _drift_stage(f, v, v["x"], v["f"]),
        (*THREE_SLOPES, "x", "out"), ("h", "f", "q"), weights=THIRDS, sums=(False, False),
    ),
    "rk_drift_stage at a computed point": Op(
        lambda f, v: _drift_stage(f, v, v["weights"][:3], v["f"]),
        (*THREE_SLOPES, "out"), ("h", "f", "q"), weights=THIRDS, sums=(False, False),
    ),
    "rk_drift_stage without f": Op(
        lambda f, v: _drift_stage(f, v, (), None),
        (*THREE_SLOPES, "out"), ("h", "q"), weights=THIRDS, sums=(False, False),
    ),
    "rk_last_stage": Op(
        lambda f, v: _last_stage(f, v, 3, v["x"]),
        (*THREE_SLOPES, "x", "out"), ("h", "f", "q"), weights=THIRDS, sums=(False,) * 4,
    ),
    "rk_last_stage of four lines at a computed point": Op(
        lambda f, v: _last_stage(f, v, 4, v["weights"][:3]),
        (*THREE_SLOPES, "out"), ("h", "f", "q"), weights=THIRDS, sums=(False,) * 5,
    ),
    "rk_error": Op(
        lambda f, v: (f.rk_error(v["y0"], v["y1"], _slopes(v), v["weights"], v["h"], 1e-2, 1e-3),),
        ("y0", "y1", "k0", "k1", "k2", "k3"), ("h",), weights=THIRDS, sums=(True,),
    ),
    "rk_drift_error": Op(
        lambda f, v: _drift_error(f, v, v["f"]),
        ("y0", "y1", "k0", "k1", "k2", "out"), ("h", "f", "q"), weights=THIRDS, sums=(True, False),
    ),
    "rk_drift_error without f": Op(
        lambda f, v: _drift_error(f, v, None),
        ("y0", "y1", "k0", "k1", "k2", "out"), ("h", "q"), weights=THIRDS, sums=(True, False),
    ),
}  # fmt: skip


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arrays of this dtype are computed and accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arguments(
    op: Op, shape: tuple[int, ...], dtype: torch.dtype, coefficients: str = "per sample", noise: str = "array"
) -> Arguments:
    """Random arguments of about unit size, arrays contiguous."""
    v: Arguments = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name in op.arrays}
    sizes = {"floats": (1,), "one element": (1,), "no dimension": (), "per sample": shape[:1]}
    for name in op.coefficients:
        c = torch.randn(sizes[coefficients], dtype=torch.float64).to(compute_dtype(dtype))
        v[name] = c.item() if coefficients == "floats" else c
    if op.weights:
        v["weights"] = op.weights
    if op.noise:
        key, ids = torch.tensor([-(2**40) + 7, 5]), torch.randint(-(2**62), 2**62, shape[:1])
        v["draw"] = {
            "array": Draw(z=torch.randn(shape, dtype=torch.float64).to(dtype)),
            "key": Draw(key=key),
            "key and ids": Draw(key=key, ids=ids, draw=3),
        }[noise]
    return v


def _map(v: Arguments, number: Callable[[Any], Any], draw: Callable[[Draw], Draw]) -> Arguments:
    """The arguments with ``number`` applied to every array and coefficient."""
    changed = {}
    for name, value in v.items():
        if isinstance(value, Draw):
            changed[name] = draw(value)
        else:
            changed[name] = tuple(number(w) for w in value) if isinstance(value, tuple) else number(value)
    return changed


def in_float64(op: Op, v: Arguments) -> Arguments:
    """The same numbers in float64, the noise as the array that its stream stands for."""
    shape = v[op.arrays[0]].shape

    def array_of(draw: Draw) -> Draw:
        z = draw.z if draw.key is None else ops.noise_normal(draw.key, draw.ids, draw.draw, shape)
        return Draw(z=z.double())

    return _map(v, lambda c: c.double() if isinstance(c, Tensor) else c, array_of)


def expected(op: Op, v: Arguments) -> tuple[Tensor, ...]:
    return op.call(reference, in_float64(op, v))


def tolerances(op: Op, v: Arguments, noise_ulp: int) -> Iterator[Tensor]:
    """How far each element of each result may be from the exact one.

    Every product and sum of the compute type rounds by at most half an eps of the terms it has met: at most eight of
    them in a row here, a number written as a fraction and the square of a sum included. Sums over a sample add: a lane
    takes 64 squares one after the other, half an eps each. The result is then rounded to the type it is stored in: half
    an eps of it, or of the smallest normal number, below which numbers are evenly spaced. (Gradients of the loss twice:
    in half precision they are kept without their weight.)
    """
    roundings = 2 if op is OPS["score_loss and gradient"] else 1
    exact = in_float64(op, v)
    terms = op.call(reference, _map(exact, abs, lambda draw: Draw(z=draw.z.abs())))
    dtype = v[op.arrays[0]].dtype
    for term, result, is_sum in zip(terms, op.call(reference, exact), op.sums, strict=True):
        compute, stored = (torch.finfo(d) for d in (compute_dtype(dtype), compute_dtype(dtype) if is_sum else dtype))
        relative = (40 if is_sum else 4) * compute.eps + 2 * noise_ulp * torch.finfo(torch.float32).eps
        yield relative * term + roundings * stored.eps / 2 * (result.abs() + 2 * stored.smallest_normal)


def check(op: Op, v: Arguments, results: tuple[Tensor, ...], noise_ulp: int = 0) -> None:
    """Values, dtypes, shapes and strides of what kernels gave. ``noise_ulp``: how far their noise may be from ours."""
    first = v[op.arrays[0]]
    for result, right, tolerance, is_sum in zip(
        results, expected(op, v), tolerances(op, v, noise_ulp), op.sums, strict=True
    ):
        if is_sum:
            assert result.dtype in (compute_dtype(first.dtype), torch.float64)
            assert result.shape == first.shape[:1]
        else:
            assert result.dtype == first.dtype
            assert result.shape == first.shape
            assert result.stride() == torch.empty_like(first).stride()
        off = (result.double() - right).abs()
        worst = (off - tolerance).max() if off.numel() else 0
        assert (off <= tolerance).all(), f"{worst:.3e} beyond the tolerance"


def all_arguments() -> Iterator[tuple[str, Op, Arguments]]:
    """Every op on seeded arguments of several tiles a thread: results that only a fixed order of sums can repeat."""
    torch.manual_seed(1)
    for name, op in OPS.items():
        for shape in ((8, 9001), (3000, 5), (130, 3, 17)):
            for dtype in DTYPES:
                for noise in ("array", "key and ids") if op.noise else ("array",):
                    yield f"{name} {shape} {dtype} {noise}", op, arguments(op, shape, dtype, "per sample", noise)


def results_of_all() -> Results:
    """What the kernels make of :func:`all_arguments`, and noise."""
    key, sizes = torch.tensor([5, 6]), ((9, 40_001), (5000, 7))
    results: Results = {name: op.call(ops, v) for name, op, v in all_arguments()}
    results["noise_normal"] = tuple(ops.noise_normal(key, None, 0, size) for size in sizes)
    results["noise_uniform"] = tuple(ops.noise_uniform(key, None, 0, size) for size in sizes)
    results["noise_integers"] = tuple(ops.noise_integers(key, None, 0, size, 1000) for size in sizes)
    return results
