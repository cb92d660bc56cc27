"""The counter-based noise: which numbers, from which streams, the same however they are computed, and random."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_table import Results, all_arguments, check, results_of_all
from scipy import stats
from torch import Tensor

from scoresde_ext import _C, noise, ops, reference

KEY = torch.tensor([0x0123456789ABCDEF, 3])
LAWS = {
    "normal": lambda f, *a: f.noise_normal(*a),
    "uniform": lambda f, *a: f.noise_uniform(*a),
    "integers": lambda f, *a: f.noise_integers(*a, 1000),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())


# --- which numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """Philox4x32-10 as published with Random123. In the kernels, where arguments reach the counter."""
    assert tuple(int(w) for w in reference.philox([torch.tensor([c]) for c in counter], key)) == words
    block, draw, id_low, id_high = counter
    if block == 0:  # the first block of a stream; integers below 2^32 are the words themselves
        seed, ids = key[0] + (key[1] << 32), torch.tensor([id_low + (id_high << 32)])
        assert ops.noise_integers(torch.tensor([seed, draw]), ids, 0, (1, 4), 2**32).tolist() == [list(words)]


@pytest.mark.parametrize("ids", [None, [0, 5, -1, 2**62, -(2**63)]], ids=["numbers", "ids"])
@pytest.mark.parametrize("key", [(0, 0), (-1, 2**32 - 2), (2**63 - 1, 2**61), (-(2**63), 7)], ids=str)
def test_words_are_the_references(key: tuple[int, int], ids: list[int] | None) -> None:
    """Every argument counts with all its bits: seed and id with 64, the number of the draw with 32."""
    keys, streams = torch.tensor(key), None if ids is None else torch.tensor(ids)
    for draw in (0, 1, 5, 2**33 + 1):
        for size in ((5, 9), (5,), (5, 2, 1027)):
            for high in (1, 2, 3, 1000, 2**31 + 1, 2**32):
                got = ops.noise_integers(keys, streams, draw, size, high)
                assert got.dtype == torch.int64 and got.shape == size
                assert torch.equal(got, reference.noise_integers(keys, streams, draw, size, high))
            uniform = ops.noise_uniform(keys, streams, draw, size)
            assert uniform.dtype == torch.float32
            assert torch.equal(uniform, reference.noise_uniform(keys, streams, draw, size))
            normal = ops.noise_normal(keys, streams, draw, size)
            assert normal.dtype == torch.float32
            assert ulps_apart(normal, reference.noise_normal(keys, streams, draw, size)).max() <= 4


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 255, 256, 257, 1000])
def test_one_number_a_sample(rows: int) -> None:
    """The times of a training step have loops of their own."""
    key = torch.tensor([-(2**40) + 7, 5])
    for ids in (None, torch.randint(-(2**62), 2**62, (rows, 2))[:, 0]):
        assert torch.equal(ops.noise_uniform(key, ids, 3, (rows,)), reference.noise_uniform(key, ids, 3, (rows,)))


def ulps_apart(x: Tensor, y: Tensor) -> Tensor:
    """How many float32 numbers further y is."""
    bits = torch.stack([x, y]).view(torch.int32).long()
    one, other = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (one - other).abs()


def test_normals_are_the_references_within_4_ulp() -> None:
    """log, sqrt, sin, cos and a product, each within an ulp or so: 2 ulp in 99.92 % of 50 million, never over 4."""
    size = (16, 2**17)
    exact = reference.noise_normal(KEY, None, 0, size)
    off = ulps_apart(ops.noise_normal(KEY, None, 0, size), exact)
    assert off.max() <= 4
    assert (off > 2).float().mean() < 0.002
    tail = exact.abs() > 4
    assert tail.sum() > 50 and off[tail].max() <= 4


def test_no_word_makes_an_odd_number() -> None:
    """The extremes of the words, found by search over blocks: largest radius, zero radius, every quadrant."""
    size = (64, 2**16)
    words = reference.noise_integers(KEY, None, 0, size, 2**32).view(-1, 2)
    z = ops.noise_normal(KEY, None, 0, size)
    assert z.isfinite().all()
    # sqrt(-2 ln 2^-33) = 6.76 is the largest number there can be.
    assert z.abs().max() < 6.77
    radius = z.view(-1, 2).double().square().sum(1).sqrt()
    right = (-2 * ((words[:, 0].double() + 0.5) / 2**32).float().double().log()).sqrt()
    torch.testing.assert_close(radius, right, rtol=5e-7, atol=0)
    angle = torch.atan2(z.view(-1, 2)[:, 1].double(), z.view(-1, 2)[:, 0].double()) / (2 * math.pi) % 1
    known = radius > 0
    difference = (angle - words[:, 1] / 2**32 + 0.5)[known] % 1 - 0.5
    assert difference.abs().max() < 1e-7


# --- independent of how they are computed -----------------------------------------------------------------------------


@every_law
@pytest.mark.parametrize("shape", [(), (3,), (4, 2), (1023,), (1024,), (1026,), (3, 700)], ids=str)
def test_a_stream_does_not_depend_on_its_batch(law: Any, shape: tuple[int, ...]) -> None:
    ids = torch.tensor([7, 0, 2**40, -3, 12])
    batch = law(ops, KEY, ids, 2, (5, *shape))
    for i in range(5):
        assert torch.equal(law(ops, KEY, ids[i : i + 1], 2, (1, *shape))[0], batch[i])
    order = torch.tensor([3, 3, 0, 4])
    assert torch.equal(law(ops, KEY, ids[order], 2, (4, *shape)), batch[order])
    assert torch.equal(law(ops, KEY, torch.arange(5), 2, (5, *shape)), law(ops, KEY, None, 2, (5, *shape)))
    # The key says where the draws begin.
    assert torch.equal(law(ops, KEY + torch.tensor([0, 2]), ids, 0, (5, *shape)), batch)
    assert not torch.equal(law(ops, KEY + torch.tensor([1, 0]), ids, 2, (5, *shape)), batch)


@every_law
def test_a_sample_is_numbered_in_logical_order(law: Any) -> None:
    """Its shape does not count, and a longer sample begins like a shorter one."""
    flat = law(ops, KEY, None, 0, (3, 24))
    assert torch.equal(law(ops, KEY, None, 0, (3, 2, 3, 4)).view(3, 24), flat)
    assert torch.equal(law(ops, KEY, None, 0, (3, 2000))[:, :24], flat)


def test_memory_format_does_not_change_the_noise() -> None:
    x = torch.randn(2, 3, 4, 4)
    draw = ops.Draw(key=KEY)
    plain = ops.perturb(x, 1.0, 1.0, draw)
    assert torch.equal(ops.perturb(x.to(memory_format=torch.channels_last), 1.0, 1.0, draw), plain)
    assert torch.equal(ops.perturb(x.transpose(0, 1).contiguous().transpose(0, 1), 1.0, 1.0, draw), plain)


def differing(one: Results, other: Results) -> list[str]:
    """Names of the results that are not the same bit for bit."""
    return [n for n in one if not all(torch.equal(a, b) for a, b in zip(one[n], other[n], strict=True))]


def test_number_of_threads_does_not_matter() -> None:
    torch.set_num_threads(1)
    alone = results_of_all()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert differing(alone, results_of_all()) == []


COUNT_THREADS = """
import os, torch
from scoresde_ext import ops
torch.set_num_threads(3)
key = torch.tensor([1, 2])
before = len(os.listdir("/proc/self/task"))
ops.noise_normal(key, None, 0, (64, 10_000))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc to count threads in")
def test_threads_are_used() -> None:
    """The first loop that asks for three threads makes two more."""
    run = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 2


