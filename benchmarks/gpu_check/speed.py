"""What takes how long: kernels, steps, whole solves, and what a solver adds to its network."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scoresde_ext import losses, ops, predictors, sampling, sde_lib
from scoresde_ext.models import utils as mutils

from .. import baselines
from .facts import state_of_gpu
from .reporting import Measured, Report, Skipped
from .smoke import graph_backend, no_loops
from .suite import DTYPES, OPS, Arguments, Op, arguments, moved, require_cuda

Call = Callable[[], Any]


class Stopwatch:
    """Seconds of a call: on a GPU between events, over as many calls as take a few milliseconds."""

    def __init__(self, rehearse: bool) -> None:
        self.on_gpu, self.repeats, self.least = not rehearse, 5 if rehearse else 25, 0.0 if rehearse else 3e-3

    def once(self, f: Call, calls: int) -> float:
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

    def compare(self, *functions: Call, repeats: int | None = None) -> list[Measured]:
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


def started(report: Report) -> Stopwatch:
    """A stopwatch, on a device whose clocks have come up."""
    torch.manual_seed(0)
    if not report.rehearse:
        require_cuda()
        x = torch.randn(2**12, 2**12, device="cuda")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            x @ x
            torch.cuda.synchronize()
    return Stopwatch(report.rehearse)


# ---- kernels ----

# Those of op_table that samplers and losses consist of.
KERNELS = {
    "perturbation": "perturb",
    "loss with gradient": "score_loss and gradient",
    "predictor update": "affine_next",
    "Runge-Kutta stage": "rk_drift_stage at a computed point",
    "Runge-Kutta, last stage": "rk_last_stage",
    "Runge-Kutta, error norm": "rk_drift_error",
    "multistep update": "combine",
}
WEIGHTS = (0.3, 0.1, -0.4, 0.2)  # op_table's have a zero


def kernels(report: Report) -> None:
    """Every kernel against a copy of an array of the same size: bytes a second over bytes a second. Calls on small
    arrays take less time than Python needs for them: they are measured in a CUDA graph of several."""
    watch = started(report)
    large = (8, 3, 16, 16) if report.rehearse else large_shape()
    small = 2 if report.rehearse else 64
    layouts = {
        "large": (large, False),
        "large, channels_last": (large, True),
        "CIFAR": ((small, 3, 32, 32), False),
        "odd rows": ((small, 3, 31, 31), False),
    }
    for layout, (shape, last) in layouts.items():
        for dtype in DTYPES:
            kind = f"{layout}, {str(dtype).removeprefix('torch.')}"
            with report.case(f"kernels, {kind}"):
                one_size(report, watch, kind, shape, dtype, last, in_graph=not report.rehearse and shape != large)
    state_of_gpu(report)


def large_shape() -> tuple[int, ...]:
    """Far beyond any cache, with room for sixteen arrays in float64."""
    free, rows = torch.cuda.mem_get_info()[0], 256
    while rows > 8 and 16 * 8 * rows * 3 * 256 * 256 > free:
        rows //= 2
    return rows, 3, 256, 256


def one_size(
    report: Report, watch: Stopwatch, kind: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool, in_graph: bool
) -> None:
    arrays = large_arrays(shape, dtype, report.device, last)
    target, size = torch.empty_like(arrays[0]), arrays[0].numel() * dtype.itemsize
    calls: dict[str, Call] = {"copy": lambda: target.copy_(arrays[0])}
    passes = {"copy": 2}
    for name, op in ((name, OPS[in_table]) for name, in_table in KERNELS.items()):
        calls[name] = functools.partial(op.call, ops, large_arguments(op, arrays))
        passes[name] = len(op.arrays) + op.sums.count(False)
    # The table puts the coefficients together in each call.
    lines = torch.rand(2, 3, device=report.device)
    calls["multistep update"] = lambda: ops.combine(arrays[:3], lines)
    per_replay = 20 if in_graph else 1
    functions = [graph_of(f, per_replay) for f in calls.values()] if in_graph else list(calls.values())
    speeds: dict[str, float] = {}  # bytes a second; the copy comes first
    for name, seconds in zip(calls, watch.compare(*functions), strict=True):
        one = Measured(*(s / per_replay for s in seconds))
        moved_bytes = passes[name] * size
        speeds[name] = moved_bytes / one.p50
        share = speeds[name] / speeds["copy"]
        report.measured(f"{name}, {kind}", one, shape=shape, bytes=moved_bytes, share_of_copy=share, in_graph=in_graph)
    if not in_graph:
        report.headline(f"copy, GB/s, {kind}", speeds["copy"] / 1e9)
    slowest = min(speeds, key=lambda name: speeds[name])
    report.headline(f"least share of the copy bandwidth, {kind}: {slowest}", speeds[slowest] / speeds["copy"])


def large_arrays(shape: tuple[int, ...], dtype: torch.dtype, device: str, last: bool) -> list[Tensor]:
    """As many as the op with the most takes, channels_last or contiguous."""
    layout = torch.channels_last if last else torch.contiguous_format
    most = max(len(OPS[name].arrays) for name in KERNELS.values())
    return [torch.randn(shape, device=device).to(dtype).to(memory_format=layout) for _ in range(most)]


def large_arguments(op: Op, arrays: list[Tensor]) -> Arguments:
    """An op's arguments with these arrays, its noise generated."""
    first = arrays[0]
    v = moved(arguments(op, (len(first), 1), first.dtype, "per sample", "key"), first.device.type)
    v |= zip(op.arrays, arrays, strict=False)
    if op.weights:
        v["weights"] = WEIGHTS
    return v


