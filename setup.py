"""Builds the extension module scoresde_ext._C: C++ always, CUDA where nvcc is found. The rest is in pyproject.toml.

Environment: SCORESDE_EXT_CUDA=0|1 decides about CUDA by hand, TORCH_CUDA_ARCH_LIST names the architectures, MAX_JOBS
limits the compilers that run at once.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup

SETUPTOOLS_NEEDED = 77
TORCH_NEEDED = (2, 11)
CUDA_GENERATIONS = (7, 8, 9, 10, 12)  # majors of the architectures that are compiled by default

# Before setup() reads pyproject.toml, of which an older one says in a hundred lines that it does not understand it.
if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_NEEDED:
    sys.exit(
        f"Building scoresde_ext needs setuptools >= {SETUPTOOLS_NEEDED}, and this environment has "
        f'{setuptools.__version__}: run `pip install "setuptools>={SETUPTOOLS_NEEDED}" ninja`, then '
        "`pip install --no-build-isolation .`"
    )
try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "Building scoresde_ext needs the torch it will run with, and this build environment has none (pip's build "
        "isolation hides an installed one): run `pip install torch`, then `pip install --no-build-isolation .`"
    )
TORCH_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
if TORCH_VERSION < TORCH_NEEDED:
    sys.exit(
        f"Building scoresde_ext needs torch >= {'.'.join(map(str, TORCH_NEEDED))}, and this environment has "
        f"{torch.__version__}: run `pip install --upgrade torch`, then `pip install --no-build-isolation .`"
    )

# The sources are C++17, and compiled so wherever torch's headers can be.
CXX_STANDARD = "-std=c++17" if TORCH_VERSION < (2, 14) else "-std=c++20"


class Nvcc(NamedTuple):
    """A CUDA compiler, as it describes itself."""

    version: str  # "13.0"
    home: str
    library_dirs: list[str]
    archs: str  # what it answers to --list-gpu-arch


def find_nvcc() -> Nvcc | None:
    """CUDA_HOME decides if it is set; then PATH, then /usr/local/cuda. A CPU-only torch does not search by itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = os.path.join(home, "bin", "nvcc")
    else:
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        return None

    def ask(*arguments: str) -> str:
        return subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    release = re.search(r"release (\d+\.\d+)", ask("--version"))
    # nvcc on PATH may be a link or a script somewhere else: a dry run tells where the toolkit and its libraries are.
    plan = ask("--dryrun", "-x", "cu", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if release is None or top is None:
        sys.exit(f"{nvcc} does not answer as a CUDA compiler: mend it, or build for the CPU with SCORESDE_EXT_CUDA=0")
    toolkit = os.path.realpath(top[1].strip())
    candidates = [*re.findall(r'"-L([^"]+)"', plan), f"{toolkit}/lib64", f"{toolkit}/lib"]
    return Nvcc(
        version=release[1],
        home=toolkit,
        # Empty for a distribution's own package, whose libraries lie where the linker looks anyway.
        library_dirs=[os.path.realpath(d) for d in candidates if os.path.exists(f"{d}/libcudart_static.a")][:1],
        archs=ask("--list-gpu-arch"),
    )


def wanted_nvcc() -> Nvcc | None:
    """The compiler to build CUDA with, or None for a build without CUDA."""
    choice = os.environ.get("SCORESDE_EXT_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"SCORESDE_EXT_CUDA must be 0 or 1, or unset to build CUDA where nvcc is found; it is {choice!r}")
    if choice == "0":
        return None
    nvcc = find_nvcc()
    if choice == "1" and nvcc is None:
        sys.exit(
            "SCORESDE_EXT_CUDA=1 asks for CUDA, but there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda: "
            "install the CUDA toolkit, or point CUDA_HOME at it, or build for the CPU with SCORESDE_EXT_CUDA=0"
        )
    return nvcc


def default_archs(listed: str) -> list[str]:
    """The architectures to compile for, in torch's notation, by an nvcc that answers ``listed`` to --list-gpu-arch.

    The first one of each generation: its code also runs on the later ones (8.0 on 8.6 and 8.9, 12.0 on 12.1). Every
    other GPU, Tegra's and those to come, compiles the PTX of the oldest when the extension is first used. An
    architecture takes one core a quarter of a minute and adds 2 MB.
    """
    first: dict[int, int] = {}
    for major, minor in sorted((int(major), int(minor)) for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed)):
        first.setdefault(major, minor)
    archs = [f"{major}.{first[major]}" for major in CUDA_GENERATIONS if major in first]
    if not archs:
        sys.exit(
            "nvcc --list-gpu-arch names no architecture of compute capability 7.0 or later: set TORCH_CUDA_ARCH_LIST "
            "to that of your GPU, or build for the CPU with SCORESDE_EXT_CUDA=0"
        )
    return [f"{archs[0]}+PTX", *archs[1:]]


def arch_flags(archs: list[str]) -> list[str]:
    """nvcc's flags for architectures: what torch makes of TORCH_CUDA_ARCH_LIST, but a torch older than the nvcc refuses
    architectures that it does not know."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}", f"compute_{number}"] if arch.endswith("+PTX") else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def check_compiler() -> None:
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(shlex.split(compiler)[0]) is None:
        sys.exit(f"Building scoresde_ext needs a C++ compiler, and there is no {compiler}: install g++, or set CXX")
    headers = sysconfig.get_path("include")
    if not os.path.exists(f"{headers}/Python.h"):
        sys.exit(
            f"Building scoresde_ext needs Python's headers, and {headers} has no Python.h: install them (python3-dev, "
            "python3-devel), or use a Python that has them"
        )


def forget_stale_cuda(build_temp: str) -> None:
    """Removes the objects of .cu files older than a header: torch tracks those only where it has CUDA itself."""
    changed = max(map(os.path.getmtime, glob("csrc/*/*.h") + glob("csrc/*/*.cuh")))
    for source in glob("csrc/kernels/*.cu"):
        compiled = Path(build_temp, source).with_suffix(".o")
        if compiled.exists() and compiled.stat().st_mtime < changed:
            compiled.unlink()


class BuildExtension(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        # Editable installs would compile in a folder that is thrown away, so that every rebuild started from nothing.
        self.build_temp = self.build_temp or f"build/{sys.implementation.cache_tag}"
        super().finalize_options()

    def build_extensions(self) -> None:
        check_compiler()
        forget_stale_cuda(self.build_temp)
        super().build_extensions()


def extension() -> Extension:
    sources = sorted(glob("csrc/torch/*.cpp") + glob("csrc/kernels/*.cpp"))
    # No contraction: products and sums are fused where the source says so, never by the compiler's own choice.
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0", "-Wall"]
    macros, nvcc_flags, libraries, library_dirs = [], [], [], []
    # at::parallel_for is compiled into its callers, and is a plain loop without this. The OpenMP library is the one
    # that torch brings and has loaded: another would be a second pool of threads, of which torch knows nothing.
    if "backend: OpenMP" in torch.__config__.parallel_info() and sys.platform == "linux":
        flags.append("-fopenmp")

    nvcc = wanted_nvcc()
    if nvcc is not None:
        if torch.version.cuda and torch.version.cuda.split(".")[0] != nvcc.version.split(".")[0]:
            print(
                f"warning: nvcc is of CUDA {nvcc.version} and torch {torch.__version__} of CUDA {torch.version.cuda}: "
                "building all the same, and the driver must be new enough for both",
                file=sys.stderr,
            )
            # torch refuses where the majors differ, for extensions that link its CUDA libraries. This one does not.
            cpp_extension._check_cuda_version = lambda *_: None
        cpp_extension.CUDA_HOME = nvcc.home
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")  # torch turns it into flags
        archs = wanted or ";".join(default_archs(nvcc.archs))
        sources += sorted(glob("csrc/kernels/*.cu"))
        macros = [
            "-DSCORESDE_EXT_WITH_CUDA",
            f'-DSCORESDE_EXT_NVCC="{nvcc.version}"',
            f'-DSCORESDE_EXT_CUDA_ARCHS="{archs}"',
        ]
        nvcc_flags = ["-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden"]
        libraries = ["cudart_static", "rt", "dl", "pthread"]
        library_dirs = nvcc.library_dirs
        if not wanted:
            nvcc_flags += arch_flags(archs.split(";"))

    return cpp_extension.CppExtension(
        "scoresde_ext._C",
        sources,
        include_dirs=[os.path.abspath("csrc")],
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args={"cxx": [CXX_STANDARD, *flags, *macros], "nvcc": [CXX_STANDARD, *nvcc_flags]},
    )


# ninja, from pip, stands beside the interpreter; its folder is on PATH only where the environment was activated.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)

setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
