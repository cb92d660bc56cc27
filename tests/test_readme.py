"""README's measured numbers are those of the result files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme, record

PAGE = readme.README.read_text()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy to change."""
    for name in ("solvers.json", "solvers.csv", "speed.json", "speed.csv", "digits.csv", "demo.json"):
        shutil.copy(record.RESULTS / name, tmp_path)
    return tmp_path


def change_csv(path: Path, key: str, new: str, **where: str) -> None:
    rows = record.read_csv(path)
    for row in rows:
        if where.items() <= row.items():
            row[key] = new
    record.write_csv(path, rows)


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def changed_lines(results: Path) -> list[str]:
    made = readme.filled(PAGE, results).splitlines()
    return [new for new, old in zip(made, PAGE.splitlines(), strict=True) if new != old]


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_readme_says_what_was_measured() -> None:
    """If this fails after a measurement or a change of words: python -m benchmarks.readme"""
    assert readme.filled(PAGE, record.RESULTS) == PAGE


def test_a_changed_number_is_written_anew() -> None:
    edited = PAGE.replace(" digits a second", "0 digits a second", 1)
    assert edited != PAGE and readme.filled(edited, record.RESULTS) == PAGE


def test_evaluations(results: Path) -> None:
    def better(found: Any) -> None:
        (r,) = (
            r for r in found["ratios"]
            if (r["solver"], r["work"], r["error"], r["problems"], r["target"])
            == ("UniPC-4 adaptive", "evaluations", "rms", "digits", 1e-3)
        )  # fmt: skip
        r["ratio"] = 0.05

    change_json(results / "solvers.json", better)
    assert any(line.startswith("| UniPC-4, adaptive |") and "| **0.05** |" in line for line in changed_lines(results))
    assert readme.solvers(results).count("**") == 2 * 6  # one in each column


def test_few_evaluations(results: Path) -> None:
    change_csv(
        results / "solvers.csv", "rms", "0.0346", problem="digits", sde="sub-VP", solver=readme.FITTED, setting="10"
    )
    assert " 3.5e-2 (sub-VP) and " in unwrapped(readme.few_evaluations(results))


def test_speed(results: Path) -> None:
    """The best of the baseline's times counts on two threads, its own alone on one."""
    where = {"case": "multistep solver", "shape": "64x2"}
    for competitor, threads, best in (
        ("k-diffusion loop", "1", "0.012"), ("k-diffusion loop", "2", "0.050"),
        ("scoresde_ext", "1", "0.002"), ("scoresde_ext", "2", "0.001"),
    ):  # fmt: skip
        change_csv(results / "speed.csv", "best", best, **where, competitor=competitor, threads=threads)
    assert changed_lines(results) == ["| multistep solver, (64, 2) | k-diffusion loop | 6.0 | 12.0 |"]


def test_memory(results: Path) -> None:
    change_csv(results / "speed.csv", "peak_bytes", "1000", case="loss step", shape="16x3x256x256", threads="1")
    (line,) = changed_lines(results)
    assert line == "At its peak a loss step of images holds 1.00 of eager torch's memory."


def test_rows_that_are_absent(results: Path) -> None:
    rows = [
        row for row in record.read_csv(results / "speed.csv") if row["threads"] == "1" or row["case"] == "predictor"
    ]
    record.write_csv(results / "speed.csv", rows)
    record.write_csv(results / "digits.csv", record.read_csv(results / "digits.csv")[:1])
    table = readme.speed(results).splitlines()
    assert [line.endswith("— |") for line in table if line.startswith(("| predictor", "| corrector"))] == [
        False,
        False,
        True,
        True,
    ]
    assert not any(line.count("—") > 1 for line in table)
    assert "scipy's RK45 makes —: — and — times as many" in unwrapped(readme.end_to_end(results))


def test_end_to_end(results: Path) -> None:
    """2,000 digits with an error of 1e-3 between two settings, in 20, 10 and 5 s."""
    rows = [
        {"sampler": name, "setting": setting, "samples": 2000, "calls": 10, "seconds": seconds * scale, "rms": rms}
        for name, scale in (("scipy RK45", 4.0), ("UniPC-4 adaptive", 2.0), ("UniPC-3 calibrated", 1.0))
        for setting, seconds, rms in ((1, 2.5, 1e-2), (2, 10.0, 1e-4))
    ]
    record.write_csv(results / "digits.csv", rows)
    assert unwrapped(readme.end_to_end(results)) == (
        "At an RMS error of 1e-3 the calibrated grid makes 400 digits a second and adaptive UniPC 200, where scipy's "
        "RK45 makes 100: 4.0 and 2.0 times as many."
    )


def test_demo(results: Path) -> None:
    change_json(results / "demo.json", lambda found: found.update(seconds=[4.0, 2.0], samples=300))
    change_json(results / "demo.json", lambda found: found["environment"]["machine"].update(processor="Z80"))
    made = readme.demo(results)
    assert made.startswith("Z80, ") and "; 2.0 s (the fastest of 2 runs), 150 digits a second |" in made


@pytest.mark.parametrize("text", ["<!-- end -->\n", "<!-- measured: speed -->\n"])
def test_a_block_that_is_lost(text: str) -> None:
    with pytest.raises(SystemExit, match="expected the blocks evaluations for an error, "):
        readme.filled(PAGE.replace(text, "", 1), record.RESULTS)


def test_the_rehearsal_leaves_readme_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path) -> None:
    monkeypatch.setattr(record, "REHEARSAL", results)
    monkeypatch.setattr("sys.argv", ["readme", "--quick"])
    change_json(results / "demo.json", lambda found: found.update(seconds=[1e6]))
    readme.main()
    assert "; 1000000.0 s (one run)" in (results / "README.md").read_text()
    assert readme.README.read_text() == PAGE
