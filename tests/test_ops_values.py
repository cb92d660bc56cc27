"""The kernels against their meaning in plain torch: values, types, layouts, NaN, long rows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_table import COEFFICIENTS, DTYPES, NOISE, OPS, Arguments, Op, arguments, check, compute_dtype
from torch import Tensor

from scoresde_ext import ops, reference, sde_lib
from scoresde_ext.ops import Draw

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# A tile has 1024 elements; a Philox block 4; rows of up to 1024 elements, rounded up to blocks, share a tile.
SHAPES = [
    (0,), (1,), (7,), (1025,), (3, 0), (0, 5), (1025, 0), (1, 1), (5, 17),
    (255, 3), (256, 4), (257, 4), (129, 5), (4096, 2),
    (3, 511), (2, 512), (5, 513), (3, 1023), (2, 1024), (2, 1025), (2, 1028), (1, 2049),
    (2, 3, 5, 7), (2, 3, 8, 8), (2, 3, 2, 2, 2, 3), (2, 3, 0, 2),
]  # fmt: skip


def noises(op: Op) -> tuple[str, ...]:
    return NOISE if op.noise else ("array",)


def storages(v: Arguments) -> dict[str, Tensor]:
    """A copy of all the memory behind the tensors, what lies between and beside their elements included."""
    tensors = {n: t for n, t in v.items() if isinstance(t, Tensor)}
    if "draw" in v:
        tensors |= {f"draw.{n}": t for n, t in v["draw"]._asdict().items() if isinstance(t, Tensor)}
    bytes_of = {n: torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()) for n, t in tensors.items()}
    return {n: b.clone() for n, b in bytes_of.items()}


def run_checked(op: Op, v: Arguments) -> tuple[Tensor, ...]:
    before = storages(v)
    results = op.call(ops, v)
    after = storages(v)
    assert all(torch.equal(before[n], after[n]) for n in before)
    check(op, v, results)
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
@every_op
def test_values(op: Op, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for coefficients in COEFFICIENTS:
        for noise in noises(op):
            run_checked(op, arguments(op, shape, dtype, coefficients, noise))


@every_dtype
@every_op
def test_coefficients_of_other_precision(op: Op, dtype: torch.dtype) -> None:
    """They are brought to the type the arrays are computed in."""
    v = arguments(op, (5, 17), dtype)
    for other in (torch.float64, torch.bfloat16):
        rounded = {n: v[n].to(other) for n in op.coefficients}
        run_checked(op, v | rounded)


@every_op
def test_arrays_of_other_precision(op: Op) -> None:
    """Network output and noise in half precision, as autocast makes them, go with a float32 state."""
    v = arguments(op, (5, 17), torch.float32)
    changed: Arguments = {"out": v["out"].bfloat16()} if "out" in op.arrays[1:] else {}
    if op.noise:
        changed["draw"] = Draw(z=v["draw"].z.half())
    run_checked(op, v | changed)


# --- layouts ----------------------------------------------------------------------------------------------------------


def filled(like: Tensor, values: Tensor) -> Tensor:
    return like.copy_(values)


def permuted(values: Tensor, *order: int) -> Tensor:
    """The same tensor, its memory ordered by ``order``, outermost dimension first."""
    inverse = [order.index(d) for d in range(len(order))]
    return values.permute(order).contiguous().permute(inverse)


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# What has the values of `a` (3, 4, 6, 5) or (3, 2, 4, 3, 5) and another place in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda a: a.contiguous(),
    "unaligned": lambda a: filled(a.new_empty(a.numel() + 1)[1:].view(a.shape), a),
    "every other element": lambda a: filled(a.new_full((*a.shape[:-1], 2 * a.shape[-1]), 7.0)[..., ::2], a),
    "every other sample": lambda a: filled(a.new_full((2 * len(a), *a.shape[1:]), 7.0)[1::2], a),
    "padded samples": lambda a: filled(a.new_full((len(a), a.shape[1] + 1, *a.shape[2:]), 7.0)[:, 1:], a),
    "channels last": lambda a: a.contiguous(memory_format=CHANNELS_LAST[a.dim()]),
    "dimensions reversed": lambda a: permuted(a, 0, *range(a.dim() - 1, 0, -1)),
    "samples innermost": lambda a: permuted(a, *range(1, a.dim()), 0),
}  # fmt: skip

# Inputs that broadcast: their own values count.
EXPANDED: dict[str, Callable[[Tensor], Tensor]] = {
    "one sample for all": lambda a: a[:1].expand(a.shape),
    "one number a sample": lambda a: a[:, :1, :1, :1].expand(a.shape) if a.dim() == 4 else a[:, :1].expand(a.shape),
    "one number": lambda a: a.flatten()[0].expand(a.shape),
}


def laid_out(op: Op, v: Arguments, first: Callable[[Tensor], Tensor], others: Callable[[Tensor], Tensor]) -> Arguments:
    changed = {n: (others if i else first)(v[n]) for i, n in enumerate(op.arrays)}
    if op.noise and v["draw"].z is not None:
        changed["draw"] = Draw(z=others(v["draw"].z))
    return v | changed


def assert_same_numbers(op: Op, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """Bit for bit; sums have another order of their terms and are left to ``check``."""
    for a, b, is_sum in zip(one, other, op.sums, strict=True):
        assert is_sum or torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "noise"), [(name, noise) for name, op in OPS.items() for noise in noises(op)])
def test_layouts(name: str, noise: str, layout: str) -> None:
    op = OPS[name]
    for shape, dtype in [
        ((3, 4, 6, 5), torch.float32),
        ((3, 2, 4, 3, 5), torch.float64),
        ((3, 4, 6, 5), torch.bfloat16),
    ]:
        v = arguments(op, shape, dtype, "per sample", noise)
        plain = op.call(ops, v)
        for other in LAYOUTS:
            mixed = laid_out(op, v, LAYOUTS[layout], LAYOUTS[other])
            assert_same_numbers(op, run_checked(op, mixed), plain)


@pytest.mark.parametrize("layout", EXPANDED)
@every_op
def test_expanded_inputs(op: Op, layout: str) -> None:
    for dtype in (torch.float32, torch.float16):
        v = arguments(op, (3, 4, 6, 5), dtype)
        run_checked(op, laid_out(op, v, EXPANDED[layout], EXPANDED[layout]))
        run_checked(op, laid_out(op, v, LAYOUTS["contiguous"], EXPANDED[layout]))
        run_checked(op, laid_out(op, v, LAYOUTS["channels last"], EXPANDED[layout]))


@every_op
def test_coefficients_and_streams_of_any_stride(op: Op) -> None:
    v = arguments(op, (5, 17), torch.float32, "per sample", "key and ids")

    def spaced(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, 99)], 1)[:, 0]

    changed = {n: spaced(v[n]) for n in op.coefficients}
    if op.noise:
        changed["draw"] = Draw(None, spaced(v["draw"].key), spaced(v["draw"].ids), v["draw"].draw)
    for one, other in zip(op.call(ops, v), op.call(ops, v | changed), strict=True):
        assert torch.equal(one, other)
    one_for_all = {n: v[n][0].expand(5) for n in op.coefficients}
    run_checked(op, v | one_for_all)


@pytest.mark.parametrize("shape", [(5, 3), (3, 1025), (257, 4)], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS.values() if op.noise], ids=[n for n, op in OPS.items() if op.noise])
def test_stream_is_the_array_it_stands_for(op: Op, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        for noise in NOISE[1:]:
            v = arguments(op, shape, dtype, "per sample", noise)
            z = ops.noise_normal(*v["draw"][1:], shape).to(dtype)
            for streamed, stored in zip(op.call(ops, v), op.call(ops, v | {"draw": Draw(z=z)}), strict=True):
                assert torch.equal(streamed, stored)


@pytest.mark.parametrize("shape", [(5,), (300, 2), (5, 3), (257, 4), (33, 17), (3, 1025), (2, 3, 8, 8)], ids=str)
def test_noise_that_is_kept(shape: tuple[int, ...]) -> None:
    """Kept or generated again, it is the same noise, to the bit; all of it or that of the first samples."""
    v = arguments(OPS["perturb"], shape, torch.float32, "per sample", "key and ids")
    key, ids, draw = v["draw"][1:]
    x, kept_draw = ops.perturb_keeping(v["x0"], v["m"], v["s"], v["draw"])
    assert torch.equal(x, ops.perturb(v["x0"], v["m"], v["s"], v["draw"]))
    noise = ops.noise_normal(key, ids, draw, shape)
    assert torch.equal(kept_draw.z, noise[: shape[0] * 15 // 16])
    for kept in (0, 1, shape[0] - 1, shape[0]):
        raw, z = torch.ops.scoresde_ext.perturb_keeping(v["x0"], v["m"], v["s"], key, ids, draw, kept)
        assert torch.equal(raw, x) and torch.equal(z, noise[:kept])
        out = torch.randn(shape, requires_grad=True)
        results = [
            torch.ops.scoresde_ext.score_loss(out, v["m"], v["s"], v["m"], z, key, ids, draw, True, False)
            for z in (z, None)
        ]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_noise_is_kept_of_float32_without_gradients_alone() -> None:
    for dtype, noise, grad in (
        (torch.float64, "key", False), (torch.bfloat16, "key", False), (torch.float32, "array", False),
        (torch.float32, "key", True),
    ):  # fmt: skip
        v = arguments(OPS["perturb"], (3, 5), dtype, "per sample", noise)
        x, draw = ops.perturb_keeping(v["x0"].requires_grad_(grad), v["m"], v["s"], v["draw"])
        assert draw is v["draw"] and torch.equal(x, ops.perturb(v["x0"], v["m"], v["s"], v["draw"]))


@pytest.mark.parametrize("shape", [(1,), (5, 3), (257, 4), (3, 5000), (2, 3, 8, 8), (0, 3), (2, 0)], ids=str)
def test_loss_in_total(shape: tuple[int, ...]) -> None:
    """The sum of the samples' losses, and the gradients of that sum."""
    for dtype in DTYPES:
        for coefficients in ("floats", "per sample"):
            v = arguments(OPS["score_loss"], shape, dtype, coefficients, "key and ids")
            out = v["out"].requires_grad_()
            each = ops.score_loss(out, v["c"], v["d"], v["w"], v["draw"])
            total = ops.score_loss(out, v["c"], v["d"], v["w"], v["draw"], total=True)
            assert total.shape == () and total.dtype == each.dtype
            scale = each.double().abs().sum()
            assert (total.double() - each.double().sum()).abs() <= 2 * torch.finfo(each.dtype).eps * scale
            gradients = [torch.autograd.grad(loss, out)[0] for loss in (each.sum(), total)]
            assert torch.equal(*gradients)
            learned = ops.score_loss(
                out, torch.as_tensor(v["c"], dtype=each.dtype).requires_grad_(), None, v["w"], total=True
            )
            torch.testing.assert_close(
                learned, ops.score_loss(out, v["c"], None, v["w"], total=True), rtol=2e-2, atol=1e-2
            )


