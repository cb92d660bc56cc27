"""What a sampling job costs beside its sampling: python -m benchmarks.jobs

* throughput: a job against the bare loop of the same sampler, on the digits network, in turns;
* refill: evaluations of the network for samples that need unlike many, with refilled slots and without;
* manifest: a job of 10^6 shards, simulated: how large its logs are, how long they take to read;
* store: how many shards a second workers can claim.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scoresde_ext import noise, sampling
from scoresde_ext.flow import ProbabilityFlow
from scoresde_ext.integrate import solve, stream
from scoresde_ext.job import manifest, run, shards, workers
from scoresde_ext.job.manifest import Shard
from scoresde_ext.job.settings import Sample, completed
from scoresde_ext.models.utils import get_score_fn
from scoresde_ext.sde_lib import VPSDE

from . import record
from .problems import DIGITS, MIXTURES, digits_network

# ---- throughput ----


def digits_job(out: Path, samples: int, batch: int, nfe: int) -> Sample:
    return completed(
        Sample(
            network=f"{DIGITS / 'network.py'}:load",
            checkpoint=str(DIGITS / "digits-vp.safetensors"),
            samples=samples,
            batch=batch,
            shard_size=4 * batch,
            nfe=nfe,
            out=str(out),
        )
    )


class Timed(run.Sampling):
    """Adds up what the batches themselves take: wall clock, and processor time of the thread."""

    wall = cpu = 0.0

    def _batch(self, ids: range) -> Any:
        start, cpu = time.perf_counter(), time.thread_time()
        result = super()._batch(ids)
        self.wall += time.perf_counter() - start
        self.cpu += time.thread_time() - cpu
        return result


def run_job(settings: Sample) -> tuple[float, float, float, float]:
    """Seconds of wall clock and of processor time, from the first batch to the report; and of both, how much was not
    spent in the batches, as a share."""
    job = run.Job(settings, workers.Alone())
    job.sampling = timed = Timed(settings, job.sampling.network, job.sampling.device, print)
    plan = job.prepare()
    start, cpu = time.perf_counter(), time.process_time()
    assert job.work(plan) == 0
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    job.close()
    return wall, cpu, (wall - timed.wall) / wall, (cpu - timed.cpu) / cpu


def run_bare(settings: Sample, network: Any) -> tuple[float, float]:
    """The loop that anyone would write: draw a batch, make it 8-bit, draw the next."""
    start, cpu = time.perf_counter(), time.process_time()
    images = []
    for first in range(0, settings.samples, settings.batch):
        seeds = (settings.seed, range(first, first + settings.batch))
        shape = (settings.batch, 1, 8, 8)
        sampler = sampling.get_ode_sampler(
            VPSDE(), shape, lambda x: x, method="unipc", steps=settings.nfe, device="cpu", seeds=seeds
        )
        images.append(shards.to_uint8(sampler(network)[0], settings.data_range).numpy())
    return time.perf_counter() - start, time.process_time() - cpu


def throughput(samples: int, batch: int, nfe: int, repeats: int) -> dict[str, Any]:
    """Medians over ``repeats`` of both in turns. Where other work disturbs one more than the other, the shares of the
    job's own time that were not spent in batches say more (of processor time, with one thread)."""
    network = digits_network("vp")
    times: dict[str, list[tuple[float, ...]]] = {"job": [], "bare": []}
    for i in range(repeats):
        for what in ("job", "bare") if i % 2 else ("bare", "job"):
            with tempfile.TemporaryDirectory() as folder:
                settings = digits_job(Path(folder) / "out", samples, batch, nfe)
                times[what].append(run_job(settings) if what == "job" else run_bare(settings, network))
    wall, cpu = (
        statistics.median(j[k] / b[k] for j, b in zip(times["job"], times["bare"], strict=True)) for k in (0, 1)
    )
    return {
        "samples": samples,
        "batch": batch,
        "nfe": nfe,
        "samples_per_second": {what: samples / min(t[0] for t in found) for what, found in times.items()},
        "wall_ratio": wall,
        "processor_ratio": cpu,
        "wall_outside_batches": statistics.median(t[2] for t in times["job"]),
        "processor_outside_batches": statistics.median(t[3] for t in times["job"]),
        "seconds": times,
    }


# ---- refill ----


