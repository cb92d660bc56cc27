"""What machine this is, without torch: its import can take longer than everything here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence

from ..machine import cores, processor, version
from .reporting import Report

PACKAGES = (
    "torch", "triton", "numpy", "scipy", "tqdm", "torchdiffeq", "torchode", "setuptools", "ninja", "pytest",
)  # fmt: skip
GPU = ("name", "driver_version", "compute_cap", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem")
NOW = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def facts(report: Report) -> None:
    report.fact(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor(),
        cores=cores(),
        packages={name: version(name) for name in PACKAGES},
        tools={name: tool(name) for name in ("nvcc", "ncu", "compute-sanitizer", "ninja")},
        compiler=first_line(os.environ.get("CXX", "c++"), "--version"),
    )
    if (nvcc := tool("nvcc")) is not None:
        report.fact(nvcc=next((line for line in said(nvcc, "--version").splitlines() if "release" in line), None))
    if report.rehearse:
        return
    found = ask_gpu(GPU + NOW)
    report.fact(nvidia_smi=found or "missing, or it gave no answer")
    if found:
        report.fact(gpu=found["name"])


def state_of_gpu(report: Report) -> None:
    """Clocks and power as they are, to be noted beside what was measured."""
    if not report.rehearse:
        report.result("GPU after the measurements", nvidia_smi=ask_gpu(NOW))


def ask_gpu(fields: Sequence[str]) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where it says nothing."""
    answer = said("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()
    values = answer[0].split(", ") if answer else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def said(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or it fails, or takes long."""
    try:
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=3)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def first_line(*command: str) -> str | None:
    return next(iter(said(*command).splitlines()), None)


def tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is: on PATH, or in CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(f"{home}/bin/{name}")
