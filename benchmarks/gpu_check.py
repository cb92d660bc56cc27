"""Everything that asks for a GPU, in under nine minutes and without a network: ``make gpu-check``

Builds the extension, runs the tests marked ``gpu``, runs a small suite under compute-sanitizer, and measures: the
kernels against the copy bandwidth of the same run, the steps against eager torch and ``torch.compile``, whole solves
against scipy and torchode. Writes one JSON file into ``benchmarks/results`` and prints a short table last. Ends with an
exit status that is not 0 where anything failed, and says what.

``--rehearse`` runs what a CPU can, on small sizes: the same code, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 9 * 60  # seconds, for everything
GPU_TESTS = ("tests/test_cuda_gpu.py", "tests/test_gpu_loops.py")


class Failed(Exception):
    """A part that failed, in words."""


class Skipped(Exception):
    """A part that was left out, and why."""


class Measured(NamedTuple):
    """Seconds of one call, over several: 20 %, median, 80 %."""

    p20: float
    p50: float
    p80: float


class Report:
    """What the run found."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse, self.since = rehearse, time.monotonic()
        self.parts: dict[str, str] = {}
        self.headline: dict[str, float] = {}
        self.results: list[dict[str, Any]] = []

    @property
    def seconds_left(self) -> float:
        return LIMIT - (time.monotonic() - self.since)

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Runs a part; a failure is kept, and the others run all the same."""
        print(f"\n== {name}", flush=True)
        since = time.monotonic()
        try:
            if self.seconds_left <= 0:
                raise Failed(f"the {LIMIT // 60} minutes were over before it began")
            run()
            self.parts[name] = "passed"
        except Skipped as skipped:
            self.parts[name] = f"skipped: {skipped}"
        except Failed as failed:
            self.parts[name] = f"failed: {failed}"
        except Exception as error:
            traceback.print_exc()
            self.parts[name] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        print(f"   {self.parts[name]} ({time.monotonic() - since:.0f} s)", flush=True)

    def add(self, name: str, measured: Measured, **more: Any) -> float:
        self.results.append({"name": name, "seconds": measured._asdict(), **more})
        return measured.p50


def call(report: Report, *command: str, allowed: Sequence[int] = (0,), **environment: str) -> str:
    """Runs a command in the checkout, within the time that is left; what it printed. Failed where it fails."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env | environment, text=True, timeout=max(report.seconds_left, 1.0),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        print(late.output or "")
        raise Failed(f"{' '.join(command[:4])} ... was not done when the {LIMIT // 60} minutes were over") from None
    print(done.stdout[-4000:], flush=True)
    if done.returncode not in allowed:
        raise Failed(f"{' '.join(command[:4])} ... ended with status {done.returncode}")
    return done.stdout


# ---- build, tests, sanitizers ----


