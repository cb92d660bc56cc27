"""What nvcc makes of the CUDA sources: they compile plainly, registers and memory accesses are as intended.

Needs no GPU. The flags are setup.py's, with csrc alone on the include path.
"""

import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from ptx.build import NVCC, NVCC_FLAGS, ROOT, SOURCES

# The code is the same for all architectures. nvcc's first stage makes the same PTX of it for all of a family, by which
# the family is called; the second, ptxas, is run for each architecture.
FAMILIES = {"75": ("75", "80", "90"), "100": ("100", "120")}
FAMILY_OF = {arch: family for family, archs in FAMILIES.items() for arch in archs}

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: nothing is known of the CUDA kernels here")

# Registers a thread, in steps of eight as they are given out. At 32 a multiprocessor holds 2048 threads, as many as it
# can; at 48, 1280; at 64, 1024.
MOST_REGISTERS = {
    "affine_kernel": 56,
    "residual_kernel": 40,
    "combine_kernel": 104,
    "stage_kernel": 80,
    "error_kernel": 64,
    "noise_kernel": 32,
    "put_kernel": 40,
    "sum_kernel": 32,
    "control_kernel": 48,
    "marginal_kernel": 40,
    "condition_kernel": 32,
}
FREE_REGISTERS = {"75": 64, "120": 40}  # these hold 1024 and 1536 threads at most, with so many registers each

# Where numbers of at most four bytes are read in words of 16: what large arrays run on.
MOST_REGISTERS_OF_VECTOR = {"75": 48, "100": 56}
# Where every element makes a block of random words: bound by arithmetic.
MOST_REGISTERS_OF_CHANNELS_LAST = {"75": 104, "100": 64}

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


