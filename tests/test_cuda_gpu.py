"""The ops on a GPU: values, layouts, noise, streams, graphs, large arrays.

Checked against the reference in float64 on the CPU, and against the CPU's kernels: bit for bit, but for sums, whose
terms are added in another order.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_table import COEFFICIENTS, DTYPES, NOISE, OPS, Arguments, Op, arguments, check
from test_ops_values import EXPANDED, LAYOUTS, laid_out
from torch import Tensor

from scoresde_ext import _C, ops, reference
from scoresde_ext.ops import Draw

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: the kernels have not been run on a GPU", allow_module_level=True)

DEVICE = torch.device("cuda")
SAME_BITS = _C.build_info()["cpu_capability"] != "generic"  # the generic CPU kernels have no fused multiply-add

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

# Chunks of 4 or 8 elements, warps of 32 chunks, tiles of 1024 elements, blocks of 256 chunks.

SHAPES = [
    (0,), (1,), (3, 0), (0, 5), (257,), (1, 1), (257, 3), (65, 4), (33, 8), (17, 17), (9, 127), (9, 128), (5, 129),
    (3, 511), (3, 1024), (2, 1025), (2, 1028), (1, 300_001), (1, 300_008), (2, 3, 5, 7), (4, 3, 32, 32),
]  # fmt: skip


def on(device: torch.device, v: Any) -> Any:
    """Arguments, or anything in them, moved to a device; strides stay."""
    if isinstance(v, dict):
        return {name: on(device, value) for name, value in v.items()}
    if isinstance(v, Draw):
        return Draw(*(on(device, value) for value in v))
    return v.to(device) if isinstance(v, Tensor) else v


def run_checked(op: Op, v: Arguments, **options: Any) -> tuple[Tensor, ...]:
    """Runs an op on the GPU, ``v`` lying on the CPU, and checks the results."""
    gpu = on(DEVICE, v)
    results = op.call(ops, gpu)
    assert all(result.device.type == DEVICE.type for result in results)
    results = tuple(result.cpu() for result in results)
    check(op, v, results, **options)
    return results


def noises(op: Op) -> tuple[str, ...]:
    return NOISE if op.noise else ("array",)


@every_dtype
@every_op
def test_values(op: Op, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for i, noise in enumerate(noises(op)):
            v = arguments(op, shape, dtype, COEFFICIENTS[(len(shape) + i) % len(COEFFICIENTS)], noise)
            results = run_checked(op, v, noise_ulp=4)
            for result, cpu, is_sum in zip(results, op.call(ops, v), op.sums, strict=True):
                assert is_sum or not SAME_BITS or torch.equal(result, cpu)


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANDED])
@every_op
def test_layouts(op: Op, layout: str) -> None:
    lay = (LAYOUTS | EXPANDED)[layout]
    first = lay if layout in LAYOUTS else Tensor.contiguous
    for dtype in (torch.float32, torch.bfloat16):
        for noise in noises(op):
            v = arguments(op, (3, 4, 6, 5), dtype, "per sample", noise)
            results = op.call(ops, laid_out(op, on(DEVICE, v), first, lay))
            check(op, laid_out(op, v, first, lay), tuple(result.cpu() for result in results), noise_ulp=4)
            plain = op.call(ops, on(DEVICE, laid_out(op, v, Tensor.contiguous, lambda a: lay(a).contiguous())))
            assert all(s or torch.equal(a, b) for a, b, s in zip(results, plain, op.sums, strict=True))


@every_op
def test_results_repeat(op: Op) -> None:
    """Two runs, same bits: sums too."""
    for shape in ((8, 90_001), (3000, 5)):
        v = on(DEVICE, arguments(op, shape, torch.float32))
        first = op.call(ops, v)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, op.call(ops, v), strict=True))


def test_control() -> None:
    norms = [0.0, 1e-300, 1e-9, 0.3, 0.59, 0.6, 1 - 1e-16, 1.0, 1.5, 1e3, 1e300, math.inf, math.nan]
    norm = torch.tensor(norms, dtype=torch.float64).repeat(50)
    h, after = torch.rand(len(norm), dtype=torch.float64), torch.rand(len(norm)) < 0.5
    there = [t.to(DEVICE) for t in (norm, h, after)]
    right = ops.rk_control(norm, h, after, -1 / 5)
    torch.testing.assert_close(ops.rk_control(*there, -1 / 5).cpu(), right, rtol=1e-14, atol=0)
    assert ops.rk_control(*(t[:0] for t in there), -1 / 5).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals(dtype: torch.dtype) -> None:
    for n in (0, 1, 257, 300_000):
        u = torch.rand(n, dtype=dtype)
        for process, a, b in (("vp", 0.1, 20.0), ("subvp", 0.1, 20.0), ("ve", 0.01, 50.0)):
            right = ops.marginal(u, 1e-5, 1.0, process, a, b)
            for one, other in zip(ops.marginal(u.to(DEVICE), 1e-5, 1.0, process, a, b), right, strict=True):
                torch.testing.assert_close(one.cpu(), other, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("size", [(1,), (1, 1), (7, 5), (3, 4096), (2, 3, 333), (70_000, 3)], ids=str)
def test_noise_is_the_cpus(size: tuple[int, ...]) -> None:
    key = torch.tensor([-(2**40) + 7, 2**31])
    for ids in (None, torch.randint(-(2**62), 2**62, size[:1])):
        for draw in (0, 2**31 + 5):
            here, there = (key, ids, draw, size), (key.to(DEVICE), on(DEVICE, ids), draw, size)
            for high in (1, 1000, 2**32):
                assert torch.equal(ops.noise_integers(*there, high).cpu(), ops.noise_integers(*here, high))
            assert torch.equal(ops.noise_uniform(*there).cpu(), ops.noise_uniform(*here))
            normal, right = ops.noise_normal(*there).cpu(), ops.noise_normal(*here)
            assert (normal.view(torch.int32) - right.view(torch.int32)).abs().max() <= 2 or not SAME_BITS
            torch.testing.assert_close(normal, right, rtol=1e-6, atol=1e-7)


def test_derivatives() -> None:
    torch.manual_seed(3)
    x, out, z = (torch.randn(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=i < 2) for i in range(3))
    p, q, n = torch.randn(3, 3, dtype=torch.float64, device=DEVICE).unbind()
    for f in (
        lambda x, out: ops.affine(x, out, p, q),
        lambda x, out: ops.affine_noise(x, out, p, q, n, Draw(z=z)),
        lambda x, out: ops.perturb(x, p, n, Draw(z=z)),
        lambda x, out: ops.score_loss(out, p, q, n, Draw(z=z)),
    ):
        assert torch.autograd.gradcheck(f, (x, out))
        assert torch.autograd.gradgradcheck(f, (x, out))


def test_arrays_on_different_devices_are_refused() -> None:
    x, key = torch.ones(3, 4, device=DEVICE), torch.tensor([1, 2])
    norm, after = torch.ones(4, dtype=torch.float64, device=DEVICE), torch.zeros(4, dtype=torch.bool)
    for call, name in (
        (lambda: ops.affine(x, x.cpu(), 1.0, 1.0), "out"),
        (lambda: ops.affine(x.cpu(), x, 1.0, 1.0), "out"),
        (lambda: ops.affine(x, None, torch.ones(3)), "p"),
        (lambda: ops.combine([x, x.cpu()], [[1.0, 1.0]]), "arrays"),
        (lambda: ops.combine([x, x], torch.ones(1, 2)), "coefficients"),
        (lambda: ops.perturb(x, 1.0, 1.0, Draw(key=key)), "key"),
        (lambda: ops.perturb(x, 1.0, 1.0, Draw(key=key.to(DEVICE), ids=torch.arange(3))), "ids"),
        (lambda: ops.rk_control(norm, norm, after, -0.2), "after_rejection"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call()


# ---- streams, synchronisation, graphs ----


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@every_op
def test_nothing_waits_for_the_gpu(op: Op, coefficients: str) -> None:
    for noise in noises(op):
        v = on(DEVICE, arguments(op, (5, 3000), torch.float32, coefficients, noise))
        with no_synchronisation():
            op.call(ops, v)


def test_controller_and_noise_do_not_wait_for_the_gpu() -> None:
    norm, key = torch.rand(9, dtype=torch.float64, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    after = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    with no_synchronisation():
        ops.rk_control(norm, norm, after, -0.2)
        ops.noise_normal(key, None, 0, (3, 5))
        ops.noise_uniform(key, None, 0, (3, 5))
        ops.noise_integers(key, None, 0, (3, 5), 10)


def test_the_synchronisation_check_can_fail() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        torch.ones(1, device=DEVICE).item()


@every_op
def test_the_current_stream_is_used(op: Op) -> None:
    """The arguments arrive late on a stream of their own: work on another stream would see what was there before."""
    v = arguments(op, (5, 3000), torch.float32)
    right = run_checked(op, v)
    late, stream = on(DEVICE, v), torch.cuda.Stream()
    targets = [late[name] for name in op.arrays]
    for target in targets:
        target.zero_()
    pinned = [v[name].pin_memory() for name in op.arrays]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        for target, source in zip(targets, pinned, strict=True):
            target.copy_(source, non_blocking=True)
        results = op.call(ops, late)
    assert not stream.query(), "the sleep was too short to show anything"
    stream.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip(results, right, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
@every_op
def test_the_device_of_the_arrays_is_used(op: Op) -> None:
    v = arguments(op, (5, 3000), torch.float32, "floats", "key" if op.noise else "array")
    right = run_checked(op, v)
    results = op.call(ops, on(torch.device("cuda", 1), v))
    assert torch.cuda.current_device() == 0
    for result, other in zip(results, right, strict=True):
        assert result.device.index == 1
        assert torch.equal(result.cpu(), other)


def captured(f: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = f()
    return graph, results


@every_op
def test_a_captured_graph_gives_the_same_bits(op: Op) -> None:
    """Also for numbers, and a key, that change after the capture."""
    for noise in noises(op):
        first, second = (arguments(op, (5, 3000), torch.float32, "per sample", noise) for _ in range(2))
        static = on(DEVICE, first)
        graph, results = captured(lambda static=static: op.call(ops, static))
        for v in (first, second):
            if op.noise:
                seed = None if v["draw"].key is None else torch.randint(2**40, (2,))
                v["draw"] = v["draw"]._replace(key=seed)
                for old, new in zip(static["draw"], v["draw"], strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)
            for name in (*op.arrays, *op.coefficients):
                static[name].copy_(v[name])
            graph.replay()
            eager = op.call(ops, on(DEVICE, v))
            assert all(torch.equal(a, b) for a, b in zip(results, eager, strict=True))


# ---- large arrays ----


def needs_memory(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of free GPU memory, {gib} needed")


def tail_of_uniforms(key: tuple[int, int], element: int, n: int) -> Tensor:
    """Elements [element, element + n) of sample 0, from the definition; both multiples of 4."""
    block = torch.arange(element // 4, (element + n) // 4)
    zero = torch.zeros_like(block)
    words = reference.philox((block, zero + key[1], zero, zero), (key[0], 0))
    return (torch.stack(words, dim=-1).flatten() >> 8).float() / 2**24


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("beyond", [0, 1], ids=["vector", "scalar"])
def test_more_than_2_to_31_elements(rows: int, beyond: int) -> None:
    needs_memory(40)
    cols = (2**31 + 64) // rows // 8 * 8 + 8 + beyond
    x = torch.zeros(rows, cols, dtype=torch.bfloat16, device=DEVICE)
    x[-1, -64:] = torch.arange(64, device=DEVICE)
    x[0, :64] = torch.arange(64, device=DEVICE)
    mean = ops.affine(x, x, 1.0, 0.5)
    assert torch.equal(mean, 1.5 * x)
    (combined,) = ops.combine([x, x], [[1.0, 0.5]])
    assert torch.equal(combined, mean)
    del mean, combined
    loss = ops.score_loss(x, 1.0, None, 1.0).cpu()
    squares = float((torch.arange(64) ** 2).sum())
    expected = torch.zeros(rows)
    expected[0] += squares
    expected[-1] += squares
    assert torch.equal(loss, expected)


def test_noise_of_a_long_row() -> None:
    needs_memory(20)
    values = ops.noise_uniform(torch.tensor([7, 5], device=DEVICE), None, 0, (1, 2**31 + 64))
    assert torch.equal(values[0, -64:].cpu(), tail_of_uniforms((7, 5), 2**31, 64))


def test_more_rows_than_a_grid_has() -> None:
    x = torch.randn(2**24 + 2**18 + 3, 2, device=DEVICE)
    p = torch.randn(len(x), device=DEVICE)
    assert torch.equal(ops.affine(x, None, p), p[:, None] * x)
    torch.testing.assert_close(ops.score_loss(x, 1.0, None, p), p * x.square().sum(1))