SAVE_RESULTS = """
import sys, torch
from op_table import results_of_all
from scoresde_ext import _C
torch.set_num_threads(1)
torch.save((_C.build_info()["cpu_capability"], results_of_all()), sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """Bit for bit, but for the normals of the generic set: their polynomials have no fused multiply-add there."""
    sets, results = {}, {}
    for name in ("generic", "avx2", "avx512"):
        environment = os.environ | {"SCORESDE_EXT_CPU": name, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", SAVE_RESULTS, tmp_path / name], check=True, env=environment)
        sets[name], results[name] = torch.load(tmp_path / name)
    assert sets["generic"] == "generic"
    if sets["avx2"] != "avx2":
        pytest.skip("a processor without AVX2")
    assert differing(results["avx2"], results["avx512"]) == []
    generic = results["generic"]
    rounded_twice = differing(generic, results["avx2"])
    assert "noise_normal" in rounded_twice
    assert [n for n in rounded_twice if "key" not in n and n != "noise_normal"] == []
    for one, other in zip(generic["noise_normal"], results["avx2"]["noise_normal"], strict=True):
        assert ulps_apart(one, other).max() <= 8  # 4 ulp from the reference, each
    for name, op, v in all_arguments():
        check(op, v, generic[name], noise_ulp=8)


# --- random -----------------------------------------------------------------------------------------------------------

# A fixed key, so that a test passes always or never; the bounds are at five standard deviations or a p-value of 1e-6.


def test_normal_distribution() -> None:
    z = ops.noise_normal(KEY, None, 0, (256, 8192)).flatten().double()
    n = len(z)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6
    for bound in (2.0, 3.0, 4.0, 4.5):
        for tail in (z > bound, z < -bound):
            mean = n * stats.norm.sf(bound)
            assert abs(tail.sum() - mean) < 5 * math.sqrt(mean), bound
    assert 4.9 < z.abs().max() < 6.77


def test_uniform_distribution() -> None:
    u = ops.noise_uniform(KEY, None, 0, (256, 8192)).flatten()
    assert u.min() >= 0 and u.max() < 1
    assert (u * 2**24 == (u * 2**24).round()).all()
    assert stats.kstest(u.double().numpy(), "uniform").pvalue > 1e-6
    counts = torch.bincount((u * 4096).long(), minlength=4096)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 3 * 2**30, 2**32])
def test_integer_distribution(high: int) -> None:
    values = ops.noise_integers(KEY, None, 0, (64, 8192), high)
    assert values.min() >= 0 and values.max() < high
    bins = min(high, 1000)
    counts = torch.bincount((values * bins // high).flatten(), minlength=bins)
    # Not all bins hold the same number of integers where bins does not divide high
    edges = [-(-i * high // bins) for i in range(bins + 1)]
    right = torch.tensor(edges).diff().double() * values.numel() / high
    assert bins == 1 or stats.chisquare(counts.numpy(), right.numpy()).pvalue > 1e-6


def test_neighbours_are_not_correlated() -> None:
    """Elements of a sample, samples, draws and seeds: also their squares, since neighbours share a radius."""
    n = 2**18
    z = torch.stack([ops.noise_normal(KEY, None, draw, (8, n // 8)) for draw in range(3)]).double()
    other_seed = ops.noise_normal(KEY + torch.tensor([1, 0]), None, 0, (8, n // 8)).double()
    pairs = {f"elements {k} apart": (z[..., k:], z[..., :-k]) for k in (1, 2, 3, 4, 5, 8, 1024)}
    pairs |= {f"samples {k} apart": (z[:, k:], z[:, :-k]) for k in (1, 2, 7)}
    pairs |= {f"draws {k} apart": (z[k:], z[:-k]) for k in (1, 2)}
    pairs |= {"seeds": (z[0], other_seed)}
    for what, (a, b) in pairs.items():
        for power in (1, 2):
            x, y = a.flatten() ** power, b.flatten() ** power
            correlation = torch.stack([x, y]).corrcoef()[0, 1]
            assert abs(correlation) < 5 / math.sqrt(len(x)), (what, power)


def test_sources_of_noise() -> None:
    """Draws of noise.seeds and noise.run follow one another within one key."""
    x = torch.zeros(3, 5)
    ids = torch.tensor([4, 9, 1])
    key = torch.tensor([77, 0])
    with noise.seeds(77, ids):
        first, u, labels, last = noise.normal(x), noise.uniform(x), noise.integers(10, x[:, 0]), noise.normal_tensor(x)
    assert torch.equal(ops.materialize(first, x), ops.noise_normal(key, ids, 0, (3, 5)))
    assert torch.equal(u, ops.noise_uniform(key, ids, 1, (3, 5)))
    assert torch.equal(labels, ops.noise_integers(key, ids, 2, (3,), 10))
    assert torch.equal(last, ops.noise_normal(key, ids, 3, (3, 5)))
    torch.manual_seed(4)
    with noise.run("cpu"):
        drawn = [noise.normal_tensor(x) for _ in range(2)]
    torch.manual_seed(4)
    key = noise.normal(x).key
    assert torch.equal(drawn[0], ops.noise_normal(key, None, 0, (3, 5)))
    assert torch.equal(drawn[1], ops.noise_normal(key, None, 1, (3, 5)))


def test_keys_are_drawn_as_torch_draws_integers() -> None:
    torch.manual_seed(4)
    wanted = [torch.randint(2**62, (2,)) for _ in range(3)]
    torch.manual_seed(4)
    for key in wanted:
        assert torch.equal(_C.host.new_key(), key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_of_a_training_step(dtype: torch.dtype) -> None:
    """Of one key, unless another source is in force; times do not depend on the noise."""
    x = torch.zeros(3, 5, dtype=dtype)
    torch.manual_seed(4)
    key = _C.host.new_key()
    torch.manual_seed(4)
    u, draw = noise.times_and_normal(x)
    assert u.dtype == ops.compute_dtype(x) and torch.equal(u.float(), ops.noise_uniform(key, None, 0, (3,)))
    assert torch.equal(ops.materialize(draw, x), ops.noise_normal(key, None, 1, (3, 5)).to(dtype))
    with noise.seeds(77, [4, 9, 1]):
        u, draw = noise.times_and_normal(x)
    with noise.seeds(77, [4, 9, 1]):
        assert torch.equal(u, noise.uniform(torch.empty(3, dtype=u.dtype)))
        assert torch.equal(ops.materialize(draw, x), noise.normal_tensor(x))
