"""Several workers under torchrun: the samples are those of one, by id, also where a worker is killed on the way."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from scoresde_ext.__main__ import main
from scoresde_ext.job import manifest
from scoresde_ext.job.workers import Team

NETWORKS = Path(__file__).with_name("job_networks.py")


def command(out: Path, network: str = "tiny", *more: str) -> list[str]:
    return [
        *("sample", "--network", f"{NETWORKS}:{network}", "--device", "cpu", "--out", str(out), "--samples", "94"),
        *("--batch", "4", "--shard-size", "4", "--sampler", "unipc", "--rtol", "1e-2", "--atol", "1e-2", *more),
    ]


def torchrun(workers: int, arguments: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), *options]
    # The distribution of work does not depend on the threads; two cores are shared by all workers.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([*run, "-m", "scoresde_ext", *arguments], env=environment, capture_output=True, text=True)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("samples*")}


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: Any) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one") / "out"
    assert main(command(out)) == 0
    return content(out)


def test_two_workers(of_one: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = torchrun(2, command(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(out) == of_one
    assert main(["verify", str(out)]) == 0
    assert "94 of 94 samples" in done.stderr and "evaluations a sample" in done.stderr  # over all workers


def test_four_workers_one_of_them_killed(of_one: dict[str, bytes], tmp_path: Path) -> None:
    """torchrun starts all of them again, with the store of before; what was written stays. (The network that kills is
    another function, of which the folder keeps a record: the samples are what is compared.)"""
    out = tmp_path / "out"
    done = torchrun(4, command(out, "crash"), "--max-restarts", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr
    assert content(out) == of_one
    assert main(["verify", str(out)]) == 0


def test_wrong_inputs_are_said_once(tmp_path: Path) -> None:
    done = torchrun(2, command(tmp_path / "out", "tiny", "--sampler", "pc", "--rtol", "1"))
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert done.stderr.count("scoresde sample: rtol: means nothing to sampler pc") == 1


# ---- the sharing out of work, by itself ----


class Folder:
    """Stands for the manifest."""

    def __init__(self) -> None:
        self.firsts: set[int] = set()


def work(team: Team, shards: list[tuple[int, int]], folder: Folder, made: list[int], stops_after: int = 99) -> None:
    team.begin(shards, lambda: set(folder.firsts))
    while (index := team.claim(lambda: None)) is not None:
        if len(made) >= stops_after:
            team.over.set()  # no more signs of life
            return
        time.sleep(0.01)
        made.append(index)
        folder.firsts.add(shards[index][0])
        team.written(index)


@pytest.mark.parametrize("lost", [None, 1])
def test_every_shard_is_taken_once(lost: int | None) -> None:
    """And what a lost worker had taken, by one of the others."""
    store, folder, shards = dist.HashStore(), Folder(), [(i, i + 1) for i in range(20)]
    teams = [Team(store, rank, 3, lease=0.5) for rank in range(3)]
    made: list[list[int]] = [[], [], []]
    threads = [
        threading.Thread(target=work, args=(team, shards, folder, made[i], 2 if i == lost else 99))
        for i, team in enumerate(teams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(index for part in made for index in part) == list(range(20))
    if lost is not None:
        assert len(made[lost]) == 2


def test_a_refusal_of_the_first_is_the_end_for_all() -> None:
    store = dist.HashStore()
    first, second = (Team(store, rank, 2) for rank in range(2))

    def refuse() -> Any:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        first.agree(refuse)
    assert second.agree(refuse) is None


def test_logs_of_workers_are_read_as_one(tmp_path: Path) -> None:
    for worker, first in ((0, 0), (1, 4), (0, 8)):
        shard = manifest.Shard(f"samples-{first}", first, first + 4, 10, "0", {5: 4}, {first: "why"}, worker=worker)
        manifest.Log(tmp_path, worker).append(shard)
    again = manifest.Shard("samples-4", 4, 8, 11, "1", written=2.0, worker=0)
    manifest.Log(tmp_path, 0).append(again)
    there = manifest.read(tmp_path)
    assert sorted(there) == [0, 4, 8] and there[4] == again and there[8].failed == {8: "why"}
    assert manifest.missing(there.values(), 20) == [(12, 20)] and manifest.missing([], 0) == []
    assert manifest.missing([there[4]], 7) == [(0, 4)]
    assert manifest.cut([(0, 4), (10, 21)], 8) == [(0, 4), (10, 16), (16, 21)]