def refill(count: int, slots: int, tolerance: float) -> list[dict[str, Any]]:
    """The 64-D mixture and the digits: rows that the network is given, by refilled slots and by batches that wait for
    their slowest sample. ``predicted``: the mean of the evaluations over the mean of the batches' largest."""
    mixture = MIXTURES["mixture 64-D"]
    cases: list[tuple[str, Any, tuple[int, ...], torch.dtype, int]] = [
        ("mixture 64-D", mixture.network("vp"), (64,), torch.float64, count),
        ("digits", digits_network("vp"), (1, 8, 8), torch.float32, count // 4),
    ]
    found = []
    for name, network, shape, dtype, n in cases:
        for method in ("unipc", "RK45"):
            found.append(
                {"problem": name, "method": method, **compare(network, shape, dtype, n, slots, method, tolerance)}
            )
    return found


def compare(
    network: Any, shape: tuple[int, ...], dtype: torch.dtype, count: int, slots: int, method: str, tolerance: float
) -> dict[str, Any]:
    sde = VPSDE()
    flow = ProbabilityFlow(sde, get_score_fn(sde, network, continuous=True))
    with noise.seeds(0, range(count)):
        z = noise.prior(sde, (count, *shape), "cpu").to(dtype)
    options: dict[str, Any] = {"method": method, "rtol": tolerance, "atol": tolerance}

    def source(first: int, stop: int) -> Tensor:
        return z[first:stop]

    refilled = stream(flow, (1.0, 1e-3), source, count, slots, **options)
    evaluations = torch.cat([group.evaluations for group in refilled]).double()
    waiting = [solve(flow, (1.0, 1e-3), part, control="per_sample", **options) for part in z.split(slots)]
    largest = torch.stack([solution.evaluations.max() for solution in waiting]).double()
    return {
        "samples": count,
        "slots": slots,
        "evaluations": {"mean": float(evaluations.mean()), "largest": float(evaluations.max())},
        "occupancy": refilled.needed / refilled.computed,
        "ratio": refilled.computed / sum(s.nfe * len(s.status) for s in waiting),
        "predicted": float(evaluations.mean() / largest.mean()),
    }


# ---- manifest ----


def simulated(i: int, size: int, spread: bool) -> Shard:
    """A shard as a real one looks in the manifest: of fixed steps, or of adaptive ones."""
    evaluations = dict.fromkeys(range(20, 50), size // 30) if spread else {30: size}
    return Shard(
        file=f"samples-{i * size:012d}.npz",
        first=i * size,
        stop=(i + 1) * size,
        bytes=12_616_214,
        sha256=f"{i:064x}",
        evaluations=evaluations,
        batch=512,
        slot_evaluations=30 * size,
        seconds=12.345,
        written=1.7e9 + i * 0.123,
        worker=i % 64,
    )


def manifest_of(count: int, spread: bool) -> dict[str, Any]:
    """Logs of 64 workers with ``count`` shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = [manifest.Log(folder, worker) for worker in range(64)]
        start = time.perf_counter()
        for i in range(200):
            logs[0].append(simulated(i, 4096, spread))
        append = (time.perf_counter() - start) / 200
        logs[0].path.unlink()
        for log in logs:  # without a sync a line
            with open(log.path, "w") as file:
                for i in range(int(log.path.stem.rpartition("-")[2]), count, 64):
                    line = json.dumps(asdict(simulated(i, 4096, spread)), separators=(",", ":"))
                    file.write(f"\n{line}\n")
        size = sum(log.path.stat().st_size for log in logs)
        start = time.perf_counter()
        there = manifest.read(folder)
        read = time.perf_counter() - start
        start = time.perf_counter()
        plan = manifest.cut(manifest.missing(there.values(), (count + 10) * 4096), 4096)
        planned = time.perf_counter() - start
    assert len(there) == count and len(plan) == 10
    return {
        "shards": count,
        "adaptive": spread,
        "bytes": size,
        "bytes_per_shard": size / count,
        "read_seconds": read,
        "plan_seconds": planned,
        "append_seconds": append,
    }


# ---- store ----


def store(claims: int) -> dict[str, Any]:
    """Claims through a store over TCP, by one worker: a claim and its end are two keys set and one counter."""
    host = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined]
    team = workers.Team(dist.PrefixStore("job", host), 0, 1)  # type: ignore[attr-defined]
    team.begin([(i, i + 1) for i in range(claims)], set)
    start = time.perf_counter()
    for _ in range(claims):
        index = team.claim(lambda: None)
        assert index is not None
        team.tick(1, 30)
        team.written(index)
    seconds = time.perf_counter() - start
    team.leave()
    return {"claims": claims, "claims_per_second": claims / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples, shards and claims")
    parser.add_argument("--only", choices=("throughput", "refill", "manifest", "store"), help="one part alone")
    parser.add_argument("--out", type=Path, help="folder for jobs.json; else the results are printed alone")
    args = parser.parse_args()
    quick = args.quick
    parts: dict[str, Callable[[], Any]] = {
        "throughput": lambda: throughput(512 if quick else 4096, 128, 10, 3 if quick else 7),
        "refill": lambda: refill(512 if quick else 4096, 32 if quick else 256, 1e-3),
        "manifest": lambda: [manifest_of(20_000 if quick else 1_000_000, spread) for spread in (False, True)],
        "store": lambda: store(1000 if quick else 20_000),
    }
    found = {name: part() for name, part in parts.items() if args.only in (None, name)}
    print(json.dumps(found, indent=1))
    if args.out:
        record.write_json(args.out / "jobs.json", {"benchmark": "jobs", **found})


if __name__ == "__main__":
    main()