def graph_of(f: Call, calls: int) -> Call:
    """A function that replays a graph of some calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            f()
    return graph.replay


# ---- whole solves ----


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return x + 0.1 * self.layers(torch.cat([x, labels[:, None] / 999], 1))


def small_solves(report: Report) -> None:
    """A whole adaptive solve where everything but the network costs: 64 samples of 2-D data, a tiny network."""
    watch = started(report)
    batch, tolerance, vp = (4, 1e-2, baselines.VP()) if report.rehearse else (64, 1e-5, baselines.VP())
    net, z = Tiny().to(report.device).requires_grad_(False), torch.randn(batch, 2, device=report.device)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return baselines.flow_drift(vp, vp.score(net, x, t), x, t)

    def ours(graph: str, **options: Any) -> Call:
        sampler = sampling.get_ode_sampler(
            sde_lib.VPSDE(), (batch, 2), lambda x: x, rtol=tolerance, atol=tolerance, device=report.device,
            graph=graph, **options,
        )  # fmt: skip
        return lambda: sampler.solve(net, z).y

    def theirs(package: str, solver: Callable[..., Tensor]) -> Call:
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
        return lambda: solver(drift, (1.0, 1e-3), z, tolerance, tolerance)

    def looping(mode: str, **options: Any) -> Call:
        if missing := no_loops(report):
            raise Skipped(missing)
        return ours(mode, **options)

    with graph_backend(report), torch.no_grad():
        competitors: dict[str, Callable[[], Call]] = {
            "off": lambda: ours("off"),
            "replay": lambda: ours("replay"),
            "while": lambda: looping("while"),
            "per sample": lambda: ours("auto", control="per_sample"),
            "scipy": lambda: theirs("scipy", baselines.scipy_rk45),
            "torchdiffeq": lambda: theirs("torchdiffeq", baselines.torchdiffeq_dopri5),
            "torchode": lambda: theirs("torchode", baselines.torchode_dopri5),
        }
        runs: dict[str, Call] = {}
        right: Tensor | None = None
        for name, make in competitors.items():
            with report.case(f"solve, {name}"):
                run = make()
                y = run()
                right = y if right is None else right
                difference = float((y - right).abs().max())
                report.result(f"solve, {name}", apart_from_off=difference)
                runs[name] = run
        found = watch.compare(*runs.values(), repeats=3 if report.rehearse else 10)
    seconds = {name: report.measured(f"solve, {name}", measured) for name, measured in zip(runs, found, strict=True)}
    for other in ("scipy", "torchdiffeq", "torchode"):
        for mode in ("off", "replay", "while", "per sample"):
            if other in seconds and mode in seconds:
                report.headline(f"solve, {mode}, times {other}", seconds[other] / seconds[mode])
    state_of_gpu(report)


# ---- steps ----


class Given(nn.Module):
    """A network whose output is given: what takes time is the step itself."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.out


class Step(NamedTuple):
    """A step of ours, and score_sde_pytorch's ``formulas`` for it: a function of ``tensors`` alone, which
    ``torch.compile`` can take. ``leaf``: what a loss is differentiated by, None for other steps."""

    ours: Call
    formulas: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    leaf: Tensor | None = None

    def theirs(self, formulas: Callable[..., Any]) -> Call:
        """The same by these formulas, compiled or not."""
        if self.leaf is None:
            return lambda: formulas(*self.tensors)
        return lambda: torch.autograd.grad(formulas(*self.tensors), self.leaf)


