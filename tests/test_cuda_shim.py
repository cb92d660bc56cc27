"""The CUDA kernels, run thread by thread on the CPU (tests/cuda_shim), against their meaning in plain torch.

Compiled with g++ from the same source as for a GPU, once plain and once under the address and undefined-behaviour
sanitizers. What only a GPU can show (registers, memory coalescing, streams) is not tested here.
"""

import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_table import DTYPES, NOISE, OPS, Arguments, Op, arguments, check, compute_dtype
from torch import Tensor

from scoresde_ext import _C, ops, reference
from scoresde_ext.ops import Draw

ROOT = Path(__file__).resolve().parent.parent
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # nvcc has pragmas of its own
FLAGS = ["-std=c++20", "-O1", *WARNINGS, "-ffp-contract=off", "-fno-strict-aliasing", "-pthread"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TILE = 1024  # elements that make one partial sum
UNLIMITED = 2**30

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the shim needs g++")
pytestmark = needs_compiler


# A chunk is 4 elements (8 of two bytes), a warp 32 of them along a row, a block 256; a tile 1024 elements.
SHAPES = [
    (1,), (257, 3), (65, 4), (33, 8), (17, 17), (9, 127), (9, 128), (5, 129), (3, 511), (3, 1024), (2, 1025), (1, 2056),
    (3, 2, 7, 5),
]  # fmt: skip


def as_bytes(t: Tensor) -> bytes:
    return t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Shim:
    """A driver process, with the functions of ``scoresde_ext.ops`` as the CUDA kernels answer them.

    ``shift``: all arrays lie this many elements off an aligned address. ``double``: coefficients are float64 for all
    arrays. ``channels``, if not 0: rows lie in memory as (pixels, channels), and noise is for (channels, pixels).
    ``settings``: of the shim, see its source.
    """

    def __init__(self, driver: Path) -> None:
        self.set()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(driver, stdin=pipe, stdout=pipe, stderr=pipe)

    def set(self, shift: int = 0, double: bool = False, channels: int = 0, **settings: int) -> "Shim":
        self.shift, self.double, self.channels, self.settings = shift, double, channels, settings
        return self

    def close(self) -> None:
        errors = self.process.communicate()[1]
        assert self.process.returncode == 0, errors.decode()

    def run(self, kernel: str, results: dict[str, Tensor], arrays: dict[str, Tensor | None], **numbers: Any) -> None:
        """Calls a kernel; ``results`` are filled."""
        request = b""
        for name, value in ({"largest_grid": UNLIMITED, "skipped_barrier": 0, "jitter": 0} | self.settings).items():
            request += b"shim %b %d\n" % (name.encode(), value)
        for name, value in numbers.items():
            name = name.replace("_stride", ".stride").replace("_double", ".double")
            request += b"number %b %b\n" % (name.encode(), repr(value).encode())
        for name, t in arrays.items():
            if t is not None:
                data = as_bytes(t)
                request += b"array %b %d %d\n%b" % (name.encode(), len(data), self.shift * t.element_size(), data)
        for name, t in results.items():
            request += b"result %b %d %d\n" % (name.encode(), t.nbytes, self.shift * t.element_size())
        self.process.stdin.write(request + b"run %b\n" % kernel.encode())
        self.process.stdin.flush()
        code = self.process.stdout.readline()
        assert code == b"0\n", code.decode() or self.process.stderr.read().decode()
        for t in results.values():
            data = self.process.stdout.read(t.nbytes)
            t.copy_(torch.frombuffer(bytearray(data), dtype=t.dtype).view(t.shape))

    # ---- arguments ----

    def shape(self, x: Tensor) -> dict[str, int]:
        return {"dtype": DTYPE_CODES[x.dtype], "rows": len(x), "cols": x[0].numel()}

    def coefficients(self, x: Tensor, **values: Tensor | float | None) -> tuple[dict[str, Tensor], dict[str, int]]:
        dtype = torch.float64 if self.double else compute_dtype(x.dtype)
        given = {n: torch.as_tensor(v, dtype=dtype) for n, v in values.items() if v is not None}
        numbers = {f"{n}_stride": int(v.numel() > 1) for n, v in given.items()}
        return given, numbers | dict.fromkeys((f"{n}_double" for n in given), int(dtype == torch.float64))

    def noise(self, draw: Draw | None, x: Tensor) -> tuple[dict[str, Tensor | None], dict[str, int]]:
        draw = draw or Draw()
        order = {"channels": self.channels, "pixels": x[0].numel() // self.channels} if self.channels else {}
        return {"z": draw.z, "key": draw.key, "ids": draw.ids}, {"draw": draw.draw} | order

    def slopes(self, name: str, ks: Sequence[Tensor], weights: Sequence[float]) -> tuple[dict[str, Tensor], dict]:
        used = [(k, w) for k, w in zip(ks, weights, strict=True) if w]
        numbers = {f"{name}{i}": w for i, (_, w) in enumerate(used)}
        return {f"k{i}": k for i, (k, _) in enumerate(used)}, {"stages": len(used), **numbers}

    def sums(self, partials: Tensor, dtype: torch.dtype, **weight: Tensor | float) -> Tensor:
        sums = torch.empty(len(partials), dtype=dtype)
        given, strides = self.coefficients(sums, **weight)
        arrays = {"partials": partials, **given}
        self.run("sum", {"sums": sums}, arrays, **self.shape(partials) | {"dtype": DTYPE_CODES[dtype]}, **strides)
        return sums

    # ---- the ops ----

    def affine(self, x, out, p, q=None) -> Tensor:
        mean = torch.empty_like(x)
        given, strides = self.coefficients(x, p=p, q=q)
        self.run("affine", {"mean": mean}, {"x": x, "out": out, **given}, **self.shape(x), **strides)
        return mean

    def affine_noise(self, x, out, p, q, n, draw) -> tuple[Tensor, Tensor]:
        mean, after = torch.empty_like(x), torch.empty_like(x)
        (given, strides), (noise, number) = self.coefficients(x, p=p, q=q, n=n), self.noise(draw, x)
        arrays = {"x": x, "out": out, **given, **noise}
        self.run("affine", {"mean": mean, "next": after}, arrays, **self.shape(x), **strides, **number)
        return mean, after

    def affine_next(self, x, out, p, q, n, draw) -> Tensor:
        after = torch.empty_like(x)
        (given, strides), (noise, number) = self.coefficients(x, p=p, q=q, n=n), self.noise(draw, x)
        arrays = {"x": x, "out": out, **given, **noise}
        self.run("affine", {"next": after}, arrays, **self.shape(x), **strides, **number)
        return after

    def perturb(self, x0, m, s, draw) -> Tensor:
        after = torch.empty_like(x0)
        (given, strides), (noise, number) = self.coefficients(x0, p=m, n=s), self.noise(draw, x0)
        self.run("affine", {"next": after}, {"x": x0, **given, **noise}, **self.shape(x0), **strides, **number)
        return after

    def residual(self, out, c, d, w, draw, results: dict[str, Tensor]) -> Tensor:
        partials = torch.empty(len(out), (out[0].numel() + TILE - 1) // TILE, dtype=torch.float64)
        (given, strides), (noise, number) = self.coefficients(out, c=c, d=d, w=w), self.noise(draw, out)
        arrays = {"out": None if c is None else out, **given, **noise}
        weighted = int(out.dtype in (torch.float32, torch.float64))
        numbers = self.shape(out) | strides | number
        self.run("residual", {"partials": partials} | results, arrays, weighted_grad=weighted, **numbers)
        return self.sums(partials, compute_dtype(out.dtype), w=w)

    def score_loss(self, out, c, d, w, draw=None) -> Tensor:
        return self.residual(out, c, d, w, draw, {})

    def score_loss_and_gradient(self, out, c, d, w, draw) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(out)
        loss = self.residual(out, c, d, w, draw, {"grad": grad})
        if out.dtype not in (torch.float32, torch.float64):
            grad = self.affine(grad, None, w)
        return loss, grad

    def combine(self, arrays, coefficients) -> tuple[Tensor, ...]:
        first = arrays[0]
        matrix = coefficients if isinstance(coefficients, Tensor) else torch.tensor(coefficients)
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        results = {f"result{m}": torch.empty_like(first) for m in range(len(matrix))}
        samples = matrix[0, 0].numel()
        strides = {"c_m_stride": len(arrays) * samples, "c_k_stride": samples, "c_row_stride": int(matrix.dim() == 3)}
        numbers = {"n_terms": len(arrays), "n_results": len(matrix), "c_in_f64": int(matrix.dtype == torch.float64)}
        given = {f"array{k}": a for k, a in enumerate(arrays)} | {"c": matrix}
        self.run("combine", results, given, **self.shape(first), **numbers, **strides)
        return tuple(results.values())

    def rk_stage(self, y, ks, a, h) -> Tensor:
        return self.stage(y, ks, [(*a, 0.0)], 1, h, (), None, None, None, keep=False)[0]

    def rk_drift_stage(self, y, ks, a, h, x, out, f, q) -> tuple[Tensor, Tensor]:
        return self.stage(y, ks, [a], 1, h, x, out, f, q)

    def rk_last_stage(self, y, ks, a, h, x, out, f, q) -> tuple[Tensor, ...]:
        return self.stage(y, ks, a, 2, h, x, out, f, q)

    def stage(self, y, ks, a, states, h, x, out, f, q, keep=True) -> tuple[Tensor, ...]:
        results = {"k_new": torch.empty_like(y)} if keep else {}
        results |= {f"result{m}": torch.empty_like(y) for m in range(len(a))}
        given, strides = self.coefficients(y, h=h, f=f, q=q)
        at = () if isinstance(x, Tensor) else x
        used = [j for j in range(len(ks)) if any(line[j] for line in a) or (at and at[j])]
        arrays = {f"k{i}": ks[j] for i, j in enumerate(used)}
        numbers = {f"at{i}": at[j] if at else 0.0 for i, j in enumerate(used)}
        numbers |= {f"a{m}{i}": line[j] for m, line in enumerate(a) for i, j in enumerate(used)}
        numbers |= {f"a{m}new": line[-1] for m, line in enumerate(a)}
        numbers |= {"stages": len(used), "lines": len(a), "states": states}
        arrays |= {"y": y, "x": x if isinstance(x, Tensor) else None, "out": out, **given}
        self.run("stage", results, arrays, **self.shape(y), **strides, **numbers)
        return tuple(results.values())

    def rk_error(self, y0, y1, ks, e, h, rtol, atol) -> Tensor:
        return self.error(y0, y1, ks, (*e, 0.0), h, None, None, None, rtol, atol, {})

    def rk_drift_error(self, y0, y1, ks, e, h, out, f, q, rtol, atol) -> tuple[Tensor, Tensor]:
        slope = torch.empty_like(y0)
        return self.error(y0, y1, ks, e, h, out, f, q, rtol, atol, {"k_new": slope}), slope

    def error(self, y0, y1, ks, e, h, out, f, q, rtol, atol, results) -> Tensor:
        partials = torch.empty(len(y0), (y0[0].numel() + TILE - 1) // TILE, dtype=torch.float64)
        (given, strides), (slopes, weights) = self.coefficients(y0, h=h, f=f, q=q), self.slopes("e", ks, e[:-1])
        arrays, numbers = {"y0": y0, "y1": y1, "out": out, **given, **slopes}, self.shape(y0) | strides | weights
        self.run("error", {"partials": partials} | results, arrays, rtol=rtol, atol=atol, e_new=e[-1], **numbers)
        return self.sums(partials, torch.float64)

    def rk_control(self, norm, h, after_rejection, exponent) -> Tensor:
        accepted, following = torch.empty_like(norm), torch.empty_like(norm)
        arrays = {"norm": norm, "h": h, "after_rejection": after_rejection}
        self.run("control", {"accepted": accepted, "h_next": following}, arrays, rows=len(norm), exponent=exponent)
        return torch.stack([accepted, following])

    def marginal(self, u, first, last, process, a, b) -> tuple[Tensor, ...]:
        results = {name: torch.empty_like(u) for name in "tms"}
        p, q = (a, math.log(b / a)) if process == "ve" else (0.25 * (b - a), 0.5 * a)
        numbers = {"first": first, "span": last - first, "p": p, "q": q, "process": reference.PROCESSES.index(process)}
        self.run("marginal", results, {"u": u}, rows=len(u), dtype=DTYPE_CODES[u.dtype], **numbers)
        return tuple(results.values())

    def noise_values(self, law: str, draw: Draw, size: tuple[int, ...], high: int = 0) -> Tensor:
        values = torch.empty(size, dtype=torch.int64 if law == "integers" else torch.float32)
        arrays, numbers = self.noise(draw, values)
        numbers |= {"rows": size[0], "cols": values[0].numel(), "law": LAWS.index(law), "high": high}
        self.run("noise", {"values": values}, arrays, **numbers)
        return values


DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LAWS = ("normal", "uniform", "integers")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Gives the path of the driver "plain" or "sanitized"; both are compiled side by side."""
    folder = tmp_path_factory.mktemp("cuda_shim")
    source, includes = ROOT / "tests/cuda_shim/driver.cpp", [f"-I{ROOT}/tests/cuda_shim", f"-I{ROOT}/csrc"]
    builds = {
        name: subprocess.Popen(
            ["g++", *FLAGS, *more, *includes, source, "-o", folder / name], stderr=subprocess.PIPE, text=True
        )
        for name, more in (("sanitized", SANITIZE), ("plain", []))
    }

    def path(name: str) -> Path:
        _, errors = builds[name].communicate() if builds[name].returncode is None else ("", "")
        assert builds[name].returncode == 0, errors
        return folder / name

    yield path
    for build in builds.values():
        build.kill()


@pytest.fixture(scope="module")
def shim(driver: Any) -> Iterator[Shim]:
    shim = Shim(driver("plain"))
    yield shim
    shim.close()


@pytest.fixture(scope="module")
def sanitized(driver: Any) -> Iterator[Shim]:
    shim = Shim(driver("sanitized"))
    yield shim
    shim.close()


def call(op: Op, shim: Any, v: Arguments) -> tuple[Tensor, ...]:
    if op is OPS["score_loss and gradient"]:
        return shim.score_loss_and_gradient(*(v[name] for name in ("out", "c", "d", "w", "draw")))
    return op.call(shim, v)


def every_case(op: Op, dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> Iterator[Arguments]:
    for i, shape in enumerate(shapes):
        noise = NOISE[i % len(NOISE)] if op.noise else "array"
        yield arguments(op, shape, dtype, ("per sample", "one element")[i % 5 == 4], noise)


every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@every_dtype
@every_op
def test_values(op: Op, dtype: torch.dtype, shim: Shim) -> None:
    """Against the reference; and in a grid of one block, whose loops then go over the arrays, or off by one element, or
    with float64 coefficients, which the kernels round."""
    changes: list[dict[str, int]] = [{"largest_grid": 1}, {"shift": 1}, {"double": True}]
    for i, v in enumerate(every_case(op, dtype)):
        results = call(op, shim.set(), v)
        check(op, v, results, noise_ulp=4)
        again = call(op, shim.set(**changes[i % 3]), v)
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.skipif(
    _C.build_info()["cpu_capability"] == "generic", reason="the generic CPU kernels have no fused multiply-add"
)
@every_op
def test_the_cpu_gives_the_same_bits(op: Op, shim: Shim) -> None:
    for dtype in DTYPES:
        for v in every_case(op, dtype, [(17, 17), (3, 1024), (2, 1025)]):
            theirs = call(op, SimpleNamespace(**vars(ops), score_loss_and_gradient=cpu_loss_and_gradient), v)
            for result, other, is_sum in zip(call(op, shim.set(), v), theirs, op.sums, strict=True):
                assert is_sum or torch.equal(result, other)


def cpu_loss_and_gradient(out: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = out.detach().requires_grad_()
    loss = ops.score_loss(out, *rest)
    return loss.detach(), *torch.autograd.grad(loss.sum(), out)


def test_combine_of_any_number_of_arrays(shim: Shim) -> None:
    """Bit for bit what plain torch gives: products and sums are rounded one by one, in order."""
    for i, n_terms in enumerate(range(1, 17)):
        for j, dtype in enumerate(DTYPES):
            shape, compute = [(33, 8), (257, 3), (3, 1025)][(i + j) % 3], compute_dtype(dtype)
            arrays = [torch.randn(shape).to(dtype) for _ in range(n_terms)]
            for size in ((), shape[:1]):
                matrix = torch.randn(1 + (i + j) % 4, n_terms, *size, dtype=DTYPES[i % 2])
                right = reference.combine([a.to(compute) for a in arrays], matrix.to(compute))
                for result, exact in zip(shim.set().combine(arrays, matrix), right, strict=True):
                    assert torch.equal(result, exact.to(dtype))


def test_noise(shim: Shim) -> None:
    key, draw = torch.tensor([-(2**40) + 7, 2**31]), 2**31 + 5
    for size in SHAPES:
        ids = torch.randint(-(2**62), 2**62, size[:1])
        for d in (Draw(key=key), Draw(key=key, ids=ids, draw=draw)):
            for changed in ({}, {"shift": 1, "largest_grid": 1}):
                shim.set(**changed)
                normal, right = shim.noise_values("normal", d, size), reference.noise_normal(key, d.ids, d.draw, size)
                torch.testing.assert_close(normal, right, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-37)
                uniform = reference.noise_uniform(key, d.ids, d.draw, size)
                assert torch.equal(shim.noise_values("uniform", d, size), uniform)
                for high in (1, 1000, 2**32):
                    integers = reference.noise_integers(key, d.ids, d.draw, size, high)
                    assert torch.equal(shim.noise_values("integers", d, size, high), integers)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (3, 5, 3, 7), (2, 8, 9, 5), (2, 1030, 2), (1, 3, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.noise])
def test_noise_of_channels_last(name: str, shape: tuple[int, ...], shim: Shim) -> None:
    """Memory in another order, the same number for every element."""
    op, last = OPS[name], (0, *range(2, len(shape)), 1)

    def moved(x: Any) -> Any:
        return x.permute(last).contiguous() if isinstance(x, Tensor) and x.shape == shape else x

    for dtype in DTYPES:
        v = arguments(op, shape, dtype, "per sample", "key and ids")
        right = call(op, shim.set(), v)
        found = call(op, shim.set(channels=shape[1]), {name: moved(value) for name, value in v.items()})
        for result, other, is_sum in zip(found, right, op.sums, strict=True):
            if is_sum:
                torch.testing.assert_close(result, other)  # added in another order
            else:
                assert torch.equal(result, other.permute(last))


def test_a_loop_on_the_device(shim: Shim) -> None:
    """The step is run as long as its flag is set, and at least once, at every launch."""
    for enough, launches, steps in ((1, 1, 1), (5, 1, 5), (5, 3, 7), (0, 2, 2)):
        flag, count = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        shim.set().run("loop", {"flag": flag, "count": count}, {}, enough=enough, launches=launches)
        assert (count.item(), flag.item()) == (steps, 0)


def test_control(shim: Shim) -> None:
    norms = [0.0, 1e-300, 1e-9, 0.3, 0.59, 0.6, 1 - 1e-16, 1.0, 1.5, 1e3, 1e300, torch.inf, torch.nan]
    for repeats in (1, 40):
        norm = torch.tensor(norms, dtype=torch.float64).repeat(repeats)
        h, after = torch.rand(len(norm), dtype=torch.float64), torch.rand(len(norm)) < 0.5
        for largest_grid in (UNLIMITED, 1):
            result = shim.set(largest_grid=largest_grid).rk_control(norm, h, after, -1 / 5)
            torch.testing.assert_close(result, reference.rk_control(norm, h, after, -1 / 5), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marginals(dtype: torch.dtype, shim: Shim) -> None:
    for n in (1, 3, 255, 256, 257, 1000):
        u = torch.rand(n, dtype=dtype)
        for process, a, b in (("vp", 0.1, 20.0), ("subvp", 0.1, 20.0), ("ve", 0.01, 50.0)):
            for largest_grid in (UNLIMITED, 1):
                results = shim.set(largest_grid=largest_grid).marginal(u, 1e-5, 1.0, process, a, b)
                for one, other in zip(results, ops.marginal(u, 1e-5, 1.0, process, a, b), strict=True):
                    torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=0)


@every_dtype
@pytest.mark.parametrize("shift", [0, 1])
def test_put(shift: int, dtype: torch.dtype, shim: Shim) -> None:
    """Chosen rows; the others keep what the driver had put there."""
    for shape in ((5, 1), (7, 3), (3, 1030), (300, 8)):
        values = torch.randn(shape).to(dtype)
        before = torch.full_like(values, 0).view(torch.uint8).fill_(0x5A).view(dtype)
        for chosen in (torch.arange(shape[0]) % 3 == 1, torch.tensor([True]), torch.tensor([False])):
            into, stride = torch.empty_like(values), int(len(chosen) > 1)
            numbers = shim.shape(values) | {"chosen_stride": stride}
            shim.set(shift=shift).run("put", {"into": into}, {"values": values, "chosen": chosen}, **numbers)
            assert torch.equal(into, torch.where(chosen[:, None], values, before))


@pytest.mark.parametrize("tiles", [0, 1, 2, 33, 255, 256, 257, 1000])
def test_sums_of_tiles(tiles: int, shim: Shim) -> None:
    for rows in (1, 20):
        partials, w = torch.rand(rows, tiles, dtype=torch.float64), torch.rand(rows)
        torch.testing.assert_close(shim.set().sums(partials, torch.float64), partials.sum(1), rtol=1e-14, atol=0)
        torch.testing.assert_close(shim.sums(partials, torch.float32, w=w), (w * partials.sum(1)).float())


def test_nan_is_not_hidden(shim: Shim) -> None:
    """In the last elements of a long row, which another warp and another tile than the first ones work on."""
    op = OPS["rk_error"]
    for name in op.arrays:
        v = arguments(op, (3, 1300), torch.float32)
        v[name][1, -1] = torch.nan
        assert torch.equal(call(op, shim.set(), v)[0].isnan(), torch.tensor([False, name != "k1", False]))


# ---- races ----

BARRIERS = [
    i
    for i, line in enumerate((ROOT / "csrc/kernels/cuda_loops.h").read_text().splitlines(), 1)
    if "__syncthreads();" in line
]


def wrong_sums(shim: Shim, **settings: int) -> int:
    """How many of several row sums, each of many warps and tiles, are not what they are without haste."""
    v = arguments(OPS["score_loss of out"], (2, 8 * TILE), torch.float32)
    arrays, numbers = {"out": v["out"], "c": v["c"]}, shim.shape(v["out"]) | {"c_stride": 1, "weighted_grad": 0}
    partials = torch.empty(2, 2, 8, dtype=torch.float64)
    for result, changed in zip(partials, ({}, {"jitter": 1, "largest_grid": 1} | settings), strict=True):
        shim.set(**changed).run("residual", {"partials": result}, arrays, **numbers)
    return int((partials[0] != partials[1]).sum())


def test_sums_have_no_race(shim: Shim) -> None:
    assert sum(wrong_sums(shim) for _ in range(3)) == 0


@pytest.mark.parametrize("line", BARRIERS)
def test_every_barrier_is_needed(line: int, shim: Shim) -> None:
    """Without one of them, threads that dawdle are overtaken, and sums are wrong."""
    assert any(wrong_sums(shim, skipped_barrier=line) for _ in range(20))


def test_there_are_barriers() -> None:
    assert len(BARRIERS) == 2


# ---- memory ----


@every_op
def test_no_access_outside_the_arrays(op: Op, sanitized: Shim) -> None:
    """Every array ends where its memory ends: the sanitizers stop the driver at the first access beyond."""
    for dtype in DTYPES:
        for i, v in enumerate(every_case(op, dtype, [(257, 3), (5, 8), (3, 129), (3, 1028)])):
            check(op, v, call(op, sanitized.set(shift=i % 2), v), noise_ulp=4)


def test_no_access_outside_the_other_arrays(sanitized: Shim) -> None:
    test_combine_of_any_number_of_arrays(sanitized)
    test_noise(sanitized)
    test_control(sanitized)
    test_marginals(torch.float32, sanitized)
    test_put(0, torch.float32, sanitized)
    test_put(1, torch.bfloat16, sanitized)
    test_a_loop_on_the_device(sanitized)
    test_sums_of_tiles(257, sanitized)
    test_noise_of_channels_last("perturb", (3, 5, 3, 7), sanitized)


def test_the_sanitizer_sees_an_array_too_short(driver: Any) -> None:
    shim = Shim(driver("sanitized"))
    x = torch.randn(3, 5)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        shim.run("affine", {"mean": torch.empty(3, 5)}, {"x": x.flatten()[:-1], "p": torch.ones(1)}, **shim.shape(x))
