"""What nvcc makes of the CUDA sources: they compile plainly, registers and memory accesses are as intended.

Needs no GPU. The flags are setup.py's, with csrc alone on the include path.
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = ("80", "90")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: nothing is known of the CUDA kernels here")

# Registers a thread, in steps of eight as they are given out. At 32 a multiprocessor holds 2048 threads, as many as it
# can; at 48, 1280; at 64, 1024.
MOST_REGISTERS = {
    "affine_kernel": 56,
    "residual_kernel": 48,
    "combine_kernel": 112,
    "stage_kernel": 80,
    "error_kernel": 64,
    "noise_kernel": 32,
    "put_kernel": 40,
    "sum_kernel": 32,
    "control_kernel": 48,
    "marginal_kernel": 48,
    "condition_kernel": 32,
}
MOST_REGISTERS_OF_VECTOR = 48  # where numbers of at most four bytes are read in words of 16: what large arrays run on
MOST_REGISTERS_OF_CHANNELS_LAST = 104  # where every element makes a block of random words: bound by arithmetic

# Arrays that the vector version of a kernel reads and writes.
ARRAYS = {
    "affine_kernel": (("x", "out", "z"), ("mean", "next")),
    "residual_kernel": (("out", "z"), ("grad",)),
    "combine_kernel": (("array",), ("result",)),
    "stage_kernel": (("k", "y", "x", "out"), ("k_new", "result")),
    "error_kernel": (("k", "y0", "y1", "out"), ("k_new",)),
    "put_kernel": (("values",), ("into",)),
    "noise_kernel": ((), ("values",)),
}


# The vector versions of kernels with several results, by their number: every thread keeps a chunk of each, 4 elements
# of float32, and 8 of two bytes or as many registers of float64.
MOST_REGISTERS_BY_RESULTS = {
    "combine_kernel": {1: (48, 48), 2: (64, 80), 3: (64, 80), 4: (64, 104)},
    "stage_kernel": {1: (48, 64), 2: (48, 72), 3: (48, 80), 4: (48, 80)},
}


class Kernel(NamedTuple):
    """One entry point: its name in the source, whether it is the vector version, its storage type as nvcc writes it,
    for how many results, and whether its noise is for channels_last."""

    name: str
    vector: bool
    storage: str
    results: int
    channels_last: bool

    @classmethod
    def of(cls, mangled: str) -> "Kernel":
        name = next(name for name in MOST_REGISTERS if name in mangled)
        found = re.search(
            rf"{name}I(?P<storage>\w*?)Lb(?P<vector>[01])E(Li(?P<results>\d)E|Lb(?P<last>[01])E)?", mangled
        )
        parts = found.groupdict() if found else {}
        results, last = int(parts.get("results") or 1), parts.get("last") == "1"
        return cls(name, parts.get("vector") == "1", parts.get("storage", ""), results, last)

    @property
    def most_registers(self) -> int:
        most = MOST_REGISTERS[self.name]
        if self.channels_last:
            return MOST_REGISTERS_OF_CHANNELS_LAST
        if self.name in MOST_REGISTERS_BY_RESULTS:
            return MOST_REGISTERS_BY_RESULTS[self.name][self.results][self.storage != "f"] if self.vector else most
        # The sum of errors cancels, and is taken in double for every type.
        in_double = self.storage == "d" or self.name == "error_kernel"
        return min(most, MOST_REGISTERS_OF_VECTOR) if self.vector and not in_double else most


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What ptxas reports for each architecture, and "ptx": the code for machines to come."""
    folder = tmp_path_factory.mktemp("cuda_compile")
    flags = ast.literal_eval(re.search(r'nvcc_flags = (\["-.*?\])', (ROOT / "setup.py").read_text())[1])
    running = {}
    for source in SOURCES:
        common = [NVCC, *flags, "-std=c++17", f"-I{ROOT}/csrc", source]
        for arch in ARCHS:
            generate = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-c"]
            running[source, arch] = [*common, *generate, "-o", folder / f"{source.stem}_{arch}.o"]
        running[source, "ptx"] = [*common, "-ptx", "-arch", f"compute_{ARCHS[-1]}", "-o", folder / f"{source.stem}.ptx"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = {key: subprocess.Popen(command, **pipes) for key, command in running.items()}

    found = dict.fromkeys((*ARCHS, "ptx"), "")
    for (source, what), process in running.items():
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert "warning" not in said, said
        found[what] += (folder / f"{source.stem}.ptx").read_text() if what == "ptx" else said
    yield found


def entries(ptx: str) -> Iterator[tuple[Kernel, str]]:
    for part in re.split(r"\.entry ", ptx)[1:]:
        yield Kernel.of(re.match(r"\w+", part)[0]), part.split("\n}\n")[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_registers(arch: str, outputs: dict[str, str]) -> None:
    report = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_\d+'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    kernels = [(Kernel.of(found[1]), *map(int, found.groups()[1:])) for found in report.finditer(outputs[arch])]
    assert {kernel.name for kernel, *_ in kernels} == set(MOST_REGISTERS)
    assert len(kernels) == outputs[arch].count("Compiling entry function")
    for kernel, *memory, registers in kernels:
        assert memory == [0, 0, 0], f"{kernel}: stack frame, spill stores and spill loads are {memory} bytes"
        assert registers <= kernel.most_registers, f"{kernel}: {registers} registers"


def test_arrays_are_read_and_written_in_words_of_16_bytes(outputs: dict[str, str]) -> None:
    vector = [(kernel, code) for kernel, code in entries(outputs["ptx"]) if kernel.vector]
    assert {kernel.name for kernel, _ in vector} == set(ARRAYS)
    for kernel, code in vector:
        reads, writes = ARRAYS[kernel.name]
        reads = tuple(name for name in reads if name != "z" or not kernel.channels_last)  # there z is generated
        words = r"\.global(\.\w+)*\.(v4\.[fub]32|v2\.[fub]64|b128)\s"
        assert len(re.findall("ld" + words, code)) >= len(reads), kernel
        assert len(re.findall("st" + words, code)) >= len(writes), kernel
        # Two bytes at a time are no coefficients, ids or sums: an array has been read or written element by element. (A
        # byte is, where rows are chosen.)
        small = "16" if kernel.name == "put_kernel" else "(8|16)"
        assert not re.search(rf"(ld|st)\.global(\.\w+)*\.[usb]{small}\s", code), kernel


def test_sums_are_added_in_a_fixed_order(outputs: dict[str, str]) -> None:
    assert not re.search(r"\b(atom|red)\.", outputs["ptx"])


def test_products_and_sums_are_rounded_one_by_one(outputs: dict[str, str]) -> None:
    """As on the CPU. (Noise asks for fused multiply-adds by name.)"""
    plain = [
        code
        for kernel, code in entries(outputs["ptx"])
        if kernel.name in ("combine_kernel", "stage_kernel", "error_kernel")
    ]
    assert plain and not any("fma." in code for code in plain)


def test_no_array_lies_in_local_memory(outputs: dict[str, str]) -> None:
    assert not re.search(r"(ld|st)\.local", outputs["ptx"])
