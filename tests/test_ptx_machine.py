"""The machine that runs PTX (tests/ptx) finds what it is there to find: every check has a fault that it must see.

First in the kernels as nvcc compiles them, whose PTX is changed at one place; then check by check in a small kernel.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ptx.build import ARCHITECTURES, ROOT, link, needs_nvcc, nvcc, ptx_files, run_all, shared_build
from ptx.kernels import TILE, Fault, Kernels
from torch import Tensor

pytestmark = needs_nvcc


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_build(tmp_path_factory)


# ---- faults in the kernels ----


@pytest.fixture(params=ARCHITECTURES)
def changed(folder: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Kernels]:
    """Gives the kernels with changed PTX: a function of the text of cuda.cu, which must change something."""
    files = ptx_files(folder, request.param)

    def run(change: Callable[[str], str]) -> Kernels:
        source = next(file for file in files if file.name.startswith("cuda."))
        text = source.read_text()
        (tmp_path / "changed.ptx").write_text(change(text))
        assert (tmp_path / "changed.ptx").read_text() != text
        return Kernels(folder / "driver", tmp_path / "changed.ptx")

    return run


def in_kernels(text: str, name: str, pattern: str, replacement: str) -> str:
    """The text with the first match replaced in the bodies of all kernels of this name."""

    def change(kernel: str) -> str:
        if not re.match(rf"\w*{name}\w*\(", kernel):
            return kernel
        changed, n = re.subn(pattern, replacement, kernel, count=1, flags=re.MULTILINE)
        assert n == 1
        return changed

    return ".entry ".join(map(change, text.split(".entry ")))


def squares(kernels: Kernels) -> None:
    """Sums of squares, of several tiles a block, each of which several warps add up."""
    x, partials = torch.randn(2, 8 * TILE), torch.empty(2, 8, dtype=torch.float64)
    arrays, numbers = {"out": x, "c": torch.ones(1)}, kernels.shape(x) | {"weighted_grad": 0}
    kernels.set(largest_grid=1).run("residual", {"partials": partials}, arrays, **numbers)
    torch.testing.assert_close(partials, x.double().square().view(2, 8, TILE).sum(-1))


def mean(kernels: Kernels, x: Tensor, shift: int = 0) -> None:
    result = torch.empty_like(x)
    kernels.set(shift=shift).run("affine", {"mean": result}, {"x": x, "p": torch.ones(1)}, **kernels.shape(x))
    assert torch.equal(result, x)


SYNCTHREADS = [
    i
    for i, line in enumerate((ROOT / "csrc/kernels/cuda_loops.h").read_text().splitlines(), 1)
    if "__syncthreads();" in line
]


FAULT_WITHOUT_BARRIER = r"shared memory.*(a race|nothing wrote there).* at \S*/cuda_loops\.h:\d+"


def test_there_are_barriers() -> None:
    assert len(SYNCTHREADS) == 2


@pytest.mark.parametrize("line", SYNCTHREADS)
def test_a_barrier_left_out(line: int, changed: Callable[..., Kernels]) -> None:
    def change(text: str) -> str:
        file = re.search(r'\.file\s+(\d+)\s+"[^"]*/cuda_loops\.h"', text)[1]
        return re.sub(rf"(\.loc\s+{file} {line} [^\n]*\n)\s*bar\.sync\s+0;", r"\1", text)

    with changed(change) as kernels, pytest.raises(Fault, match=FAULT_WITHOUT_BARRIER):
        squares(kernels)


def test_a_thread_that_leaves_before_a_shuffle(changed: Callable[..., Kernels]) -> None:
    leave = "{ .reg .b32 %i; .reg .pred %five; mov.u32 %i, %tid.x; setp.eq.s32 %five, %i, 5; @%five ret; }"

    def change(text: str) -> str:
        return in_kernels(text, "residual_kernelIfLb1E", r"^\s*shfl\.sync", leave + r"\g<0>")

    with changed(change) as kernels, pytest.raises(Fault, match="a shuffle that a lane of its mask does not reach"):
        squares(kernels)


def test_an_alignment_that_is_not_checked(changed: Callable[..., Kernels]) -> None:
    """The kernel for aligned arrays in the place of the other one."""

    def change(text: str) -> str:
        swap = {"0": "1", "1": "0"}
        return re.sub(r"(\.entry \w*affine_kernelIfLb)([01])", lambda found: found[1] + swap[found[2]], text)

    with changed(change) as kernels:
        mean(kernels, torch.randn(3, 8))
        with pytest.raises(Fault, match=r"reads 16 bytes at byte \d+ of x, .* at a misaligned address"):
            mean(kernels, torch.randn(3, 8), shift=1)


def test_one_element_too_many(changed: Callable[..., Kernels]) -> None:
    def change(text: str) -> str:
        cols = r"ld\.param\.[ub]64\s+(%\w+), \[[^]]*\+16\];"  # after dtype and rows
        return in_kernels(text, "affine_kernelIfLb0E", cols, r"\g<0> add.s64 \1, \1, 1;")

    with changed(change) as kernels, pytest.raises(Fault, match="reads 4 bytes (outside all arrays|.* beyond the end)"):
        mean(kernels, torch.randn(1, 5))


def test_an_array_too_short(folder: Path) -> None:
    with Kernels(folder / "driver", *ptx_files(folder, "90")) as kernels:
        for x, numbers in ((torch.randn(14), (3, 5)), (torch.randn(31), (4, 8))):
            rows, cols = numbers
            result, arrays = torch.empty(rows, cols), {"x": x, "p": torch.ones(1)}
            with pytest.raises(Fault, match="outside all arrays|beyond the end"):
                kernels.run("affine", {"mean": result}, arrays, rows=rows, cols=cols, dtype=0)


def test_an_array_that_nothing_wrote(folder: Path) -> None:
    with Kernels(folder / "driver", *ptx_files(folder, "90")) as kernels:
        x = torch.randn(3, 5)
        results = {"x": x, "mean": torch.empty_like(x)}
        with pytest.raises(Fault, match=r"reads 4 bytes at byte \d+ of x, which has 60: nothing wrote there"):
            kernels.run("affine", results, {"p": torch.ones(1)}, **kernels.shape(x))


# ---- faults in the host's code ----


@pytest.fixture
def changed_loop(folder: Path, tmp_path: Path) -> Callable[[str, str], Kernels]:
    """Gives the driver with another cuda_graph.cu."""

    def build(old: str, new: str) -> Kernels:
        source = (ROOT / "csrc/kernels/cuda_graph.cu").read_text()
        assert old in source
        (tmp_path / "cuda_graph.cu").write_text(source.replace(old, new))
        run_all([nvcc(tmp_path / "cuda_graph.cu", tmp_path)])
        others = set(folder.glob("*.o")) - {folder / "cuda_graph.o"}
        link(tmp_path / "driver", [*others, tmp_path / "cuda_graph.o"])
        return Kernels(tmp_path / "driver", *tmp_path.glob("*90.ptx"))

    return build


def steps_of_loop(kernels: Kernels) -> int:
    flag, count = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    kernels.run("loop", {"flag": flag, "count": count}, {}, enough=5, launches=1)
    return int(count)


def test_a_loop_that_does_not_wait_for_its_step(changed_loop: Callable[[str, str], Kernels]) -> None:
    """The nodes of a graph run in an order that nothing but their dependencies keeps."""
    with changed_loop("body, &stepping, 1, &condition", "body, nullptr, 0, &condition") as kernels:
        assert steps_of_loop(kernels) == 6


def test_a_graph_that_is_not_freed(changed_loop: Callable[[str, str], Kernels]) -> None:
    with pytest.raises(AssertionError, match="LeakSanitizer"), changed_loop("cudaGraphDestroy(whole);", "") as kernels:
        assert steps_of_loop(kernels) == 5


def test_an_access_of_the_host_beyond_an_array(changed_loop: Callable[[str, str], Kernels]) -> None:
    beyond = changed_loop("phGraph_out[0]", "phGraph_out[1]")
    with pytest.raises(AssertionError, match="heap-buffer-overflow"), beyond as kernels:
        steps_of_loop(kernels)


# ---- check by check ----

# A kernel of two arrays of 4-byte words. Thread i has i in %i, and the addresses of its words in %in and %out.
KERNEL = """
.version 9.0
.target sm_90
.address_size 64
.shared .align 8 .b8 shared[256];
.extern .func cudaGraphSetConditional(.param .b64 handle, .param .b32 value);
.func (.param .b32 result) twice(.param .b32 x)
{
  .reg .b32 %r<2>;
  ld.param.u32 %r0, [x];
  add.s32 %r1, %r0, %r0;
  st.param.b32 [result], %r1;
  ret;
}
.visible .entry probe(.param .u64 probe_0, .param .u64 probe_1)
.maxntid 64
{
  .local .align 8 .b8 own[16];
  .reg .pred %p<4>;
  .reg .b32 %i, %s, %r<8>;
  .reg .b64 %in, %out, %rd<8>;
  .reg .f32 %f<4>;
  .reg .f64 %fd<4>;
  ld.param.u64 %in, [probe_0];
  ld.param.u64 %out, [probe_1];
  mov.u32 %i, %tid.x;
  mul.wide.u32 %rd0, %i, 4;
  add.s64 %in, %in, %rd0;
  add.s64 %out, %out, %rd0;
  cvt.u32.u64 %s, %rd0;
  mov.u32 %r7, shared;
  add.s32 %s, %s, %r7;
  setp.lt.u32 %p1, %i, 16;
  BODY
  ret;
}
"""


def run_probe(
    folder: Path, tmp_path: Path, body: str, threads: int = 32, words: int = 64, kernel: str = KERNEL
) -> list[int]:
    """What the kernel writes when it is given the numbers 0, 1, ..."""
    (tmp_path / "probe.ptx").write_text(kernel.replace("BODY", body))
    given, result = torch.arange(words, dtype=torch.int32), torch.empty(threads, dtype=torch.int32)
    with Kernels(folder / "driver", tmp_path / "probe.ptx") as kernels:
        kernels.run("probe", {"1": result}, {"0": given}, grid=1, block=threads)
    return result.tolist()


LOAD, STORE = "ld.global.u32 %r1, [%in];", "st.global.u32 [%out], %r1;"
TO_SHARED, FROM_NEXT = "st.shared.u32 [%s], %i;", "xor.b32 %r2, %i, 1; shl.b32 %r2, %r2, 2; add.s32 %r2, %r2, %r7;"
SHUFFLE = "shfl.sync.down.b32 %r1, %i, 1, 31, -1;"
SHUFFLE_BELOW_16 = "@!%p1 bra L1; shfl.sync.down.b32 %r1, %i, 1, BOUNDS, 65535; L1:"  # of lanes 0 to 15


@pytest.mark.parametrize(
    ("body", "right"),
    [
        (LOAD + STORE, range(32)),
        ("mov.u32 %r1, 7;" + STORE, [7] * 32),
        # Others' words, with a barrier between writing and reading them.
        (TO_SHARED + "bar.sync 0;" + FROM_NEXT + "ld.shared.u32 %r1, [%r2];" + STORE, [i ^ 1 for i in range(32)]),
        (SHUFFLE + STORE, [*range(1, 32), 31]),
        ("shfl.sync.down.b32 %r1|%p2, %i, 8, 31, -1; selp.b32 %r1, 1, 0, %p2;" + STORE, [1] * 24 + [0] * 8),
        # Within segments of 8 lanes.
        ("shfl.sync.down.b32 %r1, %i, 4, 6175, -1;" + STORE, [i + 4 if i % 8 < 4 else i for i in range(32)]),
        ("mov.u32 %r1, 9;" + SHUFFLE_BELOW_16.replace("BOUNDS", "4127") + STORE, [*range(1, 16), 15] + [9] * 16),
        ("mov.u64 %rd1, own; st.local.u32 [%rd1+8], %i; ld.local.u32 %r1, [%rd1+8];" + STORE, range(32)),
        ("{ .param .b32 a; st.param.b32 [a], %i; .param .b32 b; call.uni (b), twice, (a); ld.param.b32 %r1, [b]; }"
         + STORE, range(0, 64, 2)),
        ("mov.u32 %r1, 0; L1: add.s32 %r1, %r1, 3; setp.lt.u32 %p2, %r1, %i; @%p2 bra L1;" + STORE,
         [max(3, -(-i // 3) * 3) for i in range(32)]),
    ],
    ids=["copy", "constant", "barrier", "shuffle", "inside", "segments", "half a warp", "local", "call", "loop"],
)  # fmt: skip
def test_what_is_right_is_run(body: str, right: list[int], folder: Path, tmp_path: Path) -> None:
    assert run_probe(folder, tmp_path, body) == list(right)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("ld.global.u32 %r1, [%in+256];", "reads 4 bytes outside all arrays"),
        ("ld.global.u32 %r1, [%in+-4];", "outside all arrays"),
        ("mov.u64 %rd1, 0; st.global.u32 [%rd1], %i;", "writes 4 bytes outside all arrays"),
        ("and.b64 %rd1, %in, -16; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+208];",
         "reads 16 bytes at byte 240 of 0, which has 252: beyond the end"),
        ("ld.global.v2.u32 {%r1, %r2}, [%in];", "reads 8 bytes at byte .*: at a misaligned address"),
        ("ld.global.u32 %r1, [%out];", "reads 4 bytes at byte .* of 1, which has 256: nothing wrote there"),
        ("sub.s64 %rd1, %out, %rd0; st.global.u32 [%rd1], %i;", "of 1, .*: a race, another thread writes there"),
        (LOAD + "st.global.u32 [%in+4], %r1;", "a race, another thread (reads|writes) there"),
        (LOAD + "bar.sync 0; st.global.u32 [%in+4], %r1;", "a race, another thread reads there"),
        ("st.global.u32 [%out], %i; bar.sync 0; @%p1 ld.global.u32 %r1, [%out+4];",
         "a race, another thread writes there"),
        ("st.shared.u32 [%s+256], %i;", "of shared memory, which has 256: beyond the end"),
        ("st.shared.u64 [%s], %rd1;", "reads a register that nothing wrote"),
        ("st.shared.v2.u32 [%s], {%i, %i};", "of shared memory, .*: at a misaligned address"),
        ("ld.shared.u32 %r1, [%s];", "of shared memory, .*: nothing wrote there"),
        (TO_SHARED + FROM_NEXT + "ld.shared.u32 %r1, [%r2];", "of shared memory, .*: (a race|nothing wrote there)"),
        (TO_SHARED + "bar.sync 0;" + FROM_NEXT + "ld.shared.u32 %r1, [%r2];" + TO_SHARED,
         "of shared memory, .*: a race, another thread (reads|writes) there"),
        ("st.shared.u32 [%r7], %i;", "writes 4 bytes at byte 0 of shared memory, .*: a race, another thread writes"),
        ("mov.u64 %rd1, own; ld.local.u32 %r1, [%rd1];", "of local memory, which has 16: nothing wrote there"),
        ("mov.u64 %rd1, own; st.local.u32 [%rd1+16], %i;", "of local memory, which has 16: beyond the end"),
        ("ld.param.u64 %rd1, [probe_1+8];", "of the parameters, which has 16: beyond the end"),
        ("ld.param.u64 %rd1, [probe_0+4];", "of the parameters, .*: at a misaligned address"),
        ("mov.u32 %r1, %r2;", "reads a register that nothing wrote"),
        ("@%p2 ret;", "reads a register that nothing wrote"),
        ("@%p1 bar.sync 0;", "waits at a barrier that another thread does not reach"),
        ("@%p1 bra L1; bar.sync 0; bra L2; L1: bar.sync 0; L2:",
         "waits at a barrier while another thread waits at another one"),
        ("bar.sync 1;", "waits at a barrier that is not the block's own"),
        ("@%p1 ret;" + SHUFFLE, "waits at a shuffle that a lane of its mask does not reach"),
        ("@%p1 bar.sync 0;" + SHUFFLE + "bar.sync 0;", "waits at a shuffle that a lane of its mask does not reach"),
        ("@%p1 bra L1;" + SHUFFLE + "bra L2; L1:" + SHUFFLE + "L2:", "shuffles with lanes that are at another shuffle"),
        ("selp.b32 %r2, -1, -65536, %p1; shfl.sync.down.b32 %r1, %i, 1, 31, %r2;", "lanes that are at another shuffle"),
        ("shfl.sync.down.b32 %r1, %i, 1, 4127, 65535;", "shuffles and is not in its own mask"),
        (SHUFFLE_BELOW_16.replace("BOUNDS", "31"), "shuffles the value of a lane outside its mask"),
        ("div.u32 %r1, 7, 0;", "divides by zero"),
        ("{ .param .b32 a; st.param.b32 [a+4], %i; }", "writes a part of an argument"),
        ("{ .param .b32 a; st.param.b32 [a], %i; ld.param.b32 %r1, [a+4]; }", "reads a part of an argument"),
        ("call.uni cudaGraphSetConditional, (0, %i);", "sets a condition that does not exist"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_fault(body: str, says: str, folder: Path, tmp_path: Path) -> None:
    """With the place of the PTX, and the thread."""
    with pytest.raises(Fault, match=says + r".*at \(\S*probe\.ptx:\d+\), block \(0, 0\), thread \(\d+, 0\) of probe"):
        run_probe(folder, tmp_path, body, threads=64 if "of 1," in says else 32, words=63)


def test_a_shuffle_with_lanes_that_the_block_does_not_have(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="shuffles with lanes that the block does not have"):
        run_probe(folder, tmp_path, SHUFFLE, threads=31)


def test_a_launch_of_too_many_threads(folder: Path, tmp_path: Path) -> None:
    assert len(run_probe(folder, tmp_path, LOAD + STORE, threads=64)) == 64
    with pytest.raises(AssertionError, match="probe: error 9"):  # cudaErrorInvalidConfiguration
        run_probe(folder, tmp_path, LOAD + STORE, threads=65)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        # Other roundings than one by one, to nearest.
        ("add.f32 %f1, %f2, %f3;", "does not know the instruction add.f32"),
        ("mul.f64 %fd1, %fd2, %fd3;", "does not know the instruction mul.f64"),
        ("fma.rz.f32 %f1, %f2, %f3, %f1;", "does not know the instruction fma.rz.f32"),
        ("add.rn.ftz.f32 %f1, %f2, %f3;", "does not know the instruction add.rn.ftz.f32"),
        ("add.sat.s32 %r1, %r2, %r3;", "does not know the instruction add.sat.s32"),
        ("cvt.rni.s32.f32 %r1, %f2;", "does not know the instruction cvt.rni.s32.f32"),
        ("atom.global.add.u32 %r1, [%out], 1;", "does not know the instruction atom.global.add.u32"),
        ("ld.u32 %r1, [%in];", "does not know the instruction ld.u32"),
        ("ld.global.nc.f32 %f1, [%in];", "does not know the instruction ld.global.nc.f32"),
        ("exit;", "does not know the instruction exit"),
        ("mov.u32 %r1, %laneid;", "does not know the operand %laneid"),
        ("mov.u32 %r1, %r8;", "does not know the operand %r8"),
        ("mov.u32 %r1, 0f3F800000;", "a number of another type"),
        ("mov.f32 %f1, 1;", "a number of another type"),
        ("bra nowhere;", "no label nowhere"),
        ("call.uni (%r1), thrice, (%i);", "a call of thrice, which is not declared"),
        ("call.uni (%r1), twice, (%i, %i);", "a call with other arguments"),
        (".shared .align 4 .b8 more[4];", "does not know .shared"),
        ("add.s32 %r1, %r2, %r3, %r4, %r5, %r6, %r7;", "too many operands"),
        ("add.s32 %r1, %r2;", "another number of operands than add.s32 has"),
        ("add.s32 1, %r2, %r3;", "a result that is no register"),
        ("add.s32 %r1 %r2, %r3;", "operands that cannot be read"),
        ("@1 ret;", "a guard that is no register"),
        ("mov.u32 %r1, 12z;", "a number that is none"),
        ("ld.global.u32 %r1, [%in;", "expected ] before ;"),
        (".reg .b32 %q<many>;", "text that cannot be read"),
        (".reg .b128 %q;", "does not know the type .b128"),
    ],
)  # fmt: skip
def test_what_the_machine_does_not_know_it_refuses(body: str, says: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"probe\.ptx:\d+: .*{re.escape(says)}"):
        run_probe(folder, tmp_path, body)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (".visible", ".global .align 4 .b8 variable[4];\n.visible", "does not know .global"),
        (".extern", ".extern .func elsewhere(.param .b32 x);\n.extern", "elsewhere is nowhere defined"),
        (") twice(", ") probe(", "a second probe"),
        ("twice(.param .b32 x)", "twice(.param .align 8 .b8 x[16])", "an argument of more than a register"),
        ("  .reg .b32 %r<2>;", "  .local .align 8 .b8 own[16];", "does not know .local"),
        ("  ret;\n}\n", "  ret;\n", "the file ends too early"),
        (".maxntid 64", ".minnctapersm 2", "expected { before .minnctapersm"),
    ],
)
def test_a_file_that_the_machine_does_not_know(old: str, new: str, says: str, folder: Path, tmp_path: Path) -> None:
    kernel = new.join(KERNEL.rsplit(old, 1))
    assert kernel != KERNEL
    with pytest.raises(AssertionError, match=rf"probe\.ptx(:\d+)?: .*{re.escape(says)}"):
        run_probe(folder, tmp_path, "", kernel=kernel)


# Results as PTX defines them where C++ or plain habit say otherwise.
RESULTS = [
    ("shl.b32 %r1, 1, 32;", 0),
    ("shr.u32 %r1, -1, 33;", 0),
    ("shr.s32 %r1, -8, 40;", -1),
    ("shr.s32 %r1, -8, 1;", -4),
    ("div.s32 %r1, -7, 2;", -3),
    ("rem.s32 %r1, -7, 2;", -1),
    ("div.s32 %r1, -2147483648, -1;", -2147483648),
    ("add.s32 %r1, 2147483647, 1;", -2147483648),
    ("mul.hi.u32 %r1, -1, -1;", -2),
    ("mul.hi.s32 %r1, -1, -1;", 0),
    ("neg.s32 %r1, -2147483648;", -2147483648),
    ("min.s32 %r1, -1, 1;", -1),
    ("min.u32 %r1, -1, 1;", 1),
    ("prmt.b32 %r1, 0x11223344, 0x55667788, 0x5431U;", 0x77881133),
    ("prmt.b32 %r1, 0x11223344, 0x55667788, 0x54BCU;", 0x778800FF),
    ("mov.f32 %f1, 0f7FC00000; min.f32 %f1, %f1, 0f3F800000; mov.b32 %r1, %f1;", 0x3F800000),
    ("mov.f32 %f1, 0f80000000; max.f32 %f1, %f1, 0f00000000; mov.b32 %r1, %f1;", 0),
    ("mov.f32 %f1, 0f7FC00000; setp.ne.f32 %p2, %f1, %f1; selp.b32 %r1, 1, 0, %p2;", 0),
    ("mov.f32 %f1, 0f7FC00000; setp.neu.f32 %p2, %f1, %f1; selp.b32 %r1, 1, 0, %p2;", 1),
    ("mov.f32 %f1, 0f7FC00000; setp.ltu.f32 %p2, %f1, %f1; selp.b32 %r1, 1, 0, %p2;", 1),
    ("mov.f32 %f1, 0fFFC00000; abs.f32 %f1, %f1; mov.b32 %r1, %f1;", 0x7FC00000),
    ("cvt.rn.f32.u32 %f1, -1; mov.b32 %r1, %f1;", 0x4F800000),
    ("cvt.rn.f32.s32 %f1, 16777217; mov.b32 %r1, %f1;", 0x4B800000),
    ("cvt.rzi.f64.f64 %fd1, 0dBFF8000000000000; cvt.rn.f32.f64 %f1, %fd1; mov.b32 %r1, %f1;", 0xBF800000 - 2**32),
    ("mov.f32 %f1, 0f3F800001; fma.rn.f32 %f1, %f1, %f1, 0fBF800002; mov.b32 %r1, %f1;", 0x28800000),
    ("mov.f32 %f1, 0f3F800001; mul.rn.f32 %f1, %f1, %f1; add.rn.f32 %f1, %f1, 0fBF800002; mov.b32 %r1, %f1;", 0),
    ("cvt.s64.s32 %rd1, -2; { .reg .b32 %low; mov.b64 {%low, %r1}, %rd1; }", -1),
    ("cvt.u64.u32 %rd1, -2; { .reg .b32 %low; mov.b64 {%low, %r1}, %rd1; }", 0),
    ("mov.b64 %rd1, {1, 2}; cvt.u32.u64 %r1, %rd1;", 1),
    ("mov.u32 %r1, 70000; { .reg .b16 %h; cvt.u16.u32 %h, %r1; cvt.u32.u16 %r1, %h; }", 70000 - 65536),
    ("mov.pred %p2, -1; @!%p2 bra L1; mov.u32 %r1, 5; L1:", 5),
]  # fmt: skip


@pytest.mark.parametrize(("body", "right"), RESULTS, ids=[body.split(" ")[0] for body, _ in RESULTS])
def test_results(body: str, right: int, folder: Path, tmp_path: Path) -> None:
    assert run_probe(folder, tmp_path, body + STORE, threads=1) == [right]
