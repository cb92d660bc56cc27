"""Builds the extension and runs its tests on every promised pair of torch and Python: the table of docs/versions.md.

    python .ci/versions.py --write                  all of PAIRS, the whole suite: two hours; for every night
    python .ci/versions.py --torch 2.11.0 --python 3.11 -- tests/test_ops_values.py

For each pair: the committed files in a folder of their own, torch in another (a CPU build where pip finds one; else the
CUDA build without NVIDIA's packages, over the stand-ins of stand_ins.py), the other packages at constraints.txt's
versions, a build for the CPU, pytest. A row is written after each pair; one that fails does not stop the others, and
makes the exit status 1. Interpreters are looked for on PATH and among pyenv's. Needs pip, gcc, g++ and binutils.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import stand_ins

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "versions.md"
# Every minor version of torch that is promised, by its last release, with the Pythons it is tried on: all of them for
# the one of constraints.txt, and for the others one each. What else exists, --torch and --python ask for.
PAIRS = {
    "2.11.0": ["3.12"],
    "2.12.1": ["3.13"],
    "2.13.0": ["3.10", "3.11", "3.12", "3.13"],
    "2.14.1": ["3.11"],
    "2.15.0": ["3.12"],
}


class Failed(Exception):
    """What failed, in words."""


def run(log: Path, *command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Runs a command; what it printed, which is added to the log."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    if done.returncode:
        raise Failed(done.stdout)
    return done.stdout


def find_python(version: str) -> str:
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    raise Failed(f"there is no python{version}")


def packages(folder: Path, python: str, log: Path) -> Path:
    """An environment with everything but torch; its interpreter."""
    home = folder / f"python{python}"
    if not (home / "done").exists():
        run(log, find_python(python), "-m", "venv", "--clear", home)
        pinned = [
            line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("torch==")
        ]
        (home / "pinned.txt").write_text("\n".join(pinned))
        run(log, home / "bin/python", "-m", "pip", "install", "--no-deps", "-r", home / "pinned.txt")
        (home / "done").touch()
    return home / "bin/python"


def environment(home: Path, python: Path, log: Path) -> Path:
    """An environment of the pair's own, which finds torch and the packages in their folders; its interpreter."""
    run(log, python, "-m", "venv", "--clear", "--without-pip", home / "environment")
    (site,) = (home / "environment").glob("lib/python*/site-packages")
    (of_packages,) = (python.parent.parent).glob("lib/python*/site-packages")
    (site / "paths.pth").write_text(f"{home / 'torch'}\n{of_packages}\n")
    return home / "environment" / "bin" / "python"


def install_torch(home: Path, python: Path, version: str, log: Path) -> None:
    if (home / "torch_done").exists():
        return
    target = home / "torch"
    shutil.rmtree(target, ignore_errors=True)
    install = (python, "-m", "pip", "install", "--no-deps", "--no-cache-dir", "--target", target)
    try:
        run(log, *install, f"torch=={version}+cpu")
    except Failed:
        run(log, *install, f"torch=={version}")
        stand_ins.main(target / "torch", home / "stand_ins")
    (home / "torch_done").touch()


def check_out(folder: Path, commit: str) -> None:
    """The files of a commit, and of an earlier run only what it compiled."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and path.name != "build":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)


def try_pair(folder: Path, python: str, torch: str, commit: str, arguments: list[str]) -> str:
    """What came of it: pytest's last line, or what failed."""
    home = folder / f"python{python}-torch{torch}"
    home.mkdir(parents=True, exist_ok=True)
    log, checkout = home / "log.txt", home / "checkout"
    log.unlink(missing_ok=True)
    try:
        step, of_python = "its packages do not install", packages(folder, python, log)
        install_torch(home, of_python, torch, log)
        check_out(checkout, commit)
        interpreter = environment(home, of_python, log)
        variables = {
            "LD_LIBRARY_PATH": str(home / "stand_ins"),
            "PATH": f"{of_python.parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        }
        step = "does not build"
        run(
            log, interpreter, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".",
            cwd=checkout, SCORESDE_EXT_CUDA="0", MAX_JOBS=str(os.cpu_count()), **variables,
        )  # fmt: skip
        step = "tests failed"
        said = run(log, interpreter, "-m", "pytest", "-n", "2", *arguments, cwd=checkout, **variables)
    except Failed as failed:
        last = str(failed).strip().splitlines()[-1] if step == "tests failed" else first_error(str(failed))
        return f"{step}: {last.strip('= ')}"
    return said.strip().splitlines()[-1].strip("= ")


def first_error(said: str) -> str:
    lines = [line for line in said.strip().splitlines() if re.search(r"\berror\b|Error", line)]
    return (lines or said.strip().splitlines() or [""])[0].strip()[:200]


def rows(results: dict[str, Any]) -> list[str]:
    def order(name: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", name)]

    table = ["| torch | Python | tests | result | minutes | commit |", "|---|---|---|---|---:|---|"]
    for name in sorted(results, key=order):
        found = results[name]
        torch, python = name.split()
        cells = (torch, python, found["tests"], found["result"], f"{found['minutes']:.0f}", found["commit"])
        table.append(f"| {' | '.join(cells)} |")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=list(PAIRS), help="versions of torch (default: all)")
    parser.add_argument("--python", nargs="+", help="versions of Python (default: those that PAIRS has for it)")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "versions", help="where all is installed")
    parser.add_argument("--write", action="store_true", help="put the table into docs/versions.md")
    parser.add_argument("arguments", nargs="*", help="for pytest (default: the whole suite)")
    options = parser.parse_args()

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    failed = False
    for torch, python in ((t, p) for t in options.torch for p in options.python or PAIRS[t]):
        since = time.monotonic()
        result = try_pair(options.folder, python, torch, commit, options.arguments)
        failed |= not re.match(r"\d+ passed", result)
        minutes = (time.monotonic() - since) / 60
        print(f"torch {torch}, Python {python}: {result} ({minutes:.1f} minutes)", flush=True)
        suite = " ".join(options.arguments) or "all"
        results[f"{torch} {python}"] = {"result": result, "tests": suite, "minutes": minutes, "commit": commit}
        kept.write_text(json.dumps(results, indent=1))
    table = "\n".join(rows(results))
    print(table)
    if options.write:
        before, after = TABLE.read_text().split("<!-- table -->")[0], TABLE.read_text().split("<!-- end -->")[1]
        TABLE.write_text(f"{before}<!-- table -->\n{table}\n<!-- end -->{after}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
