"""Kills jobs, lets the same command continue, and compares with a job that was left alone.

A program of its own: it imports everything once and forks a child for each job, so that a kill costs milliseconds. It
prints one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported once, for all children:
import jinja2  # noqa: F401
import torch
import torch.distributed.rendezvous
import yaml  # noqa: F401

from scoresde_ext.__main__ import main
from scoresde_ext.job import audit, report, run, samplers, workers  # noqa: F401

HERE = Path(__file__).parent
NOT_COMPARED = {"job.yaml", "report.html", "lock"}  # they hold times, or the folder's name
FAULT = 77

JOBS = {
    "npz": ["--sampler", "unipc", "--nfe", "8"],
    "pt": ["--sampler", "RK23", "--rtol", "1e-1", "--atol", "1e-1", "--format", "pt"],
    "png-folder": ["--sampler", "unipc_sde", "--nfe", "8", "--format", "png-folder"],
    "png": ["--sampler", "unipc", "--rtol", "1e-1", "--atol", "1e-1", "--format", "png"],
}


def command(job: str, out: Path, more: list[str]) -> list[str]:
    network = f"{HERE / 'job_networks.py'}:tiny"
    cut = ["--samples", "44", "--batch", "4", "--shard-size", "8"]
    return ["sample", "--network", network, "--device", "cpu", "--out", str(out), *cut, *JOBS[job], *more]


def fork(arguments: list[str], before: Callable[[], Any] = lambda: None) -> int:
    """The child's id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            if "KILLS_LOUD" not in os.environ:
                os.dup2(quiet, 2)
            before()
            code = main(arguments)
        finally:
            os._exit(code)
    return pid


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder: Path) -> dict[str, str]:
    """Every file that a job leaves, by its bytes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in NOT_COMPARED]
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.parent.name != "manifest"
    }


def check(folder: Path, expected: dict[str, str], what: str) -> None:
    """The job's set is that of the undisturbed one, and `verify` says so."""
    found = content(folder)
    if found != expected:
        changed = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise SystemExit(f"{what}: {changed} differ from the undisturbed job's")
    if (code := end_of(fork(["verify", str(folder)]))) != 0:
        raise SystemExit(f"{what}: verify ended with {code}")


class Undisturbed:
    """Reference folders, one a kind of job, and how long they took."""

    def __init__(self, base: Path) -> None:
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        for job in JOBS:
            folder, start = base / f"whole-{job}", time.monotonic()
            code = end_of(fork(command(job, folder, [])))
            assert code == 0, f"the undisturbed {job} job ended with {code}"
            self.seconds[job] = time.monotonic() - start
            self.expected[job] = content(folder)
            shards = [digest for name, digest in self.expected[job].items() if name.startswith("samples")]
            assert len(shards) >= 6 and len(set(shards)) == len(shards)  # there is something to compare
            check(folder, self.expected[job], job)


def random_kills(base: Path, whole: Undisturbed, kills: int, seed: int) -> dict[str, int]:
    """SIGKILL at moments spread evenly over a job's length; the same command again, until it gets through. The length
    is learned: a machine that does other work too is now fast, now slow."""
    chance, done, jobs, lengths = random.Random(seed), 0, 0, dict(whole.seconds)
    while done < kills:
        job = list(JOBS)[jobs % len(JOBS)]
        folder = base / "killed"
        while True:
            pid = fork(command(job, folder, []))
            time.sleep(chance.uniform(0, lengths[job]))
            os.kill(pid, signal.SIGKILL)
            code = end_of(pid)
            if code == 0:
                lengths[job] *= 0.7
                break
            assert code == -signal.SIGKILL, f"a job went wrong by itself, with {code}"
            lengths[job] *= 1.1
            done += 1
        check(folder, whole.expected[job], f"{job}, killed {done} times")
        shutil.rmtree(folder)
        jobs += 1
    return {"random_kills": done, "jobs": jobs}


