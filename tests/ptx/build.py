"""Builds the driver that runs nvcc's output on the CPU, once a test session.

nvcc compiles csrc/kernels as setup.py does. The driver reads its PTX when it starts. Its host objects, which choose
kernels, grids and arguments, are linked into the driver, and run under the address and undefined-behaviour sanitizers.
"""

import ast
import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "tests" / "ptx"
SOURCES = sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
NVCC_FLAGS: list[str] = [
    "-std=c++17",
    *ast.literal_eval(re.search(r'nvcc_flags = (\["-.*?\])', (ROOT / "setup.py").read_text())[1]),
]
GXX_FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
SANITIZE = ["-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=all"]

# The architectures whose PTX is run, and those that get the same PTX. (nvcc has two compilers: one for architectures up
# to sm_90, another one from sm_100 on.)
ARCHITECTURES = {"90": ("80",), "120": ()}

needs_nvcc = pytest.mark.skipif(
    NVCC is None or shutil.which("g++") is None, reason="no nvcc or no g++: the CUDA kernels are not run here"
)


def ask_nvcc(*arguments: str) -> str:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([NVCC, *arguments], check=True, **pipes).stdout


def toolkit() -> Path:
    """The toolkit's folder: nvcc on PATH may be a link or a script."""
    plan = ask_nvcc("--dryrun", "-x", "cu", os.devnull)
    return Path(re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)[1].strip()).resolve()


def nvcc(source: Path, folder: Path) -> list[str]:
    """The command that makes `folder`/NAME.o, and beside it NAME.compute_90.ptx and its like.

    In all of them kernels have the same names. PTX has the lines of the source, which changes nothing else.
    """
    known = ask_nvcc("--list-gpu-arch").split()
    wanted = [f"compute_{arch}" for first, others in ARCHITECTURES.items() for arch in (first, *others)]
    targets = [f"-gencode=arch={name},code={name}" for name in wanted if name in known]
    keep = ["--keep", "--keep-dir", str(folder), "--threads", "0"]
    flags = [*NVCC_FLAGS, "-lineinfo", "-Xcompiler", ",".join(SANITIZE), f"-I{ROOT}/csrc"]
    return [NVCC, *flags, *targets, *keep, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]


def run_all(commands: list[list[str]]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for process in [subprocess.Popen(command, **pipes) for command in commands]:
        said = process.communicate()[0]
        assert process.returncode == 0, said


def link(driver: Path, objects: list[Path]) -> None:
    run_all([["g++", *SANITIZE, *map(str, objects), "-o", str(driver)]])


def build(folder: Path) -> None:
    includes = [f"-I{HERE}", f"-I{ROOT}/csrc", f"-I{toolkit()}/include"]
    commands = [nvcc(source, folder) for source in SOURCES]
    for source in sorted(HERE.glob("*.cpp")):
        sanitize = SANITIZE if source.stem in ("driver", "runtime") else []  # the machine's own loop would take thrice
        compile_it = [
            "g++",
            *GXX_FLAGS,
            *sanitize,
            *includes,
            "-c",
            str(source),
            "-o",
            str(folder / f"{source.stem}.o"),
        ]
        commands.append(compile_it)
    run_all(commands)
    link(folder / "driver", sorted(folder.glob("*.o")))


def shared_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the driver, the objects and the PTX. Workers of one session share it: the first one builds."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ptx"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "finished").exists():
            build(folder)
            (folder / "finished").touch()
    return folder


def ptx_files(folder: Path, arch: str) -> list[Path]:
    files = [folder / f"{source.stem}.compute_{arch}.ptx" for source in SOURCES]
    if not all(file.exists() for file in files):
        pytest.skip(f"this nvcc makes no PTX for sm_{arch}")
    return files