def build(report: Report) -> None:
    missing = [name for name in ("torch", "numpy", "scipy", "tqdm", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        raise Failed(f"this Python has no {', '.join(missing)}: install what is missing")
    if report.rehearse:
        call(report, sys.executable, "-c", "import scoresde_ext")
        return
    import torch

    if not torch.cuda.is_available():
        raise Failed("torch sees no CUDA device; --rehearse runs what a CPU can")
    major, minor = torch.cuda.get_device_capability()
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}+PTX")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    call(report, *build, SCORESDE_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=archs)


def tests(report: Report) -> None:
    run = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs")
    if report.rehearse:
        call(report, *run, *GPU_TESTS, allowed=(0, 5))  # 5: none was left to run
        raise Skipped("the tests marked gpu skip themselves on a CPU")
    if " passed" not in call(report, *run, *GPU_TESTS).splitlines()[-1]:
        raise Failed("no test marked gpu was run")


def sanitize(report: Report, tool: str) -> None:
    if report.rehearse:
        call(report, sys.executable, "-m", "benchmarks.gpu_check", "--small-suite", "cpu")
        raise Skipped("a CPU has no compute-sanitizer; the small suite ran without it")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if sanitizer is None:
        raise Failed("there is no compute-sanitizer on PATH or in CUDA_HOME: it is a part of the CUDA toolkit")
    suite = (sys.executable, "-m", "benchmarks.gpu_check", "--small-suite", "cuda")
    call(report, sanitizer, "--tool", tool, "--error-exitcode", "9", *suite, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def small_suite(device: str) -> None:
    """Every op over types, sizes on both sides of a block and a vector, and layouts. For sanitizers: values are not
    looked at."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from op_table import DTYPES, OPS, arguments

    from scoresde_ext import ops
    from scoresde_ext.ops import Draw

    def moved(v: Any) -> Any:
        if isinstance(v, Draw):
            return Draw(*(moved(part) for part in v))
        return v.to(device) if isinstance(v, torch.Tensor) else v

    for op in OPS.values():
        for i, shape in enumerate([(257, 3), (3, 1024), (2, 1025), (1, 2056), (2, 3, 5, 8)]):
            v = arguments(op, shape, DTYPES[i % 4], "per sample", ("array", "key", "key and ids")[i % 3])
            v = {name: moved(value) for name, value in v.items()}
            if len(shape) == 4:
                last = torch.channels_last
                arrays = {name: v[name].to(memory_format=last) for name in op.arrays}
                v |= arrays
            op.call(ops, v)
    norm, h = torch.rand(2, 300, dtype=torch.float64, device=device)
    ops.rk_control(norm, h, norm < 0.5, -0.2)
    for process in ("vp", "subvp", "ve"):
        ops.marginal(torch.rand(300, device=device), 1e-5, 1.0, process, 0.1, 20.0)
    for i, shape in enumerate([(300, 3), (300, 1024), (300, 1025)]):
        into, values = torch.zeros(2, *shape, device=device, dtype=DTYPES[i]).unbind()
        ops.put(into, values, norm < 0.5)
    key = torch.tensor([1, 2], device=device)
    ops.noise_normal(key, None, 0, (3, 1025))
    ops.noise_uniform(key, None, 0, (3, 1025))
    ops.noise_integers(key, None, 0, (3, 1025), 10)
    if device == "cuda":
        torch.cuda.synchronize()


# ---- measuring ----


class Stopwatch:
    """Seconds of a call: on a GPU between events, over as many calls as take a few milliseconds."""

    def __init__(self, rehearse: bool) -> None:
        self.on_gpu, self.repeats, self.least = not rehearse, 5 if rehearse else 25, 0.0 if rehearse else 3e-3

    def once(self, f: Callable[[], Any], calls: int) -> float:
        import torch

        if not self.on_gpu:
            since = time.perf_counter()
            for _ in range(calls):
                f()
            return (time.perf_counter() - since) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def compare(self, *functions: Callable[[], Any], repeats: int | None = None) -> list[Measured]:
        """The functions in turn, so that what disturbs one disturbs all."""
        for f in functions:
            f()
        calls = [max(1, min(200, int(self.least / max(self.once(f, 1), 1e-7)))) for f in functions]
        found: list[list[float]] = [[] for _ in functions]
        for _ in range(repeats or self.repeats):
            for seconds, f, n in zip(found, functions, calls, strict=True):
                seconds.append(self.once(f, n))
        # Inclusive: of a few repeats, the other method gives quantiles beyond what was measured.
        return [Measured(*(statistics.quantiles(s, n=10, method="inclusive")[i] for i in (1, 4, 7))) for s in found]


def kernel_cases(rows: int, cols: int, dtype: Any, device: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Every kernel on arrays ``(rows, cols)``, with the number of arrays it reads and writes; a copy first."""
    import torch

    from scoresde_ext import ops
    from scoresde_ext.ops import Draw

    x, out, *ks = (torch.randn(rows, cols, device=device, dtype=dtype) for _ in range(7))
    key = Draw(key=torch.tensor([1, 2], device=device))
    c, d, w = torch.rand(3, rows, device=device).unbind()
    leaf, target, matrix = out.clone().requires_grad_(), torch.empty_like(x), torch.rand(2, 5, device=device)
    weights = (0.1, 0.2, 0.3, 0.4, 0.5)
    return {
        "copy": (lambda: target.copy_(x), 2),
        "perturbation": (lambda: ops.perturb(x, c, d, key), 2),
        "loss with gradient": (lambda: ops.score_loss(leaf, c, d, w, key), 2),
        "predictor update": (lambda: ops.affine_next(x, out, c, d, w, key), 3),
        "Runge-Kutta stage": (lambda: ops.rk_drift_stage(x, ks[:3], weights[:4], c, weights[:3], out, c, d), 7),
        "error norm": (lambda: ops.rk_error(x, out, ks, weights, c, 1e-3, 1e-3), 7),
        "multistep update": (lambda: ops.combine([x, out, *ks[:3]], matrix), 7),
    }


def kernels(report: Report, watch: Stopwatch, device: str) -> None:
    """Every kernel against a copy of an array of the same size: bytes a second over bytes a second."""
    import torch

    rows, cols = (8, 1024) if report.rehearse else (256, 3 * 256 * 256)
    shares: list[float] = []
    for dtype in (torch.float32, torch.bfloat16):
        cases, kind = kernel_cases(rows, cols, dtype, device), str(dtype).removeprefix("torch.")
        size = rows * cols * dtype.itemsize
        measured = watch.compare(*(f for f, _ in cases.values()))
        speeds = {
            name: arrays * size / report.add(f"{name}, {kind}", seconds, bytes=arrays * size)
            for (name, (_, arrays)), seconds in zip(cases.items(), measured, strict=True)
        }
        bandwidth = speeds.pop("copy")
        report.headline[f"copy, GB/s, {kind}"] = bandwidth / 1e9
        for name, speed in speeds.items():
            report.headline[f"{name}, share of the copy bandwidth, {kind}"] = speed / bandwidth
            shares.append(speed / bandwidth)
    report.headline["least share of the copy bandwidth"] = min(shares)


WAYS = ("ours", "eager", "compiled")


def training_and_langevin(report: Report, watch: Stopwatch, device: str) -> None:
    """The loss step and the Langevin step against score_sde_pytorch's formulas, eager and compiled. The network is
    left out: its output is given."""
    import torch
    from torch import Tensor

    from scoresde_ext import ops
    from scoresde_ext.ops import Draw

    from .baselines.formulas import VP, rows

    sde, shape = VP(), (4, 3, 8, 8) if report.rehearse else (512, 3, 64, 64)
    x0, out = (torch.randn(shape, device=device) for _ in range(2))
    out.requires_grad_()
    t = torch.rand(len(x0), device=device)

    def upstream(x0: Tensor, out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        z, m, std = torch.randn_like(x0), torch.exp(sde.log_mean(t)), sde.std(t)
        x = rows(m, x0) * x0 + rows(std, x0) * z
        losses = torch.square(-out / rows(std, x0) * rows(std, x0) + z).reshape(len(x0), -1).mean(1)
        return x, losses.mean()

    def ours() -> Tensor:
        draw = Draw(key=torch.randint(2**62, (2,), device=device))
        m, std = torch.exp(sde.log_mean(t)), sde.std(t)
        ops.perturb(x0, m, std, draw)
        loss = ops.score_loss(out, -1.0, 1.0, 1.0 / x0.numel(), draw).sum()
        return torch.autograd.grad(loss, out)[0]

    def gradient(f: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        return torch.autograd.grad(f(x0, out, t)[1], out)[0]

    compiled = torch.compile(upstream, backend="aot_eager" if report.rehearse else "inductor")
    found = watch.compare(ours, lambda: gradient(upstream), lambda: gradient(compiled))
    mine, eager, fused = (
        report.add(f"loss step, {n}", s) for n, s in zip(("ours", "eager", "compiled"), found, strict=True)
    )
    report.headline["loss step, times eager"] = eager / mine
    report.headline["loss step, times torch.compile"] = fused / mine

    x, score = x0, out.detach()

    def langevin_upstream(x: Tensor) -> Tensor:
        z = torch.randn_like(x)
        grad_norm = torch.norm(score.reshape(len(score), -1), dim=-1).mean()
        noise_norm = torch.norm(z.reshape(len(z), -1), dim=-1).mean()
        step = (0.16 * noise_norm / grad_norm) ** 2 * 2 * torch.ones_like(t)
        mean = x + rows(step, x) * score
        return mean + torch.sqrt(rows(step, x) * 2) * z

    def langevin_ours() -> Tensor:
        draw = Draw(key=torch.randint(2**62, (2,), device=device))
        score_norm = ops.score_loss(score, 1.0, None, 1.0).sqrt().mean()
        noise_norm = ops.score_loss(x, None, 1.0, 1.0, draw).sqrt().mean()
        step = 2.0 * (0.16 * noise_norm / score_norm) ** 2
        return ops.affine_noise(x, score, 1.0, step, torch.sqrt(2.0 * step), draw)[1]

    compiled_langevin = torch.compile(langevin_upstream, backend="aot_eager" if report.rehearse else "inductor")
    found = watch.compare(langevin_ours, lambda: langevin_upstream(x), lambda: compiled_langevin(x))
    mine, eager, fused = (
        report.add(f"Langevin, {n}", s) for n, s in zip(("ours", "eager", "compiled"), found, strict=True)
    )
    report.headline["Langevin step, times eager"] = eager / mine
    report.headline["Langevin step, times torch.compile"] = fused / mine


def small_solves(report: Report, watch: Stopwatch, device: str) -> None:
    """A whole adaptive solve where everything but the network costs: 64 samples of 2-D data, a tiny network."""
    import torch
    from torch import Tensor, nn

    from scoresde_ext import sampling, sde_lib

    from .baselines import scipy_rk45, torchode_dopri5
    from .baselines.formulas import VP, flow_drift

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return x + 0.1 * self.layers(torch.cat([x, labels[:, None] / 999], 1))

    torch.manual_seed(0)
    batch, tolerance, formulas = (4, 1e-2, VP()) if report.rehearse else (64, 1e-5, VP())
    net, z = Tiny().to(device).requires_grad_(False), torch.randn(batch, 2, device=device)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return flow_drift(formulas, formulas.score(net, x, t), x, t)

    def sampler(graph: str, **options: Any) -> Any:
        return sampling.get_ode_sampler(
            sde_lib.VPSDE(), (batch, 2), lambda x: x, rtol=tolerance, atol=tolerance, device=device, graph=graph,
            **options,
        )  # fmt: skip

    modes = ("auto", "off") if report.rehearse else ("while", "replay", "off")
    samplers = {mode: sampler(mode) for mode in modes} | {"per sample": sampler("auto", control="per_sample")}
    runs: dict[str, Callable[[], Any]] = {n: functools.partial(s.solve, net, z) for n, s in samplers.items()}
    others = {"scipy": scipy_rk45, "torchode": torchode_dopri5}
    if importlib.util.find_spec("torchode") is None:
        print("   torchode is not installed: not compared with")
        others.pop("torchode")
    for name, solver in others.items():
        runs[name] = functools.partial(solver, drift, (1.0, 1e-3), z, tolerance, tolerance)
    with torch.no_grad():
        found = watch.compare(*runs.values(), repeats=3 if report.rehearse else 10)
    seconds = {name: report.add(f"small solve, {name}", s) for name, s in zip(runs, found, strict=True)}
    for name in samplers:
        report.headline[f"small solve, {name}, times scipy"] = seconds["scipy"] / seconds[name]
    if "torchode" in seconds:
        report.headline["small solve, per sample, times torchode"] = seconds["torchode"] / seconds["per sample"]
    for name, s in samplers.items():
        print(f"   {name}: {s.solve(net, z).graph}")


def overhead(report: Report, watch: Stopwatch, device: str) -> None:
    """What the solver adds to the network's own time: 512 images of 32x32x3 and a U-Net."""
    import torch

    from scoresde_ext import sampling, sde_lib

    batch, width = (2, 8) if report.rehearse else (512, 128)
    torch.manual_seed(0)
    net = unet(width).to(device).requires_grad_(False).eval()
    z, labels = torch.randn(batch, 3, 32, 32, device=device), torch.full((batch,), 500.0, device=device)
    sampler = sampling.get_ode_sampler(
        sde_lib.VPSDE(), z.shape, lambda x: x, device=device, method="unipc", steps=3 if report.rehearse else 10,
        graph="auto",
    )  # fmt: skip
    adaptive = sampling.get_ode_sampler(sde_lib.VPSDE(), z.shape, lambda x: x, rtol=0.1, atol=0.1, device=device)
    with torch.no_grad():
        runs = [lambda: net(z, labels), lambda: sampler.solve(net, z), lambda: adaptive.solve(net, z)]
        one, fixed, rk45 = watch.compare(*runs, repeats=3)
        nfe = {"UniPC on a grid": sampler.solve(net, z).nfe, "RK45": adaptive.solve(net, z).nfe}
    network = report.add("U-Net, one evaluation", one)
    for (name, n), measured in zip(nfe.items(), (fixed, rk45), strict=True):
        whole = report.add(f"U-Net, {name}", measured, nfe=n)
        report.headline[f"U-Net, {name}, solver's share of the time"] = 1.0 - n * network / whole


def unet(width: int) -> Any:
    """Three resolutions, two residual blocks each, and the label in every block."""
    import torch
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.GroupNorm(4, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1))
            self.label = nn.Linear(1, n_out)
            self.second = nn.Sequential(nn.GroupNorm(4, n_out), nn.SiLU(), nn.Conv2d(n_out, n_out, 3, padding=1))
            self.skip = nn.Conv2d(n_in, n_out, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.skip(x) + self.second(self.first(x) + self.label(t)[:, :, None, None])

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (width, 2 * width, 2 * width)
            self.enter, self.leave = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
            self.down = nn.ModuleList(Block(a, b) for a, b in zip((width, *widths), widths, strict=False))
            self.up = nn.ModuleList(Block(2 * a, b) for a, b in zip(widths[::-1], (*widths[1::-1], width), strict=True))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            t, kept = labels[:, None] / 999, []
            h = self.enter(x)
            for block in self.down:
                kept.append(block(h, t))
                h = nn.functional.avg_pool2d(kept[-1], 2)
            for block in self.up:
                h = block(torch.cat([nn.functional.interpolate(h, scale_factor=2.0), kept.pop()], 1), t)
            return x + 0.1 * self.leave(h)

    return UNet()


# ---- all ----


def environment(device: str) -> dict[str, Any]:
    import torch

    from . import record

    found = record.environment()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    versions = found["versions"] | {"cuda": torch.version.cuda}
    if device == "cuda":
        from scoresde_ext import _C

        versions |= {"nvcc": (_C.build_info()["cuda"] or {}).get("nvcc"), "cudnn": torch.backends.cudnn.version()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else found["machine"]["processor"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "versions": versions,
    }


def table(report: Report) -> str:
    lines = [f"{name:<16} {outcome}" for name, outcome in report.parts.items()]
    width = max((len(name) for name in report.headline), default=0)
    lines += ["", *(f"{name:<{width}} {value:10.4g}" for name, value in report.headline.items())]
    return "\n".join(lines)


def write(report: Report, folder: Path, device: str) -> Path:
    where = environment(device)
    name = "".join(c if c.isalnum() else "-" for c in where["device"].lower()).strip("-")
    path = folder / f"{'rehearsal' if report.rehearse else 'gpu'}-{name[:40]}-{where['date'][:10]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "rehearsal": report.rehearse,
        "parts": report.parts,
        "headline": report.headline,
        "results": report.results,
    }
    path.write_text(json.dumps(where | found, indent=1) + "\n")
    return path


def check(rehearse: bool, folder: Path, without: Sequence[str]) -> int:
    """Runs all parts; the exit status."""
    report, device = Report(rehearse), "cpu" if rehearse else "cuda"
    watch = Stopwatch(rehearse)
    parts: dict[str, Callable[[], None]] = {
        "build": lambda: build(report),
        "tests": lambda: tests(report),
        "memcheck": lambda: sanitize(report, "memcheck"),
        "racecheck": lambda: sanitize(report, "racecheck"),
        "kernels": lambda: kernels(report, watch, device),
        "steps": lambda: training_and_langevin(report, watch, device),
        "small solves": lambda: small_solves(report, watch, device),
        "overhead": lambda: overhead(report, watch, device),
    }
    for name, run in parts.items():
        if name in without:
            report.parts[name] = "skipped: --without"
            continue
        report.part(name, run)
        if name == "build" and report.parts[name] != "passed":
            break
    else:
        print(f"\nWritten to {write(report, folder, device)}")
    print(f"\n{table(report)}")
    bad = [name for name, outcome in report.parts.items() if outcome.startswith("failed")]
    print(f"\n{'FAILED: ' + ', '.join(bad) if bad else 'all parts passed'} ({time.monotonic() - report.since:.0f} s)")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Build, test, sanitize and measure on a GPU."
    )
    parser.add_argument("--rehearse", action="store_true", help="what a CPU can run, on small sizes")
    parser.add_argument("--without", nargs="*", default=[], metavar="PART", help="parts to leave out")
    parser.add_argument("--out", type=Path, help="folder for the JSON file; default: benchmarks/results")
    parser.add_argument("--small-suite", choices=("cpu", "cuda"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.small_suite:
        small_suite(args.small_suite)
        return 0
    out = args.out or (ROOT / "out" if args.rehearse else ROOT / "benchmarks" / "results")
    return check(args.rehearse, out, args.without)


if __name__ == "__main__":
    sys.exit(main())
