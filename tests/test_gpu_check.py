"""``make gpu-check`` without a GPU: the parts that a CPU runs, what is written, and what a failure does."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Failed, Report, Skipped, Stopwatch

# Two of them start Python anew: once is enough, in the rehearsal by hand.
SLOW = ["build", "tests", "memcheck", "racecheck"]


def test_the_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu_check.main(["--rehearse", "--out", str(tmp_path), "--without", *SLOW])
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert status == 0, found["parts"]
    assert path.name.startswith("rehearsal-") and found["rehearsal"]
    assert {"device", "date", "commit", "versions", "headline", "results"} <= set(found)
    assert found["parts"] == dict.fromkeys(SLOW, "skipped: --without") | dict.fromkeys(
        ("kernels", "steps", "small solves", "overhead"), "passed"
    )
    assert all(isinstance(value, float) for value in found["headline"].values())
    for result in found["results"]:
        seconds = result["seconds"]
        assert 0 < seconds["p20"] <= seconds["p50"] <= seconds["p80"]
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1].startswith("all parts passed")
    assert "least share of the copy bandwidth" in said


def test_the_small_suite_covers_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoresde_ext import ops

    called = set()
    plain = ops._op
    monkeypatch.setattr(ops, "_op", lambda name, x: called.add(name) or plain(name, x))
    gpu_check.small_suite("cpu")
    of_the_cpu = {"perturb_keeping", "noise_with_squares"}
    registered = {
        s.split("::")[1].split(".")[0] for s in torch._C._dispatch_get_all_op_names() if "scoresde_ext::" in s
    }
    assert called == registered - of_the_cpu


def test_failures_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others run all the same, and the exit status says it."""

    def broken(*_: object) -> None:
        raise ValueError("no bandwidth")

    for name in ("training_and_langevin", "small_solves", "overhead"):
        monkeypatch.setattr(gpu_check, name, lambda *_: None)
    monkeypatch.setattr(gpu_check, "kernels", broken)
    assert gpu_check.main(["--rehearse", "--out", str(tmp_path), "--without", *SLOW]) == 1
    found = json.loads(next(tmp_path.iterdir()).read_text())
    assert found["parts"]["kernels"] == "failed: ValueError: no bandwidth"
    assert found["parts"]["steps"] == "passed"
    assert "FAILED: kernels" in capsys.readouterr().out


def test_outcomes_of_parts(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(rehearse=True)

    def end_with(error: Exception) -> None:
        raise error

    report.part("a", lambda: end_with(Skipped("no tool")))
    report.part("b", lambda: end_with(Failed("it broke")))
    with pytest.raises(Failed, match="status 3"):
        gpu_check.call(report, "sh", "-c", "exit 3")
    assert gpu_check.call(report, "sh", "-c", "echo $LEVEL", LEVEL="5") == "5\n"
    report.since -= gpu_check.LIMIT
    report.part("c", lambda: None)
    assert report.parts == {
        "a": "skipped: no tool", "b": "failed: it broke", "c": "failed: the 9 minutes were over before it began",
    }  # fmt: skip
    with pytest.raises(Failed, match="was not done when the 9 minutes were over"):
        gpu_check.call(report, "sleep", "20")


def test_the_stopwatch() -> None:
    (found,) = Stopwatch(rehearse=True).compare(lambda: sum(range(1000)))
    assert 0 < found.p20 <= found.p50 <= found.p80 < 1
