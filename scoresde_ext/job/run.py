"""A sampling job from its settings to its report."""

from __future__ import annotations

import hashlib
import os
import platform
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import files, manifest, networks, shards, workers
from .manifest import Shard
from .progress import Progress
from .samplers import Computed, Sampling
from .settings import RECORD, Refused, Sample, as_dict, completed, differences, reason

CONFIG = "job.yaml"
Plan = list[tuple[int, int]]


def sample(settings: Sample) -> int:
    """Runs the job. Returns 0, or 1 where samples failed.

    Raises:
        Refused: a wrong input; before any work.
    """
    settings = completed(settings)
    worker = workers.join()
    job = Job(settings, worker)
    if settings.dry_run:
        if worker.rank == 0:
            job.describe()
        return 0
    plan = worker.agree(job.prepare)
    if plan is None:  # the first worker refused, and says why
        return 2
    try:
        return job.work([(first, stop) for first, stop in plan])
    finally:
        job.close()


class Job:
    """One worker's part of a job."""

    def __init__(self, settings: Sample, worker: workers.Alone) -> None:
        self.settings, self.worker = settings, worker
        self.folder = Path(settings.out)
        self.lock: files.FolderLock | None = None
        self.progress = Progress(settings.samples, 0, False)
        self.config: dict[str, Any] = {RECORD: fingerprint(settings)}
        self.compare()
        device = networks.choose_device(settings.device, int(os.environ.get("LOCAL_RANK", "0")))
        network = networks.load_network(settings, device)
        self.sampling = Sampling(settings, network, device, lambda text: self.progress.say(text))
        self.config = {**as_dict(settings), "out": str(self.folder.resolve()), **self.config}
        self.config["shape"] = list(self.sampling.shape)
        for name in ("network", "checkpoint", "grid"):
            if name in self.config:
                self.config[name] = absolute(self.config[name])
        for name in ("dry_run", "remake"):  # of this run alone
            del self.config[name]
        self.compare()

    # -- before the work

    def compare(self) -> None:
        """Refused where the folder was made with other settings. What it has already stays asked for."""
        there = stored_config(self.folder)
        if there is None:
            return
        check_same(self.folder, there, self.settings, self.config[RECORD])
        if "shape" in self.config and there.get("shape") != self.config["shape"]:
            shapes = f"samples of shape {there.get('shape')}, got {self.config['shape']}"
            raise Refused(f"out: {self.folder} has {shapes}. Choose another folder")
        self.config["samples"] = max(self.settings.samples, int(there.get("samples", 0)))
        if "started" in there.get(RECORD, {}):
            self.config[RECORD]["started"] = there[RECORD]["started"]

    def plan(self, there: dict[int, Shard]) -> Plan:
        """The shards to be made."""
        size = self.settings.shard_size
        assert size is not None
        return manifest.cut(manifest.missing(there.values(), self.settings.samples), size)

    def describe(self) -> None:
        """What the job would do."""
        there = manifest.read(self.folder) if self.folder.is_dir() else {}
        s, plan = self.settings, self.plan(there)
        samples = sum(stop - first for first, stop in plan)
        size = shards.bytes_of(s, self.sampling.shape, samples)
        steps = (
            f"{s.nfe} evaluations" if s.nfe else f"the grid {s.grid}" if s.grid
            else "steps of its own for each sample" if s.refills else f"{self.sampling.sde.N} steps"
        )  # fmt: skip
        print(f"{samples} samples of shape {self.sampling.shape} into {s.out}, in {len(plan)} {s.format} shards of")
        print(f"{s.shard_size} samples, by {s.sampler} with {steps}, {s.batch} at a time on {self.sampling.device}.")
        print(f"They take about {in_bytes(size)} of disk; {in_bytes(free_space(self.folder))} are free.")
        if there:
            print(f"{sum(shard.count for shard in there.values())} samples are there already, in {len(there)} shards.")

    def prepare(self) -> Plan:
        """Takes the folder into possession and looks what is missing. The first worker does this for all."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = files.FolderLock(self.folder)
        except OSError as error:
            raise Refused(f"out: cannot write to {self.folder}: {reason(error)}") from None
        # Of a former attempt that torchrun restarted, or on another machine, the last process may still be ending.
        if not self.lock.acquire(60.0 if self.worker.restarts else 0.5):
            raise Refused(f"out: another job is at work on {self.folder}. Wait for it, or choose another folder")
        self.compare()  # again: another job may have made the folder since
        there = manifest.read(self.folder)
        bad = [there.pop(first) for first in damaged(self.folder, there, self.settings.remake)]
        if bad and not self.settings.remake:
            names = ", ".join(shard.file for shard in bad[:3]) + (", ..." if len(bad) > 3 else "")
            raise Refused(
                f"out: {len(bad)} shards that were written are gone or of another size ({names}). --remake makes them "
                "again"
            )
        plan = self.plan(there)
        samples = sum(stop - first for first, stop in plan)
        needed, free = shards.bytes_of(self.settings, self.sampling.shape, samples), free_space(self.folder)
        if plan and needed > free:
            raise Refused(f"out: {in_bytes(needed)} are needed in {self.folder}, and {in_bytes(free)} are free")
        try:
            files.remove_partials(self.folder)
            self.config[RECORD].setdefault("started", time.time())
            write_config(self.folder, self.config)
            for shard in bad:
                manifest.Log(self.folder, 0).drop(shard)
                files.remove(self.folder / shard.file)
        except OSError as error:
            raise Refused(f"out: cannot write to {self.folder}: {reason(error)}") from None
        return plan

    # -- the work

    def work(self, plan: Plan) -> int:
        worker, first = self.worker, self.worker.rank == 0
        todo = sum(stop - start for start, stop in plan)
        total = max(self.settings.samples, todo)
        self.progress = Progress(total, total - todo, shown=first)
        if first:
            what = f"{todo} samples to draw, in {len(plan)} shards" if plan else f"all {total} samples are there"
            self.progress.say(f"{what}; workers: {worker.size}, device: {self.sampling.device.type}")
        worker.begin(plan, lambda: set(manifest.read(self.folder)))
        writer = Writer(self)

        def show() -> None:
            writer.check()
            if first:
                self.progress.show(*worker.totals())

        def tick(samples: int, evaluations: int) -> None:
            worker.tick(samples, evaluations)
            show()

        try:
            while (index := worker.claim(show)) is not None:
                writer.put(index, self.sampling.shard(*plan[index], tick))
                show()
        except BaseException:
            writer.stop()
            raise
        writer.close()
        if first:
            self.progress.show(*worker.totals(), last=True)
        self.progress.close()
        worker.leave()
        return self.finish() if first else 0

    def finish(self) -> int:
        """The report, and the exit code."""
        from . import report

        files.remove_partials(self.folder)  # a lost worker's
        there = manifest.read(self.folder)
        report.write(self.folder, self.config, there)
        if self.settings.grid_png:
            picture = report.preview(self.folder, self.config, there)
            if picture is not None:
                files.write_file(self.folder / "preview.png", lambda file: file.write(picture))
        failed = {i: why for shard in there.values() for i, why in shard.failed.items()}
        if not failed:
            return 0
        shown = "; ".join(f"sample {i}: {why}" for i, why in sorted(failed.items())[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        self.progress.say(f"{len(failed)} samples failed and were not written. {shown}{more}")
        return 1

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()


class Writer:
    """Writes shards in a thread of its own, beside the computing. What goes wrong there is raised by the next call."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.log = manifest.Log(job.folder, job.worker.rank)
        self.queue: queue.Queue[tuple[int, Computed] | None] = queue.Queue(maxsize=2)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (item := self.queue.get()) is not None:
            try:
                if self.error is None:
                    self._write(*item)
            except BaseException as error:
                self.error = error
            finally:
                self.queue.task_done()

    def _write(self, index: int, found: Computed) -> None:
        job, settings = self.job, self.job.settings
        first, stop = self.plan[index]
        path = job.folder / shards.name_of(settings, first)
        sha256 = shards.write(job.folder, settings, first, found.samples, found.ids, job.worker.rank)
        self.log.append(
            Shard(
                path.name,
                first,
                stop,
                files.size_of(path),
                sha256,
                found.evaluations,
                found.failed,
                found.batch,
                found.slot_evaluations,
                round(found.seconds, 3),
                round(time.time(), 3),
                job.worker.rank,
            )
        )
        job.worker.written(index)

    @property
    def plan(self) -> Any:
        return self.job.worker.shards

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def put(self, index: int, found: Computed) -> None:
        self.check()
        self.queue.put((index, found))

    def wait(self) -> None:
        """Until all that was put is written."""
        self.queue.join()
        self.check()

    def close(self) -> None:
        self.wait()
        self.stop()

    def stop(self) -> None:
        self.queue.put(None)
        self.thread.join()


