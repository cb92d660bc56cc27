"""Builds the extension for the GPU that is here; for the CPU where that cannot be done."""

from __future__ import annotations

import os
import re
import sys

from ..machine import cores
from .groups import GRACE, called
from .reporting import Failed, Report

COMMAND = (sys.executable, "setup.py", "build_ext", "--inplace")
FOR_THE_CPU = 25.0  # seconds of the budget that are kept for a build without CUDA
# What compilers, linkers and Python say when they give up; `-Werror` of a command line is none of it.
ERROR = re.compile(
    r"(^|[\s:)])(fatal )?error\s*:|^nvcc fatal|cannot find -l|undefined reference|^\w*Error: ", re.MULTILINE
)


def build(report: Report) -> None:
    if report.rehearse:
        import scoresde_ext  # noqa: F401

        print("   a rehearsal uses the extension as it is")
        return
    error = why_no_cuda(report) or compiled("1", report.seconds_left - FOR_THE_CPU)
    if error:
        print(f"   no CUDA: {error}\n   building for the CPU", flush=True)
        report.result("build with CUDA", failed=error)
        second = compiled("0", report.seconds_left - GRACE - 1)
        raise Failed(f"{error}; {f'and for the CPU: {second}' if second else 'built for the CPU'}")


def why_no_cuda(report: Report) -> str:
    """Why torch can use no GPU here; empty where it can."""
    try:
        import torch
    except Exception as error:
        return f"torch cannot be imported ({error})"
    report.fact(torch=torch.__version__, torch_cuda=torch.version.cuda)
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; --rehearse runs what a CPU can"
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    report.fact(torch_gpu=torch.cuda.get_device_name(), capability=capability, cudnn=torch.backends.cudnn.version())
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    return ""


def compiled(cuda: str, seconds: float) -> str:
    """Builds in place, on all cores, with CUDA or (``"0"``) without; the first error, empty where there was none."""
    environment = {"SCORESDE_EXT_CUDA": cuda, "MAX_JOBS": str(cores() or 1)}
    ended, said = called(COMMAND, seconds, **environment)
    if ended.late:
        return f"the build was not done after {seconds:.0f} s"
    return first_error(said) if ended.status else ""


def first_error(said: str) -> str:
    """The first line of a build's output that is an error, or else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next(filter(ERROR.search, lines), lines[-1] if lines else "the build failed and said nothing")[:500]
