"""The CUDA kernels as nvcc compiled them, called from Python: a driver process that runs their PTX on the CPU."""

import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from op_table import compute_dtype
from torch import Tensor

from scoresde_ext import reference
from scoresde_ext.ops import Draw

TILE = 1024  # elements that make one partial sum
UNLIMITED = 2**30
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
LAWS = ("normal", "uniform", "integers")


class Fault(Exception):
    """What a kernel did that it must not."""


@dataclass
class Huge:
    """A one-dimensional array that takes no memory but for its ends: zeros lie between them."""

    elements: int
    head: Tensor
    tail: Tensor

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """Each end and the byte where it begins."""
        yield 0, self.head
        yield (self.elements - len(self.tail)) * self.tail.element_size(), self.tail


def as_bytes(t: Tensor) -> bytes:
    return t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Kernels:
    """A driver process, with the functions of ``scoresde_ext.ops`` as the CUDA kernels answer them.

    ``shift``: all arrays, or the one that ``shifted`` names, lie this many elements off an aligned address. ``double``:
    coefficients are float64 for all arrays. ``channels``, if not 0: rows lie in memory as (pixels, channels), and noise
    is for (channels, pixels). ``settings``: of the machine, see its header. ``seen``: names of arrays since ``set``.
    """

    def __init__(self, driver: Path, *ptx: Path) -> None:
        self.set()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([driver, *ptx], stdin=pipe, stdout=pipe, stderr=pipe)

    def __enter__(self) -> "Kernels":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        else:
            self.process.kill()
            self.process.communicate()

    def close(self) -> None:
        """The sanitizers of the host's code report at the end what has leaked."""
        errors = self.process.communicate()[1]
        assert self.process.returncode == 0, errors.decode()

    def set(
        self, shift: int = 0, shifted: str = "", double: bool = False, channels: int = 0, **settings: int
    ) -> "Kernels":
        self.shift, self.shifted, self.double, self.channels = shift, shifted, double, channels
        self.settings = settings
        self.seen: list[str] = []
        return self

    def ask(self, request: bytes) -> str:
        """The line that the driver answers."""
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what follows says why
        answer = self.process.stdout.readline()
        assert answer.endswith(b"\n"), self.process.stderr.read().decode()
        return answer.decode().strip()

    def names(self, which: str) -> frozenset[str]:
        """Of kernels: all "entries" of the PTX, or those that were "launched"."""
        return frozenset(self.ask(b"list %b\n" % which.encode()).split())

    def run(
        self,
        kernel: str,
        results: Mapping[str, Tensor | Huge],
        arrays: Mapping[str, Tensor | Huge | None],
        **numbers: Any,
    ) -> None:
        """Calls a kernel; ``results`` are filled. Raises Fault."""
        request = b""
        for name, value in ({"largest_grid": UNLIMITED, "ends": 0} | self.settings).items():
            request += b"set %b %d\n" % (name.encode(), value)
        for name, value in numbers.items():
            name = name.replace("_stride", ".stride").replace("_double", ".double")
            request += b"number %b %b\n" % (name.encode(), repr(value).encode())
        for key, array in (arrays | results).items():
            name = key.encode()
            if isinstance(array, Huge):
                request += b"huge %b %d\n" % (name, array.elements * array.head.element_size())
                for start, part in array.parts():
                    if key in results:
                        request += b"peek %b %d %d\n" % (name, start, part.nbytes)
                    else:
                        request += b"poke %b %d %d\n%b" % (name, start, part.nbytes, as_bytes(part))
            elif array is not None:
                self.seen.append(key)
                shift = self.shift if self.shifted in ("", key) else 0
                command = b"%b %d %d\n" % (name, array.nbytes, shift * array.element_size())
                request += b"result " + command if key in results else b"array " + command + as_bytes(array)
        answer = self.ask(request + b"run %b\n" % kernel.encode())
        if answer.startswith("fault "):
            raise Fault(answer.removeprefix("fault "))
        assert answer == "0", f"{kernel}: {answer}"
        for result in results.values():
            for part in [part for _, part in result.parts()] if isinstance(result, Huge) else [result]:
                data = self.process.stdout.read(part.nbytes)
                part.copy_(torch.frombuffer(bytearray(data), dtype=part.dtype).view(part.shape))

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
