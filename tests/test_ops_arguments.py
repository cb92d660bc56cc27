"""Arguments that an op refuses: before any work, by an error that names the argument."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_table import OPS, Arguments, arguments
from torch import Tensor

from scoresde_ext import ops
from scoresde_ext.ops import Draw

B, SHAPE = 3, (3, 5)
KEY = torch.tensor([3, 5])


def refused(name: str, call: Callable[..., Any], *args: Any) -> None:
    for recording in (True, False):  # without, what goes with the first array is looked at by the operator
        with torch.set_grad_enabled(recording), pytest.raises((ValueError, TypeError)) as error:
            call(*args)
        assert re.search(rf"\b{re.escape(name)}\b", str(error.value)) and len(str(error.value)) < 500


def shown(name: str) -> str:
    """The name in the signature."""
    numbered = {"k": "ks", "a": "arrays"}
    return numbered[name[0]] if re.fullmatch(r"[ka]\d", name) else "out" if name == "shape" else name


# What is wrong with an array that goes with another, with the first one, with a coefficient.
BAD_ARRAYS: dict[str, Callable[[Tensor], Any]] = {
    "sample of another shape": lambda a: torch.ones(B, 4),
    "another batch size": lambda a: torch.ones(1, 5),
    "another number of dimensions": lambda a: torch.ones(B, 5, 1),
    "no dimensions": lambda a: torch.tensor(1.0),
    "another device": lambda a: a.to("meta"),
}
BAD_DTYPES: dict[str, Callable[[Tensor], Any]] = {
    "int64": lambda a: torch.ones(SHAPE, dtype=torch.int64),
    "uint8": lambda a: torch.ones(SHAPE, dtype=torch.uint8),
    "bool": lambda a: torch.ones(SHAPE, dtype=torch.bool),
    "complex64": lambda a: torch.ones(SHAPE, dtype=torch.complex64),
    "a list": lambda a: a.tolist(),
    "None": lambda a: None,
}
BAD_COEFFICIENTS: dict[str, Callable[[Tensor], Any]] = {
    "too many": lambda c: torch.ones(B + 1),
    "too few": lambda c: torch.ones(B - 1),
    "none": lambda c: torch.ones(0),
    "a column": lambda c: torch.ones(B, 1),
    "integers": lambda c: torch.ones(B, dtype=torch.int64),
    "complex": lambda c: torch.ones(B, dtype=torch.complex64),
    "another device": lambda c: c.to("meta"),
    "text": lambda c: "1",
    "a list": lambda c: [1.0] * B,
    "None": lambda c: None,
}


def rows() -> list[Any]:
    table = []
    for op_name, op in OPS.items():
        for i, name in enumerate(op.arrays):
            # `out` may be missing together with its coefficient, which is then what is left over
            problems = BAD_DTYPES if i == 0 else BAD_ARRAYS | BAD_DTYPES
            for problem, spoil in problems.items():
                if not (name == "out" and problem == "None" and i):
                    table.append(pytest.param(op_name, name, spoil, id=f"{op_name}-{name}-{problem}"))
        if op.arrays[0] != "shape":
            no_dimensions = BAD_ARRAYS["no dimensions"]
            table.append(
                pytest.param(op_name, op.arrays[0], no_dimensions, id=f"{op_name}-{op.arrays[0]}-no dimensions")
            )
        for name in op.coefficients if op_name != "combine" else ():  # takes them as one tensor
            for problem, spoil in BAD_COEFFICIENTS.items():
                # score_loss takes None for c and d, the Runge-Kutta stages for f
                if not (name in "cdf" and problem == "None"):
                    table.append(pytest.param(op_name, name, spoil, id=f"{op_name}-{name}-{problem}"))
    return table


@pytest.mark.parametrize(("op_name", "name", "spoil"), rows())
def test_arrays_and_coefficients(op_name: str, name: str, spoil: Callable[[Tensor], Any]) -> None:
    op = OPS[op_name]
    v = arguments(op, SHAPE, torch.float32)
    changed = v | {name: spoil(v[name])}
    if name == op.arrays[0] and isinstance(changed[name], Tensor) and changed[name].dim() == 0:
        # Everything else has to go with it, or that would be what is wrong.
        changed = {n: changed[name] if n in op.arrays else value for n, value in changed.items()}
        changed |= dict.fromkeys(op.coefficients, 1.0)
        if op.noise:
            changed["draw"] = Draw(z=changed[name])
    call = ops_call(op_name)
    refused(shown(name), call, changed)


def ops_call(op_name: str) -> Callable[[Arguments], Any]:
    """The op itself; the entry of the table detaches the argument first."""
    if op_name == "score_loss and gradient":
        return lambda v: ops.score_loss(v["out"], v["c"], v["d"], v["w"], v["draw"])
    return lambda v: OPS[op_name].call(ops, v)


NOISY = {name: op for name, op in OPS.items() if op.noise}
BAD_NOISE = {
    "z of another shape": ("z", Draw(z=torch.ones(B, 4))),
    "z that would broadcast": ("z", Draw(z=torch.ones(B, 1))),
    "z of another device": ("z", Draw(z=torch.ones(SHAPE, device="meta"))),
    "z of integers": ("z", Draw(z=torch.ones(SHAPE, dtype=torch.int64))),
    "both z and key": ("key", Draw(z=torch.ones(B, 4), key=KEY)),
    "neither z nor key": ("key", Draw()),
    "key of another device": ("key", Draw(key=KEY.to("meta"))),
    "key of floats": ("key", Draw(key=KEY.float())),
    "key of int32": ("key", Draw(key=KEY.int())),
    "key of one number": ("key", Draw(key=KEY[:1])),
    "key of three": ("key", Draw(key=torch.ones(3, dtype=torch.int64))),
    "key as a column": ("key", Draw(key=KEY[:, None])),
    "key that is no tensor": ("key", Draw(key=(3, 5))),
    "too many ids": ("ids", Draw(key=KEY, ids=torch.arange(B + 1))),
    "one id": ("ids", Draw(key=KEY, ids=torch.arange(1))),
    "ids as a column": ("ids", Draw(key=KEY, ids=torch.arange(B)[:, None])),
    "ids of floats": ("ids", Draw(key=KEY, ids=torch.ones(B))),
    "ids of another device": ("ids", Draw(key=KEY, ids=torch.arange(B).to("meta"))),
    "negative draw": ("draw", Draw(key=KEY, draw=-1)),
    "no draw": ("draw", None),
    "an array for a draw": ("draw", torch.ones(SHAPE)),
}


@pytest.mark.parametrize("problem", BAD_NOISE)
@pytest.mark.parametrize("op_name", NOISY)
@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_noise(path: str, op_name: str, problem: str) -> None:
    """Also where a coefficient that requires a gradient brings the reference in."""
    name, draw = BAD_NOISE[problem]
    v = arguments(NOISY[op_name], SHAPE, torch.float32)
    if path == "reference":
        v[NOISY[op_name].coefficients[0]].requires_grad_()
    refused(name, ops_call(op_name), v | {"draw": draw})


LEARNED = {name: op for name, op in OPS.items() if name in ("affine", "affine_noise", "perturb", "score_loss")}


@pytest.mark.parametrize("problem", [p for p in BAD_COEFFICIENTS if p not in ("integers", "text", "a list", "None")])
@pytest.mark.parametrize("op_name", LEARNED)
def test_coefficients_that_require_gradients(op_name: str, problem: str) -> None:
    op = LEARNED[op_name]
    for name in op.coefficients:
        for batch in (B, 1):  # one sample would broadcast
            v = arguments(op, (batch, 5), torch.float32)
            refused(name, ops_call(op_name), v | {name: BAD_COEFFICIENTS[problem](v[name]).requires_grad_()})


@pytest.mark.parametrize("name", ["rk_stage", "rk_drift_stage", "rk_last_stage", "rk_error", "rk_drift_error"])
def test_weights_of_slopes(name: str) -> None:
    op = OPS[name]
    v = arguments(op, SHAPE, torch.float32)
    for weights in ((1.0,) * 3, (1.0,) * 5, ()):
        refused("e" if "error" in name else "a", op.call, ops, v | {"weights": weights})
    many = {f"k{i}": v["k0"] for i in range(17)}
    refused("ks", op.call, ops, v | many | {"weights": (1.0,) * (17 if name in ("rk_stage", "rk_error") else 18)})


def test_lines_of_a_stage() -> None:
    v = arguments(OPS["rk_last_stage"], SHAPE, torch.float32)
    y, ks = v["y"], [v["k0"], v["k1"]]

    def call(lines: Any, x: Any = v["x"]) -> Any:
        return ops.rk_last_stage(y, ks, lines, v["h"], x, v["out"], v["f"], v["q"])

    for lines in ([], [(1.0,) * 3], [(1.0,) * 3] * 5):
        refused("a", call, lines)
    refused("x", call, [(1.0,) * 3] * 2, (1.0,))


def test_number_of_combined_arrays() -> None:
    for n in (0, 17):
        refused("arrays", ops.combine, [torch.ones(SHAPE)] * n, torch.ones(1, n))
    refused("arrays", ops.combine, torch.ones(1, *SHAPE), torch.ones(1, 1))
    refused("arrays", ops.combine, iter([torch.ones(SHAPE)]), torch.ones(1, 1))


# Matrices for two arrays of three samples.
BAD_MATRICES: dict[str, Any] = {
    "no lines": torch.ones(0, 2),
    "five lines": torch.ones(5, 2),
    "too few columns": torch.ones(1, 1),
    "too many columns": torch.ones(1, 3),
    "too few samples": torch.ones(1, 2, B - 1),
    "too many samples": torch.ones(1, 2, B + 1),
    "one sample": torch.ones(1, 2, 1),
    "samples first": torch.ones(B, 1, 2),
    "one line alone": torch.ones(2),
    "four dimensions": torch.ones(1, 2, B, 1),
    "no dimensions": torch.tensor(1.0),
    "integers": torch.ones(1, 2, dtype=torch.int64),
    "complex": torch.ones(1, 2, dtype=torch.complex64),
    "another device": torch.ones(1, 2, device="meta"),
    "list of another length": [[1.0, 2.0, 3.0]],
    "list of numbers": [1.0, 2.0],
    "ragged list": [[1.0, 2.0], [3.0]],
    "text": [["1", "2"]],
    "a number": 1.0,
    "None": None,
}


@pytest.mark.parametrize("problem", BAD_MATRICES)
def test_combined_by_coefficients(problem: str) -> None:
    """Also where an array that requires a gradient brings the reference in, and by the operator itself."""
    x, matrix = torch.ones(SHAPE), BAD_MATRICES[problem]
    refused("coefficients", ops.combine, [x, x], matrix)
    refused("coefficients", ops.combine, [x, x.clone().requires_grad_()], matrix)
    if isinstance(matrix, Tensor) and matrix.is_cpu:
        refused("coefficients", torch.ops.scoresde_ext.combine.default, [x, x], matrix)


@pytest.mark.parametrize("op_name", NOISY)
def test_samples_too_long_for_a_stream(op_name: str) -> None:
    """2^34 elements have a block number of 32 bits. Nothing of that size is allocated to find out."""
    op = NOISY[op_name]
    long = torch.zeros(1).expand(1, 2**34 + 1)
    v = arguments(op, (1, 1), torch.float32) | dict.fromkeys(op.arrays, long) | {"draw": Draw(key=KEY)}
    with pytest.raises(ValueError, match=r"2\^34 elements a sample"):
        ops_call(op_name)(v)


GENERATORS = {
    "normal": lambda key, ids, draw, size: ops.noise_normal(key, ids, draw, size),
    "uniform": lambda key, ids, draw, size: ops.noise_uniform(key, ids, draw, size),
    "integers": lambda key, ids, draw, size: ops.noise_integers(key, ids, draw, size, 10),
}


@pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS.keys())
def test_generated_noise(generate: Callable[..., Tensor]) -> None:
    for key in (KEY.float(), KEY[:1], KEY[None], KEY.int(), None, (3, 5)):
        refused("key", generate, key, None, 0, SHAPE)
    for ids in (torch.arange(2), torch.arange(3.0), torch.arange(3)[None], torch.arange(3, device="meta"), [0, 1, 2]):
        refused("ids", generate, KEY, ids, 0, SHAPE)
    refused("draw", generate, KEY, None, -1, SHAPE)
    for size in ((), (3, -1), (-3,), (1, 2**34 + 1), (1, 2**20, 2**20)):
        refused("size", generate, KEY, None, 0, size)
    assert generate(KEY, None, 0, (0, 2**34)).shape == (0, 2**34)


@pytest.mark.parametrize("high", [0, -5, 2**32 + 1, 2**62])
def test_high(high: int) -> None:
    refused("high", ops.noise_integers, KEY, None, 0, SHAPE, high)


def test_put_arguments() -> None:
    into, chosen = torch.zeros(SHAPE), torch.ones(SHAPE[0], dtype=torch.bool)
    refused("into", ops.put, into.int(), into, chosen)
    refused("into", ops.put, torch.zeros(SHAPE[1], SHAPE[0]).T, into, chosen)
    for bad in (into[:, 1:], into[1:], into.int(), None):
        refused("values", ops.put, into, bad, chosen)
    for bad in (chosen[1:], chosen.float(), chosen[:, None], chosen[:0]):
        refused("chosen", ops.put, into, torch.ones(SHAPE), bad)
    assert not into.any()


def test_rk_control_arguments() -> None:
    norm, h, after = torch.ones(2).double(), torch.ones(2).double(), torch.tensor([True, False])
    for bad in (norm.float(), norm[None], norm.long(), norm[0], None):
        refused("norm", ops.rk_control, bad, h, after, -0.2)
    for bad in (h.float(), h[:1], h[None], h.to("meta"), 1.0, None):
        refused("h", ops.rk_control, norm, bad, after, -0.2)
    for bad in (after.double(), after[:1], after.to("meta"), False, None):
        refused("after_rejection", ops.rk_control, norm, h, bad, -0.2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"c": None, "d": None, "draw": None},
        {"c": None, "d": None, "draw": Draw(key=KEY)},
        {"c": 1.0, "d": 1.0, "draw": None},
    ],
    ids=["nothing", "noise without coefficient", "coefficient without noise"],
)
def test_score_loss_of_nothing(arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"\b(c|d|draw)\b"):
        ops.score_loss(torch.ones(SHAPE), arguments["c"], arguments["d"], 1.0, arguments["draw"])


def test_coefficient_without_out() -> None:
    """And out without coefficient."""
    with pytest.raises((ValueError, TypeError), match=r"\bq\b"):
        ops.affine(torch.ones(SHAPE), torch.ones(SHAPE), 1.0, None)
    with pytest.raises((ValueError, TypeError), match=r"\bout\b"):
        ops.affine(torch.ones(SHAPE), None, 1.0, 2.0)
    with pytest.raises((ValueError, TypeError), match=r"\bout\b"):
        ops.affine_noise(torch.ones(SHAPE), None, 1.0, 2.0, 1.0, Draw(key=KEY))
    with pytest.raises((ValueError, TypeError), match=r"\b(d|draw)\b"):
        ops.score_loss(torch.ones(SHAPE), 1.0, None, 1.0, Draw(key=KEY))


@pytest.mark.parametrize("op_name", OPS)
def test_meta_arrays_have_shapes_alone(op_name: str) -> None:
    """Everything on one device without data: results have the shapes, dtypes and strides of the real ones."""
    op = OPS[op_name]
    v = arguments(op, (2, 3, 4, 4), torch.bfloat16)
    v[op.arrays[0]] = v[op.arrays[0]].to(memory_format=torch.channels_last)
    meta = {n: value.to("meta") if isinstance(value, Tensor) else value for n, value in v.items()}
    if op.noise:
        meta["draw"] = Draw(z=v["draw"].z.to("meta"))
    call = ops_call(op_name)
    real, empty = call(v), call(meta)
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (real, empty)), strict=True)
    for r, e in pairs:
        assert (r.shape, r.dtype, r.stride()) == (e.shape, e.dtype, e.stride())
        assert e.is_meta


def test_marginal() -> None:
    for u in (torch.rand(3).half(), torch.arange(3), 0.5):
        with pytest.raises(TypeError, match="u: expected"):
            ops.marginal(u, 1e-5, 1.0, "vp", 0.1, 20.0)
    for u in (torch.rand(3, 2), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="u: expected shape"):
            ops.marginal(u, 1e-5, 1.0, "vp", 0.1, 20.0)
    with pytest.raises(ValueError, match="process: expected one of vp, subvp, ve, got 'cosine'"):
        ops.marginal(torch.rand(3), 1e-5, 1.0, "cosine", 0.1, 20.0)


# ---- hostile calls ----


def good_calls() -> dict[str, dict[str, Any]]:
    """Arguments of every function of ops that are right."""
    x, c, weights = torch.ones(SHAPE), torch.ones(B), (0.5, 2.0)
    affine = {"x": x, "out": x.clone(), "p": c, "q": 0.5}
    noisy = {**affine, "n": c, "draw": Draw(z=x)}
    stage = {"y": x, "ks": [x], "a": weights, "h": c, "x": x, "out": x, "f": 0.5, "q": c}
    stream = {"key": KEY, "ids": torch.arange(B), "draw": 2, "size": SHAPE}
    error = {"y0": x, "y1": x, "ks": [x, x], "e": weights, "h": 0.1, "rtol": 1e-3, "atol": 1e-3}
    return {
        "compute_dtype": {"x": x},
        "number": {"v": 1.0, "x": x},
        "affine": affine,
        "affine_noise": noisy,
        "affine_next": noisy,
        "perturb": {"x0": x, "m": c, "s": 0.1, "draw": Draw(key=KEY)},
        "perturb_keeping": {"x0": x, "m": c, "s": 0.1, "draw": Draw(key=KEY)},
        "score_loss": {"out": x, "c": c, "d": 1.0, "w": 0.5, "draw": Draw(z=x), "total": True},
        "combine": {"arrays": [x, x], "coefficients": [[1.0, 2.0]]},
        "rk_stage": {"y": x, "ks": [x, x], "a": weights, "h": 0.1},
        "rk_drift_stage": stage,
        "rk_last_stage": {**stage, "a": (weights, weights), "x": (1.0,), "keep": True},
        "rk_error": error,
        "rk_drift_error": {**error, "ks": [x], "out": x, "f": c, "q": 0.5},
        "rk_control": {"norm": c.double(), "h": c.double(), "after_rejection": c > 2, "exponent": -0.2},
        "marginal": {"u": c, "first": 0.1, "last": 1.0, "process": "vp", "a": 0.1, "b": 20.0},
        "put": {"into": torch.zeros(SHAPE), "values": x, "chosen": c > 0},
        "noise_normal": stream,
        "noise_uniform": stream,
        "noise_integers": {**stream, "high": 10},
        "squares_of_noise": {"draw": Draw(key=KEY), "like": x},
        "materialize": {"draw": Draw(key=KEY), "like": x},
    }  # fmt: skip


def hostile_values() -> list[Any]:
    x, i = torch.ones(SHAPE), torch.arange(2)
    numbers = [math.nan, math.inf, -1, 0, 2**31, 2**63, -(2**64), 10**400, 1j, True, 1e39, 0.5]
    from_numpy = [
        np.float32(0.5),
        np.int64(2),
        np.array(0.5),
        np.ones(3),
        np.ones(SHAPE),
        np.bool_(True),
        np.complex64(1),
    ]
    tensors = [
        x.double(), x.half(), x.int(), x > 0, x.to(torch.complex64), x.to("meta"), x.to_sparse(), x.to_mkldnn(), x[0],
        x[:1], x[:, :2], x.T, x[:0], torch.tensor(0.5), torch.tensor(2), torch.tensor(math.nan), torch.ones(B), i,
        x.clone().requires_grad_(), torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), torch.ones(0), i.to("meta"),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.ones(SHAPE).expand(2, *SHAPE), KEY, KEY[:1],
    ]  # fmt: skip
    sequences = [
        [],
        (),
        [1.0],
        [None],
        ["a"],
        [x],
        (x, None),
        [[1.0]],
        [[1.0, "a"]],
        "ab",
        b"ab",
        {},
        {1},
        range(2),
        [2**70],
    ]
    draws = [
        Draw(),
        Draw(z=1.0),
        Draw(z=x, key=KEY),
        Draw(key=KEY, draw=2**70),
        Draw(key=KEY, draw="1"),
        Draw(key=[1, 2]),
    ]
    draws += [
        Draw(key=KEY, ids=[1, 2]),
        Draw(key=KEY, draw=None),
        Draw(z=x.to_sparse()),
        Draw(z="z"),
        (x, None, None, 0),
    ]
    return [None, "text", "vp", object(), float, iter([]), *numbers, *from_numpy, *tensors, *sequences, *draws]


@pytest.mark.filterwarnings("ignore::UserWarning")  # that torch has of sparse, nested and quantized tensors
@pytest.mark.parametrize("name", good_calls())
def test_hostile_calls(name: str) -> None:
    """Each call works, or names an argument: never the words of pybind, or of the code inside."""
    op, good, values = getattr(ops, name), good_calls()[name], hostile_values()
    op(**good)
    random = np.random.default_rng(0)
    names = "|".join([*good, *Draw._fields])
    # Each value in each place; then several at once
    spoilt = [{argument: value} for argument in good for value in values]
    for _ in range(40):
        some = random.choice(list(good), size=min(2, len(good)), replace=False)
        spoilt.append({argument: values[random.integers(len(values))] for argument in some})
    for change in spoilt:
        with torch.set_grad_enabled(bool(random.integers(2))):
            try:
                op(**{**good_calls()[name], **change})
            except (ValueError, TypeError, NotImplementedError) as error:
                assert re.match(rf"({names}|scoresde_ext.ops.{name} has no kernel for)\b", str(error)), (change, error)
                assert len(str(error)) < 600


def test_public_functions_are_all_called() -> None:
    public = {n for n, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ == ops.__name__ and n[0] != "_"}
    assert public == set(good_calls())


def test_numbers_of_every_kind() -> None:
    x = torch.ones(SHAPE)
    for number in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)):
        assert torch.equal(ops.affine(x, None, number), 0.5 * x)
        assert torch.equal(ops.rk_stage(x, [x], [number], number), 1.25 * x)
        assert torch.equal(ops.marginal(torch.ones(2), number, 1.0, "vp", number, 20.0)[0], torch.ones(2))
    for two in (np.int64(2), np.int32(2)):
        assert torch.equal(ops.affine(x, None, two), 2 * x)
        assert torch.equal(ops.noise_normal(KEY, None, two, (two, two)), ops.noise_normal(KEY, None, 2, (2, 2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_data_that_are_not_finite(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(SHAPE, dtype=dtype)
    x[1, 2] = bad
    refused("x0", ops.perturb_keeping, x, 1.0, 1.0, Draw(key=KEY))
