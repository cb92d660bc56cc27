"""The benchmark of jobs runs, and its simulated manifest is read as a real one."""

from benchmarks import jobs


def test_throughput() -> None:
    found = jobs.throughput(samples=4, batch=4, nfe=2, repeats=1)
    assert found["wall_ratio"] > 0 and found["processor_ratio"] > 0 and found["samples_per_second"]["job"] > 0


def test_refill() -> None:
    mixture = jobs.MIXTURES["mixture 64-D"].network("vp")
    found = jobs.compare(mixture, (64,), jobs.torch.float64, 24, 4, "RK45", 1e-1)
    assert 0.8 < found["occupancy"] <= 1 and found["ratio"] <= 1 and found["predicted"] <= found["ratio"] + 1e-9


def test_manifest() -> None:
    for adaptive in (False, True):
        found = jobs.manifest_of(300, adaptive)
        assert found["shards"] == 300 and 200 < found["bytes_per_shard"] < 700


def test_store() -> None:
    assert jobs.store(20)["claims_per_second"] > 0