def at_event(n: int) -> Callable[[], None]:
    """Ends the process at its n-th event: before a sync, with the last bytes torn off; after it; before a rename; after
    it."""

    def patch() -> None:
        count, sync, rename = [0], os.fsync, os.replace

        def event(tear: Callable[[], None] = lambda: None) -> None:
            count[0] += 1
            if count[0] == n:
                tear()
                os._exit(FAULT)

        def fsync(fd: int) -> None:
            def tear() -> None:
                status = os.fstat(fd)
                if os.path.isfile(f"/proc/self/fd/{fd}") and status.st_size > 7:
                    path = os.readlink(f"/proc/self/fd/{fd}")
                    os.truncate(path, status.st_size - random.Random(n).randint(1, 7))

            event(tear)
            sync(fd)
            event()

        def replace(a: Any, b: Any) -> None:
            event()
            rename(a, b)
            event()

        os.fsync, os.replace = fsync, replace

    return patch


def faults(base: Path, whole: Undisturbed, job: str, every: int) -> dict[str, int]:
    """The process ends at each of its syncs and renames in turn (or at every n-th)."""
    n, done = 1, 0
    while True:
        folder = base / f"fault-{n}"
        code = end_of(fork(command(job, folder, []), at_event(n)))
        if code == 0:
            shutil.rmtree(folder)
            return {f"faults_{job}": done, f"events_{job}": n - 1}
        assert code == FAULT, f"a job went wrong by itself, with {code}"
        done += 1
        code = end_of(fork(command(job, folder, [])))
        assert code == 0, f"{job}: could not continue after event {n}: {code}"
        check(folder, whole.expected[job], f"{job}, ended at event {n}")
        shutil.rmtree(folder)
        n += every


def workers_killed(base: Path, whole: Undisturbed, rounds: int, size: int, seed: int) -> dict[str, int]:
    """Several workers that share a store; one is killed on the way, and its shards are made by the others. Where it is
    the first, which has the store, the others end, and the same command continues."""
    chance, taken_over, continued = random.Random(seed), 0, 0
    for i in range(rounds):
        job, folder = list(JOBS)[i % len(JOBS)], base / "team"
        victim = chance.randrange(size) if i % 2 else chance.randrange(1, size)
        codes = run_team(job, folder, size, victim, chance.uniform(0.2, 1.0) * whole.seconds[job])
        rest = [code for rank, code in enumerate(codes) if rank != victim]
        assert codes[victim] in (0, -signal.SIGKILL) and set(rest) <= {0, 1, 2}, codes
        if any(rest):
            assert victim == 0, f"worker {victim} was killed and others ended with {codes}"
            assert end_of(fork(command(job, folder, []))) == 0
            continued += 1
        elif codes[victim] != 0:
            taken_over += 1
        check(folder, whole.expected[job], f"{job} by {size} workers, worker {victim} killed")
        shutil.rmtree(folder)
    return {f"teams_of_{size}": rounds, f"taken_over_{size}": taken_over, f"continued_{size}": continued}


def run_team(job: str, folder: Path, size: int, victim: int, after: float) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join(rank: int) -> Callable[[], None]:
        def patch() -> None:
            workers.LEASE = 0.6
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(port)

        return patch

    pids = [fork(command(job, folder, []), join(rank)) for rank in range(size)]
    until = time.monotonic() + 5
    while not (folder / "manifest").exists() and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(after / size)
    os.kill(pids[victim], signal.SIGKILL)
    return [end_of(pid) for pid in pids]


def program() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--every", type=int, default=0, help="a fault at every n-th event; 0: none")
    parser.add_argument("--teams", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole = Undisturbed(args.folder)
    found: dict[str, Any] = {"seconds": {job: round(s, 3) for job, s in whole.seconds.items()}}
    if args.kills:
        found |= random_kills(args.folder, whole, args.kills, args.seed)
    for job in JOBS if args.every else ():
        found |= faults(args.folder, whole, job, args.every)
    for size in (2, 4) if args.teams else ():
        found |= workers_killed(args.folder, whole, args.teams, size, args.seed + size)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(program())
