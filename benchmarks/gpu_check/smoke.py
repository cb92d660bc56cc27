"""Whether a GPU gives the right numbers at all: every op, every graph mode, graphs that outlive others."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from scoresde_ext import _C, graphs, ops, sampling, sde_lib

from . import suite
from .reporting import Failed, Report, Skipped

SOLVERS: dict[str, dict[str, Any]] = {
    "RK45": {},
    "RK45, per sample": {"control": "per_sample"},
    "UniPC": {"method": "unipc"},
    "UniPC on a grid": {"method": "unipc", "steps": 8},
}


def smoke(report: Report) -> None:
    """A build without CUDA is compared with the reference on the CPU, which is still worth knowing."""
    without = "" if report.rehearse else why_not()
    device = "cpu" if without else report.device
    ops_against_the_cpu(report, device)
    if without:
        report.conclude()
        raise Skipped(f"{without}; the CPU's ops are right")
    with graph_backend(report):
        solves_in_every_mode(report)
        graphs_that_outlive_others(report)


def why_not() -> str:
    try:
        suite.require_cuda()
    except Failed as failed:
        return str(failed)
    return ""


@contextmanager
def graph_backend(report: Report) -> Iterator[None]:
    """In a rehearsal, loops run on the recording device of the tests."""
    if not report.rehearse:
        yield
        return
    from fake_device import FakeDevice

    fake = FakeDevice()
    with mock.patch.object(graphs, "backend_of", lambda _: fake):
        yield


# ---- ops ----


def ops_against_the_cpu(report: Report, device: str) -> None:
    """Arrays have the CPU's bits. Sums over a sample are added in another order: they are as close to float64 as
    ``op_table.tolerances`` derives from the roundings, as every result is."""
    torch.manual_seed(0)
    same_bits = _C.build_info()["cpu_capability"] != "generic"
    if not same_bits:
        print("   this CPU has no fused multiply-add: results are compared with float64, and not with its bits")
    found: dict[str, list[int]] = {}  # calls, and how many gave other bits
    for name, op, v in suite.calls(every=not report.rehearse):
        with report.case(f"op {name}, {description(op, v)}"):
            results = on_cpu(op.call(ops, suite.moved(v, device)), device)
            suite.check(op, v, results, noise_ulp=4)
            right = op.call(ops, v)
            equal = all(s or torch.equal(a, b) for a, b, s in zip(results, right, op.sums, strict=True))
            counts = found.setdefault(name, [0, 0])
            counts[0] += 1
            counts[1] += not equal
            if same_bits and not equal:
                raise Failed(f"other bits than the CPU's, {largest_difference(results, right):.3g} apart at most")
    for name, (calls, different) in found.items():
        report.result(f"op {name}", calls=calls, other_bits=different)
    for name, other in suite.others().items():
        with report.case(f"op {name}"):
            here, there = (on_cpu(other.call(*suite.moved(other.arguments, d)), d) for d in ("cpu", device))
            for a, b in zip(there, here, strict=True):
                eps = torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
                torch.testing.assert_close(a, b, rtol=other.ulps * eps, atol=0)
            report.result(f"op {name}", calls=1, ulps=other.ulps)
    report.headline("ops called", sum(calls for calls, _ in found.values()))


def description(op: suite.Op, v: suite.Arguments) -> str:
    first = v[op.arrays[0]]
    layout = "" if first.is_contiguous() else ", channels_last"
    noise = ", noise as an array" if op.noise and v["draw"].key is None else ", generated noise" if op.noise else ""
    return f"{tuple(first.shape)}, {first.dtype}{layout}{noise}"


def largest_difference(results: Any, right: Any) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(results, right, strict=True))


def on_cpu(found: Any, device: str) -> tuple[Tensor, ...]:
    """What an op returned, which must be on this device, on the CPU."""
    results = (found,) if isinstance(found, Tensor) else tuple(found)
    if any(result.device.type != device for result in results):
        raise Failed(f"a result is not on {device}")
    return tuple(result.cpu() for result in results)


# ---- loops ----


class Net(nn.Module):
    """A matrix product makes cuBLAS take its workspace, which graphs may share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 6))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * x + self.layers(x) + 1e-3 * labels[:, None]


def network(report: Report) -> Net:
    torch.manual_seed(1)
    return Net().to(report.device).requires_grad_(False)


def sampler(report: Report, graph: str, batch: int = 33, **options: Any) -> Any:
    return sampling.get_ode_sampler(
        sde_lib.VPSDE(0.1, 5.0), (batch, 6), lambda x: x, rtol=1e-2, atol=1e-2, device=report.device, graph=graph,
        **options,
    )  # fmt: skip


def start(report: Report, batch: int = 33) -> Tensor:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(2)).to(report.device)


def no_loops(report: Report) -> str:
    """Why this device has no WHILE node; empty where it has."""
    backend = graphs.backend_of(torch.device(report.device))
    assert backend is not None
    return backend.loops_missing()


def solves_in_every_mode(report: Report) -> None:
    net, z, missing = network(report), start(report), no_loops(report)
    for solver, options in SOLVERS.items():
        right = sampler(report, "off", **options).solve(net, z)
        for mode in ("replay", "while", "auto"):
            with report.case(f"solve {solver}, {mode}"):
                if mode == "while" and missing:
                    raise Skipped(missing)
                one = sampler(report, mode, **options)
                for _ in range(2):  # the second finds the loop captured
                    found = one.solve(net, z)
                    if not torch.equal(found.y, right.y) or found.nfe != right.nfe:
                        raise Failed(f"other bits than step by step: {found.graph.mode}, {found.graph.why}")
                wanted = "replay" if mode == "replay" or missing or "steps" in options else "while"
                if found.graph.mode != wanted:
                    raise Failed(f"ran as {found.graph.mode!r} instead of {wanted!r}: {found.graph.why}")
                report.result(f"solve {solver}, {mode}", nfe=found.nfe, ran_as=found.graph.mode, why=found.graph.why)


def graphs_that_outlive_others(report: Report) -> None:
    """Of loops captured one after the other, one is destroyed, its memory written over, and the others run again: what
    they share with it, as cuBLAS's workspaces (pytorch issue 193402), must still be theirs."""
    net = network(report)
    for mode in ("replay", "while"):
        with report.case(f"a loop runs after another was destroyed, {mode}"):
            if mode == "while" and (missing := no_loops(report)):
                raise Skipped(missing)
            for destroyed in (0, 1):
                states = [start(report, batch) for batch in (33, 65)]
                loops = [sampler(report, mode, len(z)) for z in states]
                right = [loop.solve(net, z).y for loop, z in zip(loops, states, strict=True)]
                del loops[destroyed]
                gc.collect()
                write_over_free_memory(report)
                found = loops[0].solve(net, states[1 - destroyed])
                if found.graph.mode != mode:
                    raise Failed(f"the loop ran as {found.graph.mode!r}: {found.graph.why}")
                if not torch.equal(found.y, right[1 - destroyed]):
                    raise Failed(f"{'the second' if destroyed == 0 else 'the first'} of two loops gave other bits")
            report.result(f"a loop runs after another was destroyed, {mode}", same_bits=True)


def write_over_free_memory(report: Report) -> None:
    if report.rehearse:
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    full = [torch.full((2**20 * 2**k,), torch.nan, device=report.device) for k in range(7)]
    torch.cuda.synchronize()
    del full