@pytest.mark.parametrize("noise", ["array", "key", "key and ids"])
@pytest.mark.parametrize("shape", [(5,), (300, 2), (257, 4), (3, 2500), (2, 3, 8, 8), (0, 3), (2, 0)], ids=str)
def test_squares_of_noise(shape: tuple[int, ...], noise: str) -> None:
    for dtype in DTYPES:
        v = arguments(OPS["perturb"], shape, dtype, "floats", noise)
        draw, squares = ops.squares_of_noise(v["draw"], v["x0"])
        z = ops.materialize(v["draw"], v["x0"])
        assert draw.key is None and torch.equal(draw.z, z)
        right = z.double().square().reshape(shape[0], math.prod(shape[1:])).sum(1)
        assert squares.dtype == ops.compute_dtype(z)
        assert (squares.double() - right).abs().le(20 * torch.finfo(squares.dtype).eps * right).all()


@pytest.mark.parametrize("shape", [(5,), (300, 2), (3, 2500), (1100, 3)], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_batches_that_are_not_finite_are_refused(shape: tuple[int, ...], value: float) -> None:
    """Wherever it is; the largest numbers are none."""
    for dtype, noise in (
        (torch.float32, "key"),
        (torch.float32, "array"),
        (torch.float64, "key"),
        (torch.bfloat16, "key"),
    ):
        v = arguments(OPS["perturb"], shape, dtype, "per sample", noise)
        for place in (0, v["x0"].numel() // 2, v["x0"].numel() - 1):
            x0 = v["x0"].clone()
            x0.view(-1)[place] = torch.finfo(dtype).max
            ops.perturb_keeping(x0, v["m"], v["s"], v["draw"])
            x0.view(-1)[place] = value
            with pytest.raises(ValueError, match="x0?: expected finite values, got NaN or Inf"):
                ops.perturb_keeping(x0, v["m"], v["s"], v["draw"])


def test_numbers_as_coefficients_are_rounded_like_tensors() -> None:
    """Also where they come again, and where they are beyond the range."""
    x = torch.ones(2, 3)
    for value in (0.1, 0.0, -0.0, 1, 1e-50, 1e50, -math.inf, 0.1):
        for y in (x, x.double()):
            right = torch.tensor([value], dtype=torch.float64).to(y.dtype) * y
            result = ops.affine(y, None, value)
            assert torch.equal(result, right) and torch.equal(result.signbit(), right.signbit())


# --- numbers that are not finite, and those at the ends of the range --------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(5, 17), (3, 1025)], ids=str)
@every_op
def test_nan_and_inf_stay_where_they_belong(op: Op, shape: tuple[int, ...], value: float) -> None:
    """In an element: that element of the results, and the sum of its sample. In a coefficient: its sample."""
    row, element = 1, shape[1] - 1
    draws = {"z": NOISE[0]} if op.noise else {}
    for dtype in DTYPES:
        for name in (*op.arrays, *op.coefficients, *draws):
            v = arguments(op, shape, dtype)
            spoilt = torch.zeros(shape, dtype=torch.bool)
            if name in op.coefficients:
                v[name][row] = value
                spoilt[row] = True
            else:
                (v["draw"].z if name == "z" else v[name])[row, element] = value
                # A slope with coefficient zero takes no part, and neither does the array that gives only the shape.
                spoilt[row, element] = name not in ("k1", "shape")
            for i, (result, is_sum) in enumerate(zip(op.call(ops, v), op.sums, strict=True)):
                if reaches(name, op, i):
                    assert torch.equal(~result.isfinite(), spoilt.any(1) if is_sum else spoilt), (dtype, name, i)
                else:
                    assert result.isfinite().all(), (dtype, name, i)


def name_of(op: Op) -> str:
    return next(name for name, other in OPS.items() if other is op)


def reaches(name: str, op: Op, result: int) -> bool:
    """Whether result number ``result`` of an op depends on the argument ``name``."""
    if len(op.sums) == 1:
        return True
    if op is OPS["score_loss and gradient"]:
        return True
    if op is OPS["combine"]:  # coefficient (m, k) is named cMK
        return name[0] == "a" or name[1] == str(result)
    if name_of(op).startswith(("rk_drift_stage", "rk_last_stage")):  # (slope, stages, sums)
        if result == 0:
            return name in ("x", "out", "f", "q") or ("x" not in op.arrays and "f" in op.coefficients)
        return result < 3 or name not in ("y", "h") or "x" not in op.arrays
    if name_of(op).startswith("rk_drift_error"):  # (sums, slope)
        return result == 0 or (name in ("y1", "out", "f", "q") and not (name == "y1" and "f" not in op.coefficients))
    return result == 1 or name not in ("n", "z")  # (mean, next)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_conversions(dtype: torch.dtype) -> None:
    """Every half of 16 bits is read, and every rounding boundary between two of them written, as torch does it."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    same = ops.affine(halves, None, 1.0)
    assert torch.equal(same.isnan(), halves.isnan())
    assert torch.equal(same.view(torch.int16)[~halves.isnan()], halves.view(torch.int16)[~halves.isnan()])
    # (1 + 2^-k) x lies on, just above or just below the middle between two halves, for the k around the precision
    for k in (7, 8, 9, 10, 11, 12):
        for p in (1 + 2.0**-k, 1 + 2.0**-k + 2.0**-22, 1 - 2.0**-k - 2.0**-22, 2.0**-k):
            right = (halves.float() * p).to(dtype)
            got = ops.affine(halves, None, p)
            assert torch.equal(got.nan_to_num(7.0), right.nan_to_num(7.0)), (k, p)


def test_results_are_new_arrays() -> None:
    for op in OPS.values():
        v = arguments(op, (3, 5), torch.float32)
        inputs = {v[n].data_ptr() for n in op.arrays}
        assert all(result.data_ptr() not in inputs for result in op.call(ops, v))


# --- long rows --------------------------------------------------------------------------------------------------------


def test_rows_longer_than_floats_count() -> None:
    """2^24 + 9 elements a sample: a float32 index would miss the odd ones. The ends of two rows are looked at."""
    long, key = 2**24 + 9, torch.tensor([11, 0])
    x = torch.zeros(2, long, dtype=torch.bfloat16)
    x[0, -1], x[1, -2] = 1.0, 2.0
    nonzero = ops.affine(x, None, torch.tensor([3.0, 5.0])).nonzero()
    assert nonzero.tolist() == [[0, long - 1], [1, long - 2]]

    z = ops.noise_normal(key, None, 0, (2, long))
    block = torch.tensor([0, 2**22 - 1, 2**22, 2**22 + 1, 2**22 + 2])
    for row in range(2):
        words = torch.stack(reference.philox([block, block * 0, torch.full_like(block, row), block * 0], (11, 0)), 1)
        for b, four in zip(block.tolist(), words, strict=True):
            alone = normals_of_words(four)[: long - 4 * b]
            torch.testing.assert_close(z[row, 4 * b : 4 * b + 4], alone, rtol=3e-7, atol=1e-7)
    # Each row has its own sum: as many ones as elements. float32 in, double accumulation.
    total = ops.score_loss(torch.ones(1, dtype=torch.bfloat16).expand(2, long), 1.0, None, torch.ones(2).double())
    assert total.tolist() == [float(torch.tensor(float(long)).float())] * 2


def normals_of_words(words: Tensor) -> Tensor:
    a, b = words.double().view(2, 2).unbind(1)
    radius = (-2 * ((a + 0.5) / 2**32).float().double().log()).sqrt()
    angle = 2 * math.pi * b / 2**32
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).flatten().float()


def test_sums_of_long_rows_do_not_drift() -> None:
    """A million equal terms that float32 cannot hold: kept in short float sums, then added in double."""
    out = torch.full((1, 2**20), 0.1)
    right = 2**20 * float(out[0, 0].double() ** 2)
    assert ops.score_loss(out, 1.0, None, 1.0).item() == pytest.approx(right, rel=1e-6)


# --- marginals --------------------------------------------------------------------------------------------------------

SDES = {"vp": sde_lib.VPSDE(0.1, 20.0), "subvp": sde_lib.subVPSDE(0.2, 15.0), "ve": sde_lib.VESDE(0.01, 50.0)}
PARAMETERS = {"vp": (0.1, 20.0), "subvp": (0.2, 15.0), "ve": (0.01, 50.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("process", SDES)
def test_marginal(process: str, dtype: torch.dtype) -> None:
    """The formulas in float64 at the same times, down to the smallest: also those of the SDE's class."""
    # Rounded once; or, in float64, as an exponential of up to ten makes of its rounded argument.
    tolerance = 0.6 * torch.finfo(dtype).eps if dtype == torch.float32 else 2e-15
    for n in (0, 1, 2, 7, 5000):
        spaced = torch.rand(n, 2, dtype=dtype)[:, 0]
        for u in (spaced.contiguous(), spaced, torch.logspace(-9, 0, n, dtype=dtype)):
            for first in (1e-5, 1e-12):
                t, m, s = ops.marginal(u, first, 1.0, process, *PARAMETERS[process])
                assert torch.equal(t, reference.marginal(u, first, 1.0, process, *PARAMETERS[process])[0])
                assert t.dtype == m.dtype == s.dtype == dtype
                exact = reference.marginal(t.double(), 0.0, 1.0, process, *PARAMETERS[process])
                of_class = SDES[process].marginal_coefficients(t.double())
                for result, right, other in zip((m, s), exact[1:], of_class, strict=True):
                    torch.testing.assert_close(right, other, rtol=1e-14, atol=0)
                    torch.testing.assert_close(result.double(), right, rtol=tolerance, atol=0)


def test_perturbations_follow_the_sde() -> None:
    """Ones that are changed are asked by their methods."""
    u = torch.rand(9)
    for sde in SDES.values():
        t, m, s = sde_lib.perturbation(sde, u, 1e-3)
        assert torch.equal(t, u * (1 - 1e-3) + 1e-3)
        torch.testing.assert_close((m, s), sde.marginal_coefficients(t), rtol=1e-6, atol=1e-7)

    class Mine(sde_lib.VPSDE):
        def marginal_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * t, 3 * t

    changed = sde_lib.VPSDE()
    changed.marginal_coefficients = Mine().marginal_coefficients
    for sde in (Mine(), changed):
        t, m, s = sde_lib.perturbation(sde, u, 1e-3)
        assert torch.equal(m, 2 * t) and torch.equal(s, 3 * t)
    other = sde_lib.VPSDE()
    other.beta_1 = 5.0
    assert torch.equal(
        sde_lib.perturbation(other, u, 1e-3)[2], sde_lib.perturbation(sde_lib.VPSDE(0.1, 5.0), u, 1e-3)[2]
    )


# --- linear combinations ----------------------------------------------------------------------------------------------

# Rows of as many elements as the coefficients are spread over in different ways, and longer than a tile.
COMBINED = [(5,), (300, 1), (257, 2), (129, 3), (65, 4), (33, 5), (33, 8), (9, 13), (9, 16), (5, 40), (3, 1025)]


@every_dtype
@pytest.mark.parametrize("n_terms", range(1, 17))
def test_combine_of_any_number_of_arrays(n_terms: int, dtype: torch.dtype) -> None:
    """Bit for bit what plain torch gives: products and sums are rounded one by one, in order."""
    compute = compute_dtype(dtype)
    for i, shape in enumerate(COMBINED):
        m, batch = 1 + (i + n_terms) % 4, shape[0]
        arrays = [torch.randn(shape).to(dtype) for _ in range(n_terms)]
        for matrix in (
            torch.randn(m, n_terms, dtype=torch.float64),
            torch.randn(n_terms, m).T,
            torch.randn(m, n_terms, batch),
            torch.randn(m, n_terms, batch, dtype=torch.float64),
            torch.randn(batch, m, n_terms).permute(1, 2, 0),
            torch.randn(m, n_terms, 1).expand(m, n_terms, batch),
        ):
            right = reference.combine([a.to(compute) for a in arrays], matrix.to(compute))
            for result, exact in zip(ops.combine(arrays, matrix), right, strict=True):
                assert torch.equal(result, exact.to(dtype))


def test_combine_by_one_sample() -> None:
    """(M, K, 1) is one matrix a sample too."""
    x, y = torch.randn(1, 5), torch.randn(1, 5)
    for result, right in zip(
        ops.combine([x, y], [[[2.0], [3.0]], [[0.5], [-1.0]]]), (2 * x + 3 * y, x / 2 - y), strict=True
    ):
        torch.testing.assert_close(result, right)


# --- the step-size controller -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 0), (3, 7), (3, 2, 1030), (2000, 3)], ids=str)
def test_put(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also of values in another memory format; what is not chosen stays, NaN beside it notwithstanding."""
    old = torch.randn(shape).to(dtype)
    new = torch.randn(shape).to(dtype).transpose(0, -1).contiguous().transpose(0, -1)
    some = torch.arange(shape[0]) % 3 == 1
    new[~some] = math.nan
    for chosen in (some, torch.tensor([True]), torch.tensor([False])):
        into, wanted = old.clone(), old.clone()
        ops.put(into, new, chosen)
        reference.put(wanted, new, chosen)
        torch.testing.assert_close(into, wanted, rtol=0, atol=0, equal_nan=True)


def test_rk_control() -> None:
    """scipy's rules, written out: accepted below 1; factor 0.9 norm^e within [0.2, 10]; no growth after a rejection."""
    norms = [0.0, 1e-300, 1e-9, 0.3, 0.59, 0.6, 1 - 1e-16, 1.0, 1 + 1e-15, 1.5, 1e3, 1e300, math.inf, math.nan]
    norm = torch.tensor(norms, dtype=torch.float64).repeat(2)
    after = torch.arange(len(norm)) >= len(norms)
    h = torch.linspace(0.1, 2.0, len(norm), dtype=torch.float64)
    for exponent in (-1 / 3, -1 / 5, -1 / 8):
        accepted, following = ops.rk_control(norm, h, after, exponent)
        for n, size, rejected, ok, next_h in zip(
            *(t.tolist() for t in (norm, h, after, accepted, following)), strict=True
        ):
            if n < 1:
                factor = min(10.0, 0.9 * n**exponent) if n else 10.0
                factor = min(1.0, factor) if rejected else factor
            else:
                factor = 0.2 if math.isnan(n) else max(0.2, 0.9 * n**exponent)
            assert ok == (n < 1)
            assert next_h == pytest.approx(size * factor, rel=1e-15)
        right = reference.rk_control(norm, h, after, exponent)
        torch.testing.assert_close(torch.stack([accepted, following]), right, rtol=1e-15, atol=0)
    assert ops.rk_control(norm[:0], h[:0], after[:0], -0.2).shape == (2, 0)
    assert torch.equal(
        ops.rk_control(norm[::2], h[::2], after[::2], -0.2), ops.rk_control(norm, h, after, -0.2)[:, ::2]
    )


# --- the reference ----------------------------------------------------------------------------------------------------


def test_float64_kernels_are_the_formula() -> None:
    """The reference is itself checked where the formula is short enough to be written out."""
    x, out, z = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    mean, after = ops.affine_noise(x, out, 0.5, 2.0, torch.tensor([1.0, 3.0]), Draw(z=z))
    torch.testing.assert_close(mean, 0.5 * x + 2 * out)
    torch.testing.assert_close(after, 0.5 * x + 2 * out + torch.tensor([[1.0], [3.0]]) * z)
    loss = ops.score_loss(out, 2.0, -1.0, torch.tensor([1.0, 10.0]), Draw(z=z))
    torch.testing.assert_close(loss, torch.tensor([1.0, 10.0]) * ((2 * out - z) ** 2).sum(1))
    y1 = 2 * x
    error = ops.rk_error(x, y1, [out, z], (0.5, -1.0), 0.1, 1e-2, 1e-3)
    scale = 1e-3 + 1e-2 * torch.maximum(x.abs(), y1.abs())
    torch.testing.assert_close(error, ((0.1 * (0.5 * out - z) / scale) ** 2).sum(1))
    first, second = ops.combine([x, out, z], [[0.5, 2.0, -1.0], [0.0, 1.0, 3.0]])
    torch.testing.assert_close(first, 0.5 * x + 2 * out - z)
    torch.testing.assert_close(second, out + 3 * z)
    slope, following = ops.rk_drift_stage(x, [z], (0.25, 0.5), -0.1, y1, out, 3.0, 4.0)
    torch.testing.assert_close(slope, 3 * y1 + 4 * out)
    torch.testing.assert_close(following, x - 0.1 * (0.25 * z + 0.5 * slope))


@pytest.mark.parametrize("like", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_materialize(like: torch.dtype) -> None:
    x, key = torch.zeros(3, 5, dtype=like), torch.tensor([3, 4])
    z = ops.materialize(Draw(key=key, ids=torch.tensor([5, 1, 2]), draw=1), x)
    assert torch.equal(z, ops.noise_normal(key, torch.tensor([5, 1, 2]), 1, (3, 5)).to(like))
    given: Any = torch.randn(3, 5)
    assert torch.equal(ops.materialize(Draw(z=given), x), given.to(like))
