"""The CUDA kernels as nvcc compiles them, their PTX run on the CPU (tests/ptx), against their meaning in plain torch.

Every access that a test makes is checked, and every barrier and shuffle (tests/ptx/machine.h); that these checks find
faults is shown in test_ptx_machine.py. What only a GPU can show (ptxas, memory coalescing, streams) is not tested here.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_table import DTYPES, NOISE, OPS, Arguments, Op, arguments, check, compute_dtype
from ptx.build import ARCHITECTURES, needs_nvcc, ptx_files, shared_build
from ptx.kernels import DTYPE_CODES, TILE, UNLIMITED, Huge, Kernels
from torch import Tensor

from scoresde_ext import _C, ops, reference
from scoresde_ext.ops import Draw

pytestmark = needs_nvcc

Results = tuple[Tensor, ...]

# A chunk is 4 elements (8 of two bytes), a warp 32 of them along a row, a block 256; a tile 1024 elements.
SHAPES = [
    (1,), (257, 3), (65, 4), (33, 8), (17, 17), (9, 127), (9, 128), (5, 129), (3, 511), (3, 1024), (2, 1025), (1, 2056),
    (3, 2, 7, 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_build(tmp_path_factory)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def ptx(folder: Path, request: pytest.FixtureRequest) -> list[Path]:
    return ptx_files(folder, request.param)


@pytest.fixture(scope="module")
def kernels(folder: Path, ptx: list[Path]) -> Iterator[Kernels]:
    with Kernels(folder / "driver", *ptx) as kernels:
        yield kernels


def call(op: Op, kernels: Any, v: Arguments) -> tuple[Tensor, ...]:
    if op is OPS["score_loss and gradient"]:
        return kernels.score_loss_and_gradient(*(v[name] for name in ("out", "c", "d", "w", "draw")))
    return op.call(kernels, v)


def every_case(op: Op, dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> Iterator[Arguments]:
    for i, shape in enumerate(shapes):
        noise = NOISE[i % len(NOISE)] if op.noise else "array"
        yield arguments(op, shape, dtype, ("per sample", "one element")[i % 5 == 4], noise)


needs_fused_multiply_add = pytest.mark.skipif(
    _C.build_info()["cpu_capability"] == "generic", reason="the generic CPU kernels have no fused multiply-add"
)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_dtype
@every_op
def test_values(op: Op, dtype: torch.dtype, kernels: Kernels) -> None:
    """Against the reference; and off by one element, or with float64 coefficients, which the kernels round, in a grid
    of one block, whose loops then go over the arrays. Both with rows of whole chunks, and with others."""
    changes: list[dict[str, Any]] = [{"largest_grid": 1, "double": True}, {"shift": 1}]
    for i, v in enumerate(every_case(op, dtype)):
        results = call(op, kernels.set(), v)
        check(op, v, results, noise_ulp=4)
        change = changes[i % 2]
        assert_same(op, v, call(op, kernels.set(**change), v), results, same_order="shift" not in change)


def assert_same(op: Op, v: Arguments, results: Results, others: Results, same_order: bool) -> None:
    """Bit for bit; but for sums where they are added in another order, which depends on the chunks."""
    check(op, v, results, noise_ulp=4)
    for one, other, is_sum in zip(results, others, op.sums, strict=True):
        assert torch.equal(one, other) or (is_sum and not same_order)


@every_op
def test_any_array_may_be_unaligned(op: Op, kernels: Kernels) -> None:
    """One at a time: a kernel for aligned arrays would read or write it at a misaligned address."""
    v = arguments(op, (3, 8), torch.float32)
    results = call(op, kernels.set(), v)
    names = sorted({*kernels.seen})
    assert len(names) > 2
    for name in names:
        assert_same(op, v, call(op, kernels.set(shift=1, shifted=name), v), results, same_order=False)


@needs_fused_multiply_add
@every_op
def test_the_cpu_gives_the_same_bits(op: Op, kernels: Kernels) -> None:
    for dtype in DTYPES:
        for v in every_case(op, dtype, [(17, 17), (3, 1024), (2, 1025)]):
            theirs = call(op, SimpleNamespace(**vars(ops), score_loss_and_gradient=cpu_loss_and_gradient), v)
            for result, other, is_sum in zip(call(op, kernels.set(), v), theirs, op.sums, strict=True):
                assert is_sum or torch.equal(result, other)


def cpu_loss_and_gradient(out: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = out.detach().requires_grad_()
    loss = ops.score_loss(out, *rest)
    return loss.detach(), *torch.autograd.grad(loss.sum(), out)


def test_combine_of_any_number_of_arrays(kernels: Kernels) -> None:
    """Bit for bit what plain torch gives: products and sums are rounded one by one, in order."""
    for i, n_terms in enumerate(range(1, 17)):
        for j, dtype in enumerate(DTYPES):
            shape, compute = [(33, 8), (257, 3), (3, 1025)][(i + j) % 3], compute_dtype(dtype)
            arrays = [torch.randn(shape).to(dtype) for _ in range(n_terms)]
            for size in ((), shape[:1]):
                matrix = torch.randn(1 + (i + j) % 4, n_terms, *size, dtype=DTYPES[i % 2])
                right = reference.combine([a.to(compute) for a in arrays], matrix.to(compute))
                for result, exact in zip(kernels.set().combine(arrays, matrix), right, strict=True):
                    assert torch.equal(result, exact.to(dtype))


def test_noise(kernels: Kernels, sizes: list[tuple[int, ...]] = SHAPES) -> None:
    key, draw = torch.tensor([-(2**40) + 7, 2**31]), 2**31 + 5
    for size in sizes:
        ids = torch.randint(-(2**62), 2**62, size[:1])
        for d in (Draw(key=key), Draw(key=key, ids=ids, draw=draw)):
            for changed in ({}, {"shift": 1, "largest_grid": 1}):
                kernels.set(**changed)
                normal, right = (
                    kernels.noise_values("normal", d, size),
                    reference.noise_normal(key, d.ids, d.draw, size),
                )
                torch.testing.assert_close(normal, right, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-37)
                uniform = reference.noise_uniform(key, d.ids, d.draw, size)
                assert torch.equal(kernels.noise_values("uniform", d, size), uniform)
                for high in (1, 1000, 2**32):
                    integers = reference.noise_integers(key, d.ids, d.draw, size, high)
                    assert torch.equal(kernels.noise_values("integers", d, size, high), integers)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (3, 5, 3, 7), (2, 8, 9, 5), (2, 1030, 2), (1, 3, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.noise])
def test_noise_of_channels_last(name: str, shape: tuple[int, ...], kernels: Kernels) -> None:
    """Memory in another order, the same number for every element."""
    op, last = OPS[name], (0, *range(2, len(shape)), 1)

    def moved(x: Any) -> Any:
        return x.permute(last).contiguous() if isinstance(x, Tensor) and x.shape == shape else x

    for dtype in DTYPES:
        v = arguments(op, shape, dtype, "per sample", "key and ids")
        right = call(op, kernels.set(), v)
        found = call(op, kernels.set(channels=shape[1]), {name: moved(value) for name, value in v.items()})
        for result, other, is_sum in zip(found, right, op.sums, strict=True):
            if is_sum:
                torch.testing.assert_close(result, other)  # added in another order
            else:
                assert torch.equal(result, other.permute(last))


def test_a_loop_on_the_device(kernels: Kernels) -> None:
    """The step is run as long as its flag is set, and at least once, at every launch."""
    for enough, launches, steps in ((1, 1, 1), (5, 1, 5), (5, 3, 7), (0, 2, 2)):
        flag, count = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        kernels.set().run("loop", {"flag": flag, "count": count}, {}, enough=enough, launches=launches)
        assert (count.item(), flag.item()) == (steps, 0)


def test_control(kernels: Kernels) -> None:
    norms = [0.0, 1e-300, 1e-9, 0.3, 0.59, 0.6, 1 - 1e-16, 1.0, 1.5, 1e3, 1e300, torch.inf, torch.nan]
    for repeats in (1, 40):
        norm = torch.tensor(norms, dtype=torch.float64).repeat(repeats)
        h, after = torch.rand(len(norm), dtype=torch.float64), torch.rand(len(norm)) < 0.5
        for largest_grid in (UNLIMITED, 1):
            result = kernels.set(largest_grid=largest_grid).rk_control(norm, h, after, -1 / 5)
            torch.testing.assert_close(result, reference.rk_control(norm, h, after, -1 / 5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals(dtype: torch.dtype, kernels: Kernels) -> None:
    for n in (1, 3, 255, 256, 257, 1000):
        u = torch.rand(n, dtype=dtype)
        for process, a, b in (("vp", 0.1, 20.0), ("subvp", 0.1, 20.0), ("ve", 0.01, 50.0)):
            for largest_grid in (UNLIMITED, 1):
                results = kernels.set(largest_grid=largest_grid).marginal(u, 1e-5, 1.0, process, a, b)
                for one, other in zip(results, ops.marginal(u, 1e-5, 1.0, process, a, b), strict=True):
                    torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=0)


@every_dtype
@pytest.mark.parametrize("shifted", ["", "values", "into"])
def test_put(shifted: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """Chosen rows; the others keep what the driver had put there."""
    for shape in ((5, 1), (7, 3), (3, 1030), (300, 8)):
        values = torch.randn(shape).to(dtype)
        before = torch.full_like(values, 0).view(torch.uint8).fill_(0x5A).view(dtype)
        for chosen in (torch.arange(shape[0]) % 3 == 1, torch.tensor([True]), torch.tensor([False])):
            into, stride = torch.empty_like(values), int(len(chosen) > 1)
            numbers = kernels.shape(values) | {"chosen_stride": stride}
            arrays = {"values": values, "chosen": chosen}
            kernels.set(shift=int(shifted != ""), shifted=shifted).run("put", {"into": into}, arrays, **numbers)
            assert torch.equal(into, torch.where(chosen[:, None], values, before))


@pytest.mark.parametrize("tiles", [0, 1, 2, 33, 255, 256, 257, 1000])
def test_sums_of_tiles(tiles: int, kernels: Kernels) -> None:
    for rows in (1, 20):
        partials, w = torch.rand(rows, tiles, dtype=torch.float64), torch.rand(rows)
        torch.testing.assert_close(kernels.set().sums(partials, torch.float64), partials.sum(1), rtol=1e-14, atol=0)
        torch.testing.assert_close(kernels.sums(partials, torch.float32, w=w), (w * partials.sum(1)).float())


def test_nan_is_not_hidden(kernels: Kernels) -> None:
    """In the last elements of a long row, which another warp and another tile than the first ones work on."""
    op = OPS["rk_error"]
    for name in op.arrays:
        v = arguments(op, (3, 1300), torch.float32)
        v[name][1, -1] = torch.nan
        assert torch.equal(call(op, kernels.set(), v)[0].isnan(), torch.tensor([False, name != "k1", False]))


# ---- against the CPU, bit for bit ----


def stage_cases(dtype: torch.dtype, lines: int, shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """How many elements off an aligned address the arrays lie, and the arguments of a stage: all combinations."""
    choices = itertools.product(shapes, range(min(lines, 2) + 1), *[(False, True)] * 3)
    for i, (shape, states, keep, with_f, with_x) in enumerate(choices):
        y, out, x, *ks = (torch.randn(shape).to(dtype) for _ in range(6))
        h, f, q = torch.randn(3, shape[0], dtype=compute_dtype(dtype)).unbind()
        weights = torch.randn(lines + 1, 4, dtype=torch.float64).tolist()
        at = (x if with_x else weights.pop()[:3]) if with_f else ()
        given = {"y": y, "ks": ks, "a": weights[:lines], "states": states, "h": h, "x": at, "out": out}
        yield i % 3 == 0, given | {"f": f if with_f else None, "q": q, "keep": keep}


def stage_of_cpu(
    y: Tensor, ks: list[Tensor], a: list[list[float]], states: int, h: Tensor, x: Any, out: Tensor, f: Any, q: Tensor,
    keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    x, at = (x, []) if isinstance(x, Tensor) else (None, list(x))
    weights = [w for line in a for w in line]
    *results, slope = _C.calls.rk_drift_stage(y, ks, weights, h, x, at, out, f, q, states, True)
    return (slope, *results) if keep else tuple(results)


@every_dtype
@pytest.mark.parametrize("lines", [1, 2, 3, 4])
def test_stages_have_the_bits_of_the_cpu(lines: int, dtype: torch.dtype, kernels: Kernels) -> None:
    for shift, v in stage_cases(dtype, lines, [(17, 17), (3, 1024), (2, 1025), (5, 8), (300, 3)]):
        results = kernels.set(shift=shift).stage(**v)
        assert all(torch.equal(a, b) for a, b in zip(results, stage_of_cpu(**v), strict=True))


@needs_fused_multiply_add
def test_a_million_normals_have_the_bits_of_the_cpu(kernels: Kernels) -> None:
    key, ids = torch.tensor([123456789123, 2**31 - 1]), torch.randint(-(2**62), 2**62, (977,))
    for shift, draw, size in ((0, Draw(key=key, ids=ids, draw=3), (977, 1024)), (1, Draw(key=key), (331, 1027))):
        normals = kernels.set(shift=shift).noise_values("normal", draw, size)
        assert torch.equal(normals, ops.noise_normal(draw.key, draw.ids, draw.draw, size))


# ---- arrays of more than 2^31 elements ----
# Kernels are run on the first and the last blocks of their grid, and only both ends of the arrays take memory.

END = 64


def ends(elements: int, dtype: torch.dtype) -> Huge:
    return Huge(elements, torch.zeros(END, dtype=dtype), torch.zeros(END, dtype=dtype))


def run_huge(kernels: Kernels, kernel: str, arrays: dict[str, Any], results: dict[str, Huge], **numbers: Any) -> None:
    kernels.set(ends=2).run(kernel, results, arrays, dtype=DTYPE_CODES[torch.bfloat16], **numbers)


@pytest.mark.parametrize("vector", [True, False], ids=["vector", "scalar"])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_more_than_2_to_the_31_elements(rows: int, vector: bool, kernels: Kernels) -> None:
    cols = (2**31 // rows + 64) // 8 * 8 + (0 if vector else 1)
    n, size = rows * cols, {"rows": rows, "cols": cols}
    numbers = torch.arange(1.0, END + 1).bfloat16()
    x, one, half = Huge(n, numbers, numbers.flip(0)), torch.ones(1), torch.full((1,), 0.5)

    def check_ends(result: Huge, factor: float) -> None:
        assert torch.equal(result.head, factor * x.head) and torch.equal(result.tail, factor * x.tail)

    result = ends(n, torch.bfloat16)
    run_huge(kernels, "affine", {"x": x, "out": x, "p": one, "q": half}, {"mean": result}, **size)
    check_ends(result, 1.5)

    result, matrix = ends(n, torch.bfloat16), torch.tensor([1, 0.5])
    strides = {"c_m_stride": 2, "c_k_stride": 1, "c_row_stride": 0, "c_in_f64": 0, "n_terms": 2, "n_results": 1}
    run_huge(kernels, "combine", {"array0": x, "array1": x, "c": matrix}, {"result0": result}, **size, **strides)
    check_ends(result, 1.5)

    result = ends(n, torch.bfloat16)
    weights = {"stages": 1, "lines": 1, "states": 1, "a00": 0.5, "a0new": 0.0, "at0": 0.0}
    run_huge(kernels, "stage", {"y": x, "k0": x, "h": one}, {"result0": result}, **size, **weights)
    check_ends(result, 1.5)

    result = ends(n, torch.bfloat16)
    chosen = torch.ones(rows, dtype=torch.bool)
    run_huge(kernels, "put", {"values": x, "chosen": chosen}, {"into": result}, chosen_stride=1, **size)
    check_ends(result, 1)

    # Sums: the last tiles have the end of the last row.
    tiles = (cols + TILE - 1) // TILE
    partials, result = ends(rows * tiles, torch.float64), ends(n, torch.bfloat16)
    run_huge(kernels, "residual", {"out": x, "c": one}, {"partials": partials, "grad": result}, weighted_grad=0, **size)
    check_ends(result, 2)
    assert partials.tail.sum() == x.tail.double().square().sum()

    partials = ends(rows * tiles, torch.float64)
    numbers = {"stages": 1, "e0": 0.5, "e_new": 0.0, "rtol": 0.0, "atol": 1.0}
    run_huge(kernels, "error", {"y0": x, "y1": x, "k0": x, "h": one}, {"partials": partials}, **size, **numbers)
    assert partials.tail.sum() == (x.tail.double() / 2).square().sum()


def test_more_than_2_to_the_31_rows(kernels: Kernels) -> None:
    """So many that the last blocks have the last rows."""
    rows = 256 * 65535 * 129
    numbers = torch.arange(1.0, END + 1).bfloat16()
    x, result = Huge(rows, numbers, numbers.flip(0)), ends(rows, torch.bfloat16)
    run_huge(kernels, "affine", {"x": x, "p": torch.full((1,), 2.0)}, {"mean": result}, rows=rows, cols=1)
    assert torch.equal(result.head, 2 * x.head) and torch.equal(result.tail, 2 * x.tail)


def test_streams_of_more_than_2_to_the_31_numbers(kernels: Kernels) -> None:
    n, key = 2**31 + END, torch.tensor([7, 5])
    result = ends(n, torch.float32)
    run_huge(kernels, "noise", {"key": key}, {"values": result}, rows=1, cols=n, law=1, high=0)
    blocks = torch.cat([torch.arange(END // 4), torch.arange((n - END) // 4, n // 4)])
    zero = torch.zeros_like(blocks)
    words = torch.stack(reference.philox((blocks, zero + 5, zero, zero), (7, 0)), dim=-1).flatten()
    assert torch.equal(torch.cat([result.head, result.tail]), (words >> 8).float() / 2**24)


# ---- what is covered ----


def test_every_kernel_is_launched(folder: Path, ptx: list[Path]) -> None:
    """By the calls of the tests above, each on a few arrays, aligned and not."""
    with Kernels(folder / "driver", *ptx) as kernels:
        for dtype in DTYPES:
            for op in OPS.values():
                for v in every_case(op, dtype, [(3, 7), (3, 8)]):
                    check(op, v, call(op, kernels.set(), v), noise_ulp=4)
            for lines in (1, 2, 3, 4):
                for _, v in itertools.islice(stage_cases(dtype, lines, [(3, 7), (3, 8)]), 0, None, 3):
                    kernels.set().stage(**v)
            test_put("", dtype, kernels)
        for shape in ((2, 3, 4, 8), (3, 5, 3, 7)):
            for name in ("affine_noise", "score_loss"):
                test_noise_of_channels_last(name, shape, kernels)
        test_combine_of_any_number_of_arrays(kernels)
        test_noise(kernels, [(3, 7), (3, 8)])
        test_control(kernels)
        test_marginals(torch.float32, kernels)
        test_marginals(torch.float64, kernels)
        test_a_loop_on_the_device(kernels)
        assert kernels.names("launched") == kernels.names("entries")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_other_architectures_get_the_same_ptx(arch: str, folder: Path) -> None:
    def text(file: Path) -> str:
        found, n = re.subn(r"^\.target sm_\d+$", "", file.read_text(), flags=re.MULTILINE)
        assert n == 1
        return found

    for other in ARCHITECTURES[arch]:
        for file, same in zip(ptx_files(folder, arch), ptx_files(folder, other), strict=True):
            assert text(file) == text(same)
