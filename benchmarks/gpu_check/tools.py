"""What other programs find: pytest, Nsight Compute, compute-sanitizer."""

from __future__ import annotations

import csv
import importlib.util
import re
import signal
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from . import groups
from .facts import tool
from .groups import ROOT, called
from .reporting import JUNIT, Failed, Report, Skipped, replace

TESTS = ROOT / "tests"


# ---- tests ----


def marked_tests(report: Report) -> None:
    """The tests marked ``gpu``, file by file: what takes one along leaves the others. pytest is interrupted where its
    time is over, and writes down what it has seen."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    files = marked_files()
    suites = xml.Element("testsuites")
    for i, path in enumerate(files):
        left = report.seconds_left - groups.GRACE - 1
        with report.case(path.name):
            if left < 5:
                raise Failed("no time was left for it")
            # A file may take more than its share, so long as something is left for those that follow.
            test_file(report, path, min(left, 1.5 * left / (len(files) - i)), suites)
        replace(report.folder / JUNIT, xml.tostring(suites, encoding="unicode"))
    if report.rehearse:
        report.conclude()
        raise Skipped("the tests marked gpu skip themselves on a CPU")


def marked_files() -> list[Path]:
    return [path for path in sorted(TESTS.glob("test_*.py")) if "pytest.mark.gpu" in path.read_text("utf-8")]


def test_file(report: Report, path: Path, seconds: float, suites: xml.Element) -> None:
    with tempfile.NamedTemporaryFile(suffix=".xml") as junit:
        command = (
            sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs", "--maxfail=10",
            "--durations=10", f"--junitxml={junit.name}", str(path),
        )  # fmt: skip
        # Plugins that happen to be installed are none of the tests'.
        ended, said = called(command, seconds, signal.SIGINT, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        written = Path(junit.name).read_text("utf-8")
    if written:
        suites.extend(xml.fromstring(written).iter("testsuite"))
    last = said.rstrip().splitlines()[-1].strip("= ") if said.strip() else "pytest said nothing"
    report.result(path.name, status=ended.status, pytest=last)
    if ended.late:
        raise Failed(f"stopped after {seconds:.0f} s: {last}")
    nothing_run = ended.status == 5 or " passed" not in last
    if ended.status not in (0, 5) or (nothing_run and not report.rehearse):
        raise Failed(last)


# ---- counters of kernels ----

METRICS = (
    "gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)  # fmt: skip


def profile(report: Report) -> None:
    """What limits three kernels, by the GPU's own counters."""
    target = (sys.executable, "-m", f"{__package__}.profiled", report.device)
    if report.rehearse:
        ended, _ = called(target, report.seconds_left)
        if ended.status:
            raise Failed(f"the kernels to profile ended with status {ended.status}")
        raise Skipped("a CPU has no ncu; the kernels ran without it")
    ncu = tool("ncu")
    if ncu is None:
        raise Skipped("there is no ncu (Nsight Compute) on PATH or in CUDA_HOME")
    # The clocks stay as they are: on a borrowed machine they may not be ours to lock.
    options = ("--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw")
    ended, said = called((ncu, *options, "--metrics", ",".join(METRICS), *target), report.seconds_left - 4)
    rows = counters(said)
    for row in rows:
        report.result(f"ncu, {row.pop('Kernel Name')}", **row)
    if not rows:
        why = next((line for line in said.splitlines() if "==ERROR==" in line), f"it ended with status {ended.status}")
        raise Failed(f"ncu gave no counters: {why}")


def counters(said: str) -> list[dict[str, str]]:
    """The kernels in ncu's table, with their name and metrics. Its second line has units and no id."""
    table = csv.DictReader(line for line in said.splitlines() if line.startswith('"'))
    return [
        {"Kernel Name": row["Kernel Name"]} | {name: row[name] for name in METRICS if name in row}
        for row in table
        if row.get("ID")
    ]


# ---- sanitizers ----


def memcheck(report: Report) -> None:
    sanitize(report, "memcheck")


def racecheck(report: Report) -> None:
    sanitize(report, "racecheck")


def sanitize(report: Report, name: str) -> None:
    """Every op under compute-sanitizer; only our kernels are looked at."""
    start_and_end = 15.0  # seconds that are not the suite's
    suite = (sys.executable, "-m", f"{__package__}.suite", report.device)
    if report.rehearse:
        ended, said = called((*suite, "0"), report.seconds_left)
        require_suite(report, ended, said)
        raise Skipped("a CPU has no compute-sanitizer; the ops ran without it")
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        raise Skipped("there is no compute-sanitizer (of the CUDA toolkit) on PATH or in CUDA_HOME")
    options = ("--tool", name, "--error-exitcode", "9", "--print-limit", "20", "--kernel-name", "kns=scoresde")
    ended, said = called(
        (sanitizer, *options, *suite, f"{report.seconds_left - start_and_end:.0f}"), report.seconds_left - 4,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    summary = re.search(r"=+ (ERROR SUMMARY: \d+ error|RACECHECK SUMMARY: \d+ hazard).*", said)
    if summary is None:
        why = next((line for line in said.splitlines() if line.startswith("=========")), "it said nothing")
        raise Failed(f"{name} gave no summary, and ended with status {ended.status}: {why}")
    report.result(name, summary=summary[0].strip("= "))
    if ended.status == 9 or not re.search(r": 0 (error|hazard)", summary[0]):
        raise Failed(summary[0].strip("= "))
    require_suite(report, ended, said)


def require_suite(report: Report, ended: groups.Ended, said: str) -> None:
    """Failed where the suite did not come to its end."""
    done = re.search(r"^suite: (.+)$", said, re.MULTILINE)
    if ended.late or ended.status or done is None:
        raise Failed(f"the ops did not all run: status {ended.status}{', for want of time' if ended.late else ''}")
    report.result("suite", calls=done[1])