# The vector versions of kernels with several results, from one to four: every thread keeps a chunk of each, 4 elements
# of float32 (the first number), and 8 of two bytes or as many registers of float64 (the second).
MOST_REGISTERS_BY_RESULTS = {
    ("combine_kernel", "75"): ((48, 48), (64, 80), (64, 80), (64, 80)),
    ("combine_kernel", "100"): ((48, 48), (64, 80), (64, 80), (64, 96)),
    ("stage_kernel", "75"): ((48, 64), (48, 72), (48, 80), (48, 80)),
    ("stage_kernel", "100"): ((48, 64), (48, 64), (64, 80), (64, 88)),
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

    def most_registers(self, arch: str) -> int:
        family = FAMILY_OF[arch]
        if self.channels_last:
            most = MOST_REGISTERS_OF_CHANNELS_LAST[family]
        elif self.vector and (self.name, family) in MOST_REGISTERS_BY_RESULTS:
            most = MOST_REGISTERS_BY_RESULTS[self.name, family][self.results - 1][self.storage != "f"]
        elif self.vector and self.storage != "d" and self.name != "error_kernel":  # whose sum is in double
            most = min(MOST_REGISTERS[self.name], MOST_REGISTERS_OF_VECTOR[family])
        else:
            most = MOST_REGISTERS[self.name]
        return max(most, FREE_REGISTERS.get(arch, 0))


class Compiled(NamedTuple):
    """What ptxas says, by architecture, and the PTX, by family."""

    reports: dict[str, str]
    ptx: dict[str, str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("cuda_compile")
    running = {}
    for source in SOURCES:
        for family, archs in FAMILIES.items():
            kept = folder / f"{source.stem}_{family}"
            kept.mkdir()
            codes = ",".join(f"sm_{arch}" for arch in archs)
            generate = ["-gencode", f"arch=compute_{family},code=[{codes}]", "-Xptxas", "-v", "-fatbin"]
            keep = ["--keep", "--keep-dir", kept, "-o", kept / "fatbin"]
            command = [NVCC, *NVCC_FLAGS, f"-I{ROOT}/csrc", source, *generate, *keep]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running[family, kept / f"{source.stem}.ptx"] = subprocess.Popen(command, **pipes)

    found = Compiled(dict.fromkeys(FAMILY_OF, ""), dict.fromkeys(FAMILIES, ""))
    for (family, ptx), process in running.items():
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert "warning" not in said, said
        found.ptx[family] += ptx.read_text()
        for report in re.split(r"(?=ptxas info\s*: Compiling entry function)", said)[1:]:
            found.reports[re.search(r"for 'sm_(\d+)'", report)[1]] += report
    return found


@pytest.fixture(params=FAMILIES)
def ptx(request: pytest.FixtureRequest, compiled: Compiled) -> str:
    return compiled.ptx[request.param]


def entries(ptx: str) -> Iterator[tuple[Kernel, str]]:
    for part in re.split(r"\.entry ", ptx)[1:]:
        yield Kernel.of(re.match(r"\w+", part)[0]), part.split("\n}\n")[0]


@pytest.mark.parametrize("arch", FAMILY_OF)
def test_registers(arch: str, compiled: Compiled) -> None:
    report = re.compile(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", re.DOTALL)
    kernels = [(Kernel.of(name), int(registers)) for name, registers in report.findall(compiled.reports[arch])]
    assert {kernel.name for kernel, _ in kernels} == set(MOST_REGISTERS)
    assert len(kernels) == compiled.ptx[FAMILY_OF[arch]].count(".entry ")
    for kernel, registers in kernels:
        assert registers <= kernel.most_registers(arch), f"{kernel}: {registers} registers"


@pytest.mark.parametrize("arch", FAMILY_OF)
def test_nothing_lies_in_local_memory(arch: str, compiled: Compiled) -> None:
    """Neither an array nor a register that was one too many, be it of a kernel or of a function that it calls."""
    memory = re.compile(r"properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill")
    found = memory.findall(compiled.reports[arch])
    assert len(found) >= compiled.reports[arch].count("Compiling entry function") > 0
    assert {name: sizes for name, *sizes in found if sizes != ["0", "0", "0"]} == {}
    assert not re.search(r"\.local\b", compiled.ptx[FAMILY_OF[arch]])


def test_every_access_names_its_memory(ptx: str) -> None:
    """An address of which the compiler does not know that makes a slower one, and might be one of local memory."""
    accesses = set(re.findall(r"^\s+(?:@!?%p\d+ )?(?:ld|st)\.(\w+)", ptx, re.MULTILINE))
    assert accesses == {"global", "param", "shared"}


def test_code_is_the_same_for_all_architectures() -> None:
    """Or a family would not have the same PTX."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"__CUDA_ARCH(_\w*)?__(?!\))", path.read_text()), path


def test_arrays_are_read_and_written_in_words_of_16_bytes(ptx: str) -> None:
    vector = [(kernel, code) for kernel, code in entries(ptx) if kernel.vector]
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


def test_chosen_rows_are_copied_bit_for_bit(ptx: str) -> None:
    """NaNs too, which a conversion to float32 and back would change: the two types of two bytes have the same code."""
    copies = [(kernel, code) for kernel, code in entries(ptx) if kernel.name == "put_kernel"]
    bf16, f16 = (
        {kernel.vector: re.sub(r"_Z\w+|BB\d+", "", code) for kernel, code in copies if name in kernel.storage}
        for name in ("bf16", "3f16")
    )
    assert set(bf16) == {False, True} and bf16 == f16


def test_sums_are_added_in_a_fixed_order(ptx: str) -> None:
    assert not re.search(r"\b(atom|red)\.", ptx)


def test_products_and_sums_are_rounded_one_by_one(ptx: str) -> None:
    """As on the CPU. (Noise asks for fused multiply-adds by name.)"""
    plain = [code for kernel, code in entries(ptx) if kernel.name in ("combine_kernel", "stage_kernel", "error_kernel")]
    assert plain and not any("fma." in code for code in plain)