# ---- the folder ----


def fingerprint(settings: Sample) -> dict[str, Any]:
    """What the network and its weights are, and with what they run."""
    record: dict[str, Any] = {
        "network_function": settings.network.rpartition(":")[2],
        "versions": {"scoresde_ext": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    source = networks.source_of(settings.network)
    for name, path in (("network", source), ("checkpoint", settings.checkpoint), ("grid", settings.grid)):
        if path is not None and Path(path).exists():
            record[f"{name}_sha256"] = hashlib.sha256(networks.read(str(path), name)).hexdigest()
    return record


def stored_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that a folder was made with; None where there is none yet."""
    path = folder / CONFIG
    if not path.exists():
        if (folder / manifest.LOGS).exists():
            raise Refused(f"out: {folder} has a manifest and no {CONFIG}. Choose another folder")
        return None
    from .settings import read_config

    return read_config(str(path))


def check_same(folder: Path, there: dict[str, Any], settings: Sample, record: dict[str, Any]) -> None:
    """Refused where a folder was made with other settings, another network or other weights."""
    found = differences(there, settings)
    was = there.get(RECORD, {})
    for name in ("network_function", "network_sha256", "checkpoint_sha256", "grid_sha256"):
        if was.get(name) != record.get(name):
            shown = [str(v.get(name, "none"))[:12] for v in (was, record)]
            found.append(f"{name.replace('_', ' ')} is {shown[0]} there, {shown[1]} here")
    if found:
        raise Refused(f"out: {folder} was made with other settings: {'; '.join(found)}. Choose another folder")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    import yaml

    content = yaml.safe_dump(config, sort_keys=False, default_flow_style=None)
    files.write_file(folder / CONFIG, lambda file: file.write(content.encode()))


def damaged(folder: Path, there: dict[int, Shard], thoroughly: bool) -> list[int]:
    """The first ids of shards that are not there as they were written: gone, of another size, or, looked at
    ``thoroughly``, of another checksum."""
    return [first for first, shard in there.items() if fault(folder, shard, thoroughly) is not None]


def fault(folder: Path, shard: Shard, thoroughly: bool) -> str | None:
    path = folder / shard.file
    try:
        if files.size_of(path) != shard.bytes:
            return f"has {files.size_of(path)} bytes, not {shard.bytes}"
        if thoroughly and files.digest(path) != shard.sha256:
            return "has another checksum"
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    return None


def free_space(folder: Path) -> int:
    """Bytes that are free where the folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def absolute(name: str) -> str:
    """A path, or ``file.py:function``, from the root; the name of a module as it is."""
    place, colon, function = name.rpartition(":")
    if place.endswith(".py"):
        return f"{Path(place).resolve()}{colon}{function}"
    return name if colon and not Path(name).exists() else str(Path(name).resolve())


def in_bytes(n: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
