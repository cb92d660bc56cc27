"""``make gpu-check`` without a GPU: the parts that a CPU can rehearse, and what becomes of parts that hang, crash, take
too long or are killed."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import build, driver, facts, groups, part, reporting, smoke, speed, suite, tools
from benchmarks.gpu_check.driver import Check
from benchmarks.gpu_check.reporting import Failed, Report, Skipped

# The others start Python anew, several times: make gpu-check ARGS=--rehearse has them too.
IN_THIS_PROCESS = ("facts", "build", "smoke", "kernels", "solves", "steps", "compiled", "network")
FILES = {"gpu-check.json", "gpu-check.log", "running.jsonl", "running.log", "junit.xml", "gpu-check.json.new"}


def lines(folder: Path, kind: str) -> list[Any]:
    return [line[kind] for line in reporting.read(folder) if kind in line]


# ---- a rehearsal ----


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_a_part_rehearsed(name: str, tmp_path: Path) -> None:
    assert part.run(name, Report(tmp_path, 60, rehearse=True)) == "passed"
    assert lines(tmp_path, "outcome") == ["passed"]
    assert all(isinstance(value, (int, float)) for found in lines(tmp_path, "headline") for value in found.values())
    measured = [result["seconds"] for result in lines(tmp_path, "result") if "seconds" in result]
    assert all(0 < seconds["p20"] <= seconds["p50"] <= seconds["p80"] for seconds in measured)
    assert measured or name in ("facts", "build", "smoke")


def test_the_command(tmp_path: Path) -> None:
    """Facts come with any part."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--part", "build", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=groups.ROOT, text=True, stdout=subprocess.PIPE)
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert done.returncode == 0, done.stdout
    assert {name: p["outcome"] for name, p in found["parts"].items()} == {"facts": "passed", "build": "passed"}
    assert found["rehearsal"] and found["device"] == found["facts"]["processor"]
    assert found["facts"]["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert done.stdout.splitlines()[-1].startswith("nothing failed")
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check.json", "gpu-check.log"}


def test_the_driver_needs_nothing_but_python() -> None:
    code = "import sys, benchmarks.gpu_check.driver, benchmarks.gpu_check.facts; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=groups.ROOT, text=True, stdout=subprocess.PIPE, check=True)
    assert not {"torch", "numpy", "scoresde_ext"} & set(said.stdout.split())


def test_all_parts_have_a_function_and_fit_into_ten_minutes() -> None:
    for name in part.PARTS:
        assert callable(part.function_of(name))
    assert sum(p.budget for p in part.PARTS.values()) == 615
    assert driver.LIMIT + 2 * groups.GRACE < 600


# ---- the driver, on parts that are scripts ----

SPEAK = """
import json, os, signal, subprocess, sys, time
folder = sys.argv[1]
def say(**line):
    with open(f"{folder}/running.jsonl", "a") as file:
        file.write(json.dumps(line) + chr(10))
"""
PASS = "say(outcome='passed')"
SLEEPERS = """
pids = []
for options in ({}, {"start_new_session": True}):
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **options)
    child.stdout.readline()
    pids.append(child.pid)
open(f"{os.path.dirname(folder)}/pids", "w").write(" ".join(map(str, pids)))
"""


def scripted(folder: Path, scripts: dict[str, str], seconds: float = 20, **options: Any) -> Check:
    """A run whose parts are scripts; each may take so many seconds."""
    commands = {name: [sys.executable, "-c", SPEAK + script, str(folder)] for name, script in scripts.items()}
    budgets = dict.fromkeys(scripts, seconds)
    return Check(folder, True, budgets=budgets, command=lambda name, _: commands[name], **options)


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu-check.json").read_text())
    return found


def outcomes(folder: Path) -> dict[str, str]:
    return {name: found["outcome"] for name, found in found_in(folder)["parts"].items()}


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by /proc")


@needs_proc
def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ignores SIGTERM too, and one that has left the group."""
    monkeypatch.setattr(groups, "GRACE", 0.3)
    out = tmp_path / "out"
    hang = SLEEPERS + "say(result={'name': 'measured before'}); say(headline={'speed': 2.0}); time.sleep(600)"
    check = scripted(out, {"before": PASS, "hangs": hang, "after": PASS})
    check.budgets["hangs"] = 4
    assert check.run() == 1
    assert outcomes(out) == {
        "before": "passed", "hangs": "failed: stopped after 4 s, the end of its budget", "after": "passed",
    }  # fmt: skip
    hung = found_in(out)["parts"]["hangs"]
    assert hung["results"] == [{"name": "measured before"}] and hung["headline"] == {"speed": 2.0}
    assert not any(running(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert {path.name for path in out.iterdir()} == {"gpu-check.json", "gpu-check.log"}


@needs_proc
def test_what_a_part_leaves_behind_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert scripted(out, {"leaves": SLEEPERS + PASS}).run() == 0
    assert not any(running(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_command_is_ended_with_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a part itself has started it, and no tag says whose it is."""
    monkeypatch.setattr(groups, "GRACE", 0.3)
    script = SLEEPERS.replace('({}, {"start_new_session": True})', "({}, {})") + "print('a'); time.sleep(600)"
    command = [sys.executable, "-c", SPEAK + script, str(tmp_path / "out")]
    ended, said = groups.called(command, 4)
    assert ended == (-signal.SIGTERM, True) and said == "a\n"
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    wait_for(lambda: not any(map(running, pids)))


def test_a_part_that_crashes_takes_nothing_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = {
        "crashes": "say(result={'name': 'a'}); print('on its way', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
        "crashes late": f"{PASS}; os.abort()",
        "says nothing": "sys.exit(3)",
        "is torn": f"{PASS}; open(folder + '/running.jsonl', 'a').write('{{\"outc')",
        "skips": "say(outcome='skipped: no tool')",
    }
    assert scripted(tmp_path, scripts).run() == 1
    assert outcomes(tmp_path) == {
        "crashes": "failed: ended by SIGSEGV",
        "crashes late": "failed: ended by SIGABRT",
        "says nothing": "failed: ended with status 3, and said no outcome",
        "is torn": "passed",
        "skips": "skipped: no tool",
    }
    assert found_in(tmp_path)["parts"]["crashes"]["results"] == [{"name": "a"}]
    said, log = capsys.readouterr().out, (tmp_path / "gpu-check.log").read_text()
    assert "on its way" in said and "on its way" in log
    assert "FAILED: crashes, crashes late, says nothing (" in said.splitlines()[-1]
    assert log.splitlines()[-1] == said.splitlines()[-1]


def in_a_process(folder: Path, scripts: dict[str, str]) -> subprocess.Popen[str]:
    commands = {name: [sys.executable, "-c", SPEAK + script, str(folder)] for name, script in scripts.items()}
    code = (
        "import signal, sys; from pathlib import Path; from benchmarks.gpu_check.driver import Check\n"
        f"commands = {commands!r}\n"
        f"folder, budgets = Path({str(folder)!r}), dict.fromkeys(commands, 60)\n"
        "check = Check(folder, True, budgets=budgets, command=lambda name, _: commands[name])\n"
        "signal.signal(signal.SIGINT, check.stop)\n"
        "sys.exit(check.run())"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=groups.ROOT, text=True, stdout=subprocess.PIPE)


@needs_proc
def test_a_kill_loses_only_the_running_part(tmp_path: Path) -> None:
    """And leaves nothing running beside whoever uses the device next."""
    out = tmp_path / "out"
    runs = (
        "from benchmarks.gpu_check import part\n"
        "def slow(report):\n"
        "    report.result('b'); print('here', flush=True); time.sleep(600)\n"
        "part.function_of = lambda _: slow\n"
        "sys.argv = ['part', 'smoke', '--out', folder, '--seconds', '600']\n"
        "part.main()"
    )
    scripts = {
        "done": "say(result={'name': 'a'}); " + PASS,
        "runs": SLEEPERS + runs,
        "waits": PASS,
    }
    process = in_a_process(out, scripts)
    wait_for(lambda: (out / "running.log").exists() and "here" in (out / "running.log").read_text())
    process.kill()
    process.wait()
    assert outcomes(out) == {"done": "passed"}
    assert found_in(out)["parts"]["done"]["results"] == [{"name": "a"}]
    assert lines(out, "result") == [{"name": "b"}]
    assert {path.name for path in out.iterdir()} <= FILES and len(FILES) <= 8
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_for(lambda: not any(map(running, pids)))


def test_an_interrupt_writes_what_there_is(tmp_path: Path) -> None:
    runs = "say(result={'name': 'b'}); print('here', flush=True); time.sleep(600)"
    process = in_a_process(tmp_path, {"done": PASS, "runs": runs, "waits": PASS})
    wait_for(lambda: (tmp_path / "running.log").exists() and "here" in (tmp_path / "running.log").read_text())
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130
    assert outcomes(tmp_path) == {
        "done": "passed", "runs": "failed: stopped by SIGINT", "waits": "failed: not started, stopped by SIGINT",
    }  # fmt: skip
    assert found_in(tmp_path)["parts"]["runs"]["results"] == [{"name": "b"}]
    assert "FAILED: runs, waits" in said.splitlines()[-1]


def test_results_are_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes, the driver leaves the file as it was."""
    scripted(tmp_path, {"a": PASS}).run()
    before = (tmp_path / "gpu-check.json").read_text()

    def torn(path: Path, text: str, encoding: str) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise SystemExit("killed")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(SystemExit, match="killed"):
        scripted(tmp_path, {"a": PASS}).run(["a"])
    assert (tmp_path / "gpu-check.json").read_text() == before


def test_parts_run_again_are_merged(tmp_path: Path) -> None:
    fact = "say(fact={'processor': 'P'}); "
    first = {"facts": fact + PASS, "a": "say(result={'name': 'a', 'n': 1}); " + PASS, "b": "sys.exit(3)"}
    assert scripted(tmp_path, first).run() == 1
    again = {"facts": fact + PASS, "a": "sys.exit(3)", "b": "say(result={'name': 'b', 'n': 2}); " + PASS}
    assert scripted(tmp_path, again).run(["b"]) == 0
    found = found_in(tmp_path)
    assert found["device"] == "P"
    assert outcomes(tmp_path) == {"facts": "passed", "a": "passed", "b": "passed"}
    assert found["parts"]["a"]["results"] == [{"name": "a", "n": 1}]
    assert found["parts"]["b"]["results"] == [{"name": "b", "n": 2}]
    log = (tmp_path / "gpu-check.log").read_text()
    assert log.index("ended with status 3") < log.rindex("== b")

    assert scripted(tmp_path, again).run(without=["a"]) == 0  # all but one, from nothing
    assert outcomes(tmp_path) == {"facts": "passed", "b": "passed"}


def test_results_of_two_devices_are_not_merged(tmp_path: Path) -> None:
    scripted(tmp_path, {"facts": "say(fact={'processor': 'P'}); " + PASS, "a": PASS}).run()
    before = (tmp_path / "gpu-check.json").read_text()
    other = {"facts": "say(fact={'processor': 'Q'}); " + PASS, "a": "sys.exit(3)"}
    with pytest.raises(SystemExit, match="has results of P, and this is Q: give another folder"):
        scripted(tmp_path, other).run(["a"])
    with pytest.raises(SystemExit, match="has results of a rehearsal, and this is a GPU"):
        Check(tmp_path, rehearse=False).run(["kernels"])
    assert (tmp_path / "gpu-check.json").read_text() == before


def test_the_limit_cuts_what_comes_last(tmp_path: Path) -> None:
    assert scripted(tmp_path, {"a": "time.sleep(600)", "b": PASS}, limit=3.2).run() == 1
    assert outcomes(tmp_path) == {
        "a": "failed: stopped after 3 s, the end of the 3 s of --limit",
        "b": "failed: not started, the 3 s of --limit were over",
    }


def test_a_long_log_is_cut_in_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LONGEST_LOG", 100)
    scripted(tmp_path, {"a": "print('first' + 'x' * 1000 + 'last', flush=True); " + PASS}).run()
    log = (tmp_path / "gpu-check.log").read_text()
    assert len(log) < 500 and "first" in log and "last" in log and "characters are left out" in log


@pytest.mark.parametrize("importable", [False, True])
def test_without_any_extension_no_part_is_started(
    importable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Check, "importable", lambda _: importable)
    assert scripted(tmp_path, {"build": "say(outcome='failed: no compiler')", "kernels": PASS}).run() == 1
    wanted = "passed" if importable else "failed: not started, the build failed, and there is no extension to import"
    assert outcomes(tmp_path) == {"build": "failed: no compiler", "kernels": wanted}


def test_the_repository_keeps_what_a_gpu_gave(tmp_path: Path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    kept.mkdir()
    check = scripted(out, {"facts": "say(fact={'gpu': 'NVIDIA H100 80GB'}); " + PASS}, keep=kept)
    assert check.run() == 0
    assert not list(kept.iterdir())  # a rehearsal's numbers mean nothing
    check.rehearse = False
    assert check.run() == 0
    (path,) = kept.iterdir()
    assert path.name == f"gpu-nvidia-h100-80gb-{check.found['date'][:10]}.json"
    assert json.loads(path.read_text()) == found_in(out)


# ---- what parts say ----


def test_a_case_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def three(report: Report) -> None:
        with report.case("one"):
            raise ValueError("no\nbandwidth")
        with report.case("two"):
            raise Skipped("torchode is not installed")
        with report.case("three"):
            report.headline("speed", 2.0)

    monkeypatch.setattr(part, "function_of", lambda _: three)
    outcome = part.run("kernels", Report(tmp_path, 9, rehearse=True))
    assert outcome == "failed: 1 of 3 cases; the first, one: ValueError: no"
    assert lines(tmp_path, "result") == [
        {"name": "one", "failed": "ValueError: no"}, {"name": "two", "skipped": "torchode is not installed"},
    ]  # fmt: skip
    assert lines(tmp_path, "headline") == [{"speed": 2.0}]


def test_a_lost_cuda_context_ends_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    report = Report(tmp_path, 9, rehearse=False)
    with pytest.raises(Failed, match="a: ValueError: 1; CUDA is of no use after it"), report.case("a"):
        raise ValueError(1)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Skipped("there is no ncu"), "skipped: there is no ncu"),
        (Failed("other bits"), "failed: other bits"),
        (ModuleNotFoundError("No module named 'tqdm.auto'", name="tqdm.auto"), "skipped: tqdm is not installed"),
        (
            ModuleNotFoundError("No module named 'scoresde_ext._C'", name="scoresde_ext._C"),
            "failed: ModuleNotFoundError: No module named 'scoresde_ext._C'",
        ),
    ],
)
def test_outcomes(error: Exception, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(_: Report) -> None:
        raise error

    monkeypatch.setattr(part, "function_of", lambda _: raising)
    assert part.run("ncu", Report(tmp_path, 9, rehearse=True)) == outcome
    assert lines(tmp_path, "outcome") == [outcome]


# ---- facts and build ----


def program(path: Path, *shell: str) -> str:
    path.write_text("#!/bin/sh\n" + "\n".join(shell) + "\n")
    path.chmod(0o755)
    return str(path)


def test_facts_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = "NVIDIA H100, 580.1, 9.0, 81559 MiB, 700.00 W, 1980 MHz, 2619 MHz, 345 MHz, 2619 MHz, 71.20 W, 30"
    program(tmp_path / "nvidia-smi", f"echo '{values}'", f"echo '{values}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert part.run("facts", Report(tmp_path, 9, rehearse=False)) == "passed"
    found = {name: value for fact in lines(tmp_path, "fact") for name, value in fact.items()}
    assert found["gpu"] == "NVIDIA H100"
    assert found["nvidia_smi"]["driver_version"] == "580.1" and found["nvidia_smi"]["clocks.sm"] == "345 MHz"


def test_facts_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "nvidia-smi", "echo 'Field \"compute_cap\" is not a valid field'; exit 2")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert facts.ask_gpu(facts.GPU) == {}
    assert facts.said("no-such-program") == ""


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ('csrc/kernels/cuda.cu(12): error: identifier "uint5" is undefined', True),
        ("csrc/torch/calls.cpp:33:12: error: 'type_identity' in namespace 'std' does not name a template type", True),
        ("cuda.cu:1:10: fatal error: cuda_runtime.h: No such file or directory", True),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_103'", True),
        ("/usr/bin/ld: cannot find -lcudart_static", True),
        ("RuntimeError: Ninja is required to load C++ extensions", True),
        ("c++ -Werror -DERROR=1 -c csrc/torch/error.cpp -o build/error.o", False),
        ("warning: there was no error in this", False),
    ],
)
def test_the_first_error(line: str, is_error: bool) -> None:
    said = f"running build_ext\n{line}\n\n  x = y\nerror: command 'ninja' failed"
    assert build.first_error(said) == (line if is_error else "error: command 'ninja' failed")
    assert build.first_error("SCORESDE_EXT_CUDA=1 asks for CUDA, but there is no nvcc\n").endswith("no nvcc")
    assert build.first_error("") == "the build failed and said nothing"


FAKE_BUILD = """
import os, sys
print("cuda", os.environ["SCORESDE_EXT_CUDA"], "jobs", os.environ["MAX_JOBS"])
if os.environ["SCORESDE_EXT_CUDA"] == "1":
    print("a.cu(12): error: no such thing"), print("error: command failed"), sys.exit(1)
"""


@pytest.mark.parametrize("why", ["", "torch sees no CUDA device"])
def test_a_failing_cuda_build_falls_back_to_the_cpu(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "COMMAND", (sys.executable, "-c", FAKE_BUILD))
    monkeypatch.setattr(build, "why_no_cuda", lambda _: why)
    first = why or "a.cu(12): error: no such thing"
    assert part.run("build", Report(tmp_path, 40, rehearse=False)) == f"failed: {first}; built for the CPU"
    assert lines(tmp_path, "result") == [{"name": "build with CUDA", "failed": first}]
    said = capfd.readouterr().out
    assert ("cuda 1" in said) == (not why) and "cuda 0" in said


def test_builds_that_succeed_fail_twice_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(script: str, seconds: float = 40) -> str:
        monkeypatch.setattr(build, "COMMAND", (sys.executable, "-c", script))
        return part.run("build", Report(tmp_path, seconds, rehearse=False))

    monkeypatch.setattr(build, "why_no_cuda", lambda _: "")
    assert outcome("") == "passed"
    assert outcome("print('x: error: y'); exit(1)") == "failed: x: error: y; and for the CPU: x: error: y"
    hang = "import os, time; time.sleep(60 * int(os.environ['SCORESDE_EXT_CUDA']))"
    monkeypatch.setattr(build, "FOR_THE_CPU", 2.0)
    monkeypatch.setattr(build, "GRACE", 0.0)
    late = "the build was not done after 1 s"
    assert outcome(hang, 3) == f"failed: {late}; built for the CPU"
    assert outcome("import time; time.sleep(60)", 3) == f"failed: {late}; and for the CPU: {late}"


def test_without_a_gpu_torch_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert build.why_no_cuda(Report(tmp_path, 9, False)).startswith("torch sees no CUDA device")
    assert part.run("kernels", Report(tmp_path, 9, False)).startswith("failed: torch sees no CUDA device; --rehearse")


# ---- smoke ----


def test_the_suite_covers_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoresde_ext import ops

    called = set()
    plain = ops._op
    monkeypatch.setattr(ops, "_op", lambda name, x: called.add(name) or plain(name, x))
    monkeypatch.setattr(sys, "argv", ["suite", "cpu", "0"])
    suite.main()
    of_the_cpu = {"perturb_keeping", "noise_with_squares"}
    registered = {
        s.split("::")[1].split(".")[0] for s in torch._C._dispatch_get_all_op_names() if "scoresde_ext::" in s
    }
    assert called == registered - of_the_cpu


def test_all_arguments_are_moved() -> None:
    def tensors(v: Any) -> list[torch.Tensor]:
        if isinstance(v, torch.Tensor):
            return [v]
        parts = v.values() if isinstance(v, dict) else v if isinstance(v, (tuple, list)) else ()
        return [t for p in parts for t in tensors(p)]

    given = [v for _, _, v in suite.calls(every=False)] + [other.arguments for other in suite.others().values()]
    found = [t for v in given for t in tensors(suite.moved(v, "meta"))]
    assert found and all(t.device.type == "meta" for t in found)


def test_other_bits_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit in the last place of one element of one call."""
    plain, calls = smoke.on_cpu, []

    def nudged(found: Any, device: str) -> tuple[torch.Tensor, ...]:
        first, *others = plain(found, device)
        calls.append(first)
        if len(calls) == 3:
            first = first.clone()
            first.view(
                torch.int64 if first.dtype == torch.float64 else torch.int16 if first.itemsize == 2 else torch.int32
            ).flatten()[1] += 1
        return first, *others

    monkeypatch.setattr(smoke, "on_cpu", nudged)
    report = Report(tmp_path, 60, rehearse=True)
    smoke.ops_against_the_cpu(report, "cpu")
    with pytest.raises(Failed, match="1 of .* cases; the first, op .*other bits than the CPU's"):
        report.conclude()
    assert sum(result.get("other_bits", 0) for result in lines(tmp_path, "result")) == 1


def test_results_on_another_device_are_noticed() -> None:
    with pytest.raises(Failed, match="a result is not on cuda"):
        smoke.on_cpu(torch.zeros(3), "cuda")


@pytest.mark.parametrize(
    ("graph", "options", "failure"),
    [(None, {"method": "RK23"}, "other bits than step by step"), ("off", {}, "ran as 'off' instead of 'replay'")],
)
def test_graph_modes_that_differ_are_noticed(
    graph: str | None, options: dict[str, Any], failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = smoke.sampler
    monkeypatch.setattr(smoke, "SOLVERS", {"RK45": {}})
    monkeypatch.setattr(
        smoke, "sampler", lambda report, mode: plain(report, graph or mode, **(options if mode != "off" else {}))
    )
    report = Report(tmp_path, 60, rehearse=True)
    with smoke.graph_backend(report):
        smoke.solves_in_every_mode(report)
    with pytest.raises(Failed, match=f"3 of 3 cases; the first, solve RK45, replay: {failure}"):
        report.conclude()


def test_memory_that_a_loop_lost_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = []
    plain = smoke.network
    monkeypatch.setattr(smoke, "network", lambda report: nets.append(plain(report)) or nets[-1])
    monkeypatch.setattr(smoke, "write_over_free_memory", lambda _: nets[-1].layers[0].weight.mul_(1.01))
    report = Report(tmp_path, 60, rehearse=True)
    with smoke.graph_backend(report):
        smoke.graphs_that_outlive_others(report)
    with pytest.raises(Failed, match="2 of 2 cases; .*: the second of two loops gave other bits"):
        report.conclude()


def test_loops_that_are_none_show_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = smoke.sampler
    monkeypatch.setattr(smoke, "sampler", lambda report, mode, batch: plain(report, "off", batch))
    report = Report(tmp_path, 60, rehearse=True)
    with smoke.graph_backend(report):
        smoke.graphs_that_outlive_others(report)
    with pytest.raises(Failed, match="2 of 2 cases; .*: the loop ran as 'off'"):
        report.conclude()


# ---- speed ----


def test_the_stopwatch() -> None:
    (found,) = speed.Stopwatch(rehearse=True).compare(lambda: sum(range(1000)))
    assert 0 < found.p20 <= found.p50 <= found.p80 < 1


def test_missing_solvers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs only its own measurement."""
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None if name in ("scipy", "torchode") else 1)
    assert part.run("solves", Report(tmp_path, 60, rehearse=True)) == "passed"
    results = lines(tmp_path, "result")
    assert {r["name"]: r["skipped"] for r in results if "skipped" in r} == {
        "solve, scipy": "scipy is not installed", "solve, torchode": "torchode is not installed",
    }  # fmt: skip
    assert {"solve, off", "solve, replay", "solve, while", "solve, torchdiffeq"} <= {
        r["name"] for r in results if "seconds" in r
    }


def test_baselines_need_no_scipy() -> None:
    code = "import sys; sys.modules['scipy'] = None; import benchmarks.gpu_check.speed"
    subprocess.run([sys.executable, "-c", code], cwd=groups.ROOT, check=True)


# ---- tools ----

# In two pieces: this file is none of those that are looked for.
MARKED = "import pytest, time\npytestmark = pytest.mark." + "gpu\n"


def test_files_with_marked_tests() -> None:
    found = {path.name for path in tools.marked_files()}
    assert {"test_cuda_gpu.py", "test_gpu_loops.py", "test_info.py"} <= found
    assert Path(__file__).name not in found


def test_marked_tests_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "tests", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "test_a.py").write_text(MARKED + "def test_right(): pass\n")
    (folder / "test_b.py").write_text(MARKED + "def test_wrong(): assert 1 == 2\n")
    (folder / "test_c.py").write_text("def test_of_the_cpu(): pass\n")
    (folder / "test_d.py").write_text(MARKED + "import os\ndef test_crash(): os.abort()\n")
    (folder / "test_e.py").write_text(MARKED + "@pytest.mark.skip\ndef test_left_out(): pass\n")
    monkeypatch.setattr(tools, "TESTS", folder)
    outcome = part.run("tests", Report(out, 60, rehearse=False))
    assert outcome.startswith("failed: 3 of 4 cases; the first, test_b.py: 1 failed")
    found = {r["name"]: r for r in lines(out, "result") if "status" in r}
    assert found["test_a.py"]["pytest"].startswith("1 passed") and found["test_d.py"]["status"] == -signal.SIGABRT
    cases = xml.parse(out / "junit.xml").getroot().iter("testcase")
    assert [case.get("name") for case in cases] == ["test_right", "test_wrong", "test_left_out"]


def test_tests_that_hang_are_interrupted(tmp_path: Path) -> None:
    path, suites = tmp_path / "test_a.py", xml.Element("testsuites")
    path.write_text(MARKED + "def test_right(): pass\ndef test_hangs(): time.sleep(600)\n")
    with pytest.raises(Failed, match="stopped after 12 s: .*1 passed"):
        tools.test_file(Report(tmp_path, 60, rehearse=False), path, 12.0, suites)
    assert next(suites.iter("testcase")).get("name") == "test_right"


def test_without_pytest_its_part_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda _: None)
    assert part.run("tests", Report(tmp_path, 60, rehearse=False)) == "skipped: pytest is not installed"


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum"
"","","","us","Mbyte"
"0","7","void affine_kernel<float>(AffineArgs)","11.5","25.1"
"1","7","void stage_kernel<float>(StageArgs)","31.0","75.3"
"""


def test_counters_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said").write_text(NCU)
    monkeypatch.setattr(tools, "tool", lambda _: program(tmp_path / "ncu", f"cat {tmp_path / 'said'}"))
    assert part.run("ncu", Report(tmp_path, 60, rehearse=False)) == "passed"
    assert lines(tmp_path, "result") == [
        {
            "name": "ncu, void affine_kernel<float>(AffineArgs)",
            "gpu__time_duration.sum": "11.5",
            "dram__bytes.sum": "25.1",
        },
        {
            "name": "ncu, void stage_kernel<float>(StageArgs)",
            "gpu__time_duration.sum": "31.0",
            "dram__bytes.sum": "75.3",
        },
    ]
    (tmp_path / "said").write_text("==ERROR== ERR_NVGPUCTRPERM - no permission to access the counters\n")
    outcome = part.run("ncu", Report(tmp_path, 60, rehearse=False))
    assert outcome == "failed: ncu gave no counters: ==ERROR== ERR_NVGPUCTRPERM - no permission to access the counters"


@pytest.mark.parametrize("name", ["ncu", "memcheck", "racecheck"])
def test_without_a_tool_its_part_is_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "tool", lambda _: None)
    assert part.run(name, Report(tmp_path, 60, rehearse=False)).startswith("skipped: there is no ")


CLEAN, SUITE = "echo '========= ERROR SUMMARY: 0 errors'", "echo 'suite: 34 kinds of call, 120 calls'"
RACE = "echo '========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)'"


@pytest.mark.parametrize(
    ("shell", "outcome"),
    [
        ((SUITE, CLEAN), "passed"),
        ((SUITE, RACE, "exit 9"), "failed: RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"),
        ((SUITE, RACE), "failed: RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"),
        ((CLEAN, "exit 1"), "failed: the ops did not all run: status 1"),
        (
            ("echo '========= Error: Device not supported'", "exit 1"),
            "failed: racecheck gave no summary, and ended with status 1: ========= Error: Device not supported",
        ),
    ],
)
def test_sanitizers(shell: tuple[str, ...], outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "tool", lambda _: program(tmp_path / "sanitizer", *shell))
    assert part.run("racecheck", Report(tmp_path, 60, rehearse=False)) == outcome