def steps_of(shape: tuple[int, ...], device: str) -> dict[str, Step]:
    """Training and sampling steps on arrays of this shape, their random numbers drawn as they go."""
    x, out = (torch.randn(shape, device=device) for _ in range(2))
    t = torch.full((len(x),), 0.5, device=device)
    net = Given(out)
    vp, ve, vp_formulas, ve_formulas = sde_lib.VPSDE(), sde_lib.VESDE(), baselines.VP(), baselines.VE()
    loss_fn = losses.get_sde_loss_fn(vp, train=True, likelihood_weighting=False)
    predictor = predictors.EulerMaruyamaPredictor(vp, mutils.get_score_fn(vp, net, continuous=True))
    corrector = predictors.LangevinCorrector(ve, mutils.get_score_fn(ve, net, continuous=True), 0.16, 1)

    def loss(x: Tensor, out: Tensor) -> Tensor:
        u = torch.rand(len(x), device=x.device)
        return baselines.score_matching_loss(vp_formulas, lambda *_: out, x, u, torch.randn_like(x))

    def euler_maruyama(x: Tensor, out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return baselines.euler_maruyama(vp_formulas, lambda *_: out, x, t, torch.randn_like(x))

    def langevin(x: Tensor, out: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return baselines.langevin(ve_formulas, lambda *_: out, x, t, torch.randn_like(x))

    return {
        "loss": Step(lambda: torch.autograd.grad(loss_fn(net, x), net.out), loss, (x, net.out), net.out),
        "predictor": Step(no_grad(predictor.update_fn, x, t), euler_maruyama, (x, out, t)),
        "Langevin": Step(no_grad(corrector.update_fn, x, t), langevin, (x, out, t)),
    }


def no_grad(f: Callable[..., Any], *tensors: Tensor) -> Call:
    return lambda: torch.no_grad()(f)(*tensors)


def compare_steps(report: Report, competitor: str, prepare: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Ours against upstream's formulas as ``prepare`` makes them."""
    watch = started(report)
    for shape in ((4, 3, 8, 8),) if report.rehearse else ((128, 3, 32, 32), (512, 3, 64, 64)):
        for name, step in steps_of(shape, report.device).items():
            with report.case(f"{name} {shape}, {competitor}"):
                mine, theirs = watch.compare(step.ours, step.theirs(prepare(step.formulas)))
                seconds = report.measured(f"{name} {shape}, ours", mine)
                other = report.measured(f"{name} {shape}, {competitor}", theirs)
                report.headline(f"{name} {shape}, times {competitor}", other / seconds)
    state_of_gpu(report)


def steps(report: Report) -> None:
    compare_steps(report, "eager", lambda formulas: formulas)


def compiled_steps(report: Report) -> None:
    backend = "aot_eager" if report.rehearse else "inductor"
    compare_steps(report, "torch.compile", lambda formulas: torch.compile(formulas, backend=backend))


# ---- a network ----


def network_overhead(report: Report) -> None:
    """What a solver adds to the network's own time: images of 32x32x3 and a U-Net."""
    watch = started(report)
    batch, width, steps = (2, 8, 3) if report.rehearse else (512, 128, 10)
    net = UNet(width).to(report.device).requires_grad_(False).eval()

    def evaluation(batch: int) -> Call:
        x, labels = (
            torch.randn(batch, 3, 32, 32, device=report.device),
            torch.full((batch,), 500.0, device=report.device),
        )
        return lambda: net(x, labels)

    with torch.no_grad():
        evaluation(batch)()
        while batch > 32 and watch.once(evaluation(batch), 1) > 0.06:  # a smaller GPU: keep within the budget
            batch //= 4
        z = torch.randn(batch, 3, 32, 32, device=report.device)
        (one,) = watch.compare(evaluation(batch), repeats=5)
        network = report.measured("U-Net, one evaluation", one, batch=batch)
        solvers: dict[str, dict[str, Any]] = {
            "UniPC on a grid": {"method": "unipc", "steps": steps},
            "RK45": {"rtol": 0.1, "atol": 0.1},
        }
        for name, options in solvers.items():
            with report.case(f"U-Net, {name}"):
                sampler = sampling.get_ode_sampler(
                    sde_lib.VPSDE(), z.shape, lambda x: x, device=report.device, **options
                )
                found = sampler.solve(net, z)
                (whole,) = watch.compare(lambda sampler=sampler: sampler.solve(net, z), repeats=3)
                seconds = report.measured(f"U-Net, {name}", whole, nfe=found.nfe, graph=found.graph.mode)
                report.headline(f"U-Net, {name}, solver's share of the time", 1.0 - found.nfe * network / seconds)
    state_of_gpu(report)


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
    """Three resolutions, a residual block down and one up at each, and the label in every block."""

    def __init__(self, width: int) -> None:
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
