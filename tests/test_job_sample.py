"""Sampling jobs: what is in the folder is what the samplers give, by id, and it is said what is there."""

import json
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from job_networks import Odd, Tiny
from PIL import Image

from scoresde_ext import sampling, sde_lib
from scoresde_ext.__main__ import main
from scoresde_ext.job import manifest, shards
from scoresde_ext.stochastic import get_sde_sampler

NETWORKS = Path(__file__).with_name("job_networks.py")
SAMPLERS: dict[str, list[str]] = {
    "unipc": ["--sampler", "unipc", "--nfe", "10"],
    "heun": ["--sampler", "heun", "--nfe", "4", "--denoise"],
    "unipc adaptive": ["--sampler", "unipc", "--rtol", "1e-2", "--atol", "1e-2"],
    "RK23 adaptive": ["--sampler", "RK23", "--rtol", "1e-1", "--atol", "1e-1", "--coordinate", "angle", "--denoise"],
    "unipc_sde": ["--sampler", "unipc_sde", "--nfe", "11"],
    "adaptive_sde": ["--sampler", "adaptive_sde", "--rtol", "0.5", "--atol", "0.5"],
    "pc": ["--sampler", "pc", "--nfe", "60", "--corrector", "ald"],
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def job(out: Path, *more: str, network: str = "tiny", samples: int = 22, batch: int = 4, shard: int = 8) -> int:
    cut = ["--samples", str(samples), "--batch", str(batch), "--shard-size", str(shard)]
    name = f"{NETWORKS}:{network}"
    return main(["sample", "--network", name, "--device", "cpu", "--seed", "3", "--out", str(out), *cut, *more])


def found(out: Path, format: str = "pt") -> tuple[np.ndarray, np.ndarray]:
    """Samples and ids of all shards, in order."""
    parts = [shards.read(p, format) for p in sorted(out.glob("samples*"))]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("samples*")}


def alone(sampler: str, network: Any, ids: range) -> torch.Tensor:
    """The samples as the library gives them without a job."""
    sde = sde_lib.VPSDE(N=30) if sampler == "pc" else sde_lib.VPSDE()
    shape, common = (len(ids), 1, 4, 4), {"device": "cpu", "seeds": (3, list(ids))}

    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    made: Any = {
        "unipc": lambda: sampling.get_ode_sampler(sde, shape, same, method="unipc", steps=10, **common),
        "heun": lambda: sampling.get_ode_sampler(sde, shape, same, True, method="heun", steps=2, **common),
        "unipc adaptive": lambda: sampling.get_ode_sampler(
            sde, shape, same, False, 1e-2, 1e-2, "unipc", control="per_sample", **common
        ),
        "RK23 adaptive": lambda: sampling.get_ode_sampler(
            sde, shape, same, True, 0.1, 0.1, "RK23", control="per_sample", coordinate="angle", **common
        ),
        "unipc_sde": lambda: get_sde_sampler(sde, shape, same, steps=10, **common),
        "adaptive_sde": lambda: get_sde_sampler(sde, shape, same, method="adaptive", rtol=0.5, atol=0.5, **common),
        "pc": lambda: sampling.get_pc_sampler(
            sde,
            shape,
            sampling.get_predictor("reverse_diffusion"),
            sampling.get_corrector("ald"),
            same,
            0.16,
            continuous=True,
            **common,
        ),
    }[sampler]()
    return made(network)[0].detach()


@every_sampler
def test_samples_are_those_of_the_library(sampler: str, tmp_path: Path) -> None:
    """Sample i by its id, in a batch of its own ids; however the job is cut, within rounding."""
    assert job(tmp_path / "a", *SAMPLERS[sampler], "--format", "pt") == 0
    samples, ids = found(tmp_path / "a")
    assert ids.tolist() == list(range(22)) and samples.dtype == np.float32 and samples.shape == (22, 1, 4, 4)
    for first in range(0, 22, 4):
        expected = alone(sampler, Tiny(), range(first, first + 4))[: 22 - first].numpy()
        np.testing.assert_allclose(samples[first : first + 4], expected, rtol=1e-5, atol=1e-6)
    assert job(tmp_path / "b", *SAMPLERS[sampler], "--format", "pt", batch=5, shard=10) == 0
    np.testing.assert_allclose(found(tmp_path / "b")[0], samples, rtol=1e-4, atol=1e-5)


@every_sampler
def test_more_samples_are_added(sampler: str, tmp_path: Path) -> None:
    """14 and then 22 are 22 at once, to the bit; the 14 are not touched."""
    assert job(tmp_path / "a", *SAMPLERS[sampler], "--format", "pt", samples=14) == 0
    before = content(tmp_path / "a")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("samples*")}
    assert job(tmp_path / "a", *SAMPLERS[sampler], "--format", "pt") == 0
    after = content(tmp_path / "a")
    assert {name: after[name] for name in before} == before
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").glob("samples*") if p.name in before} == times
    assert job(tmp_path / "b", *SAMPLERS[sampler], "--format", "pt") == 0
    for one, other in zip(found(tmp_path / "a"), found(tmp_path / "b"), strict=True):
        assert np.array_equal(one, other)
    assert main(["verify", str(tmp_path / "a")]) == 0


def test_fewer_samples_change_nothing(tmp_path: Path, capsys: Any) -> None:
    assert job(tmp_path, *SAMPLERS["unipc"]) == 0
    before = content(tmp_path)
    assert job(tmp_path, *SAMPLERS["unipc"], samples=5) == 0
    assert content(tmp_path) == before and yaml.safe_load((tmp_path / "job.yaml").read_text())["samples"] == 22
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("format", ["npz", "npy", "pt", "png", "png-folder"])
def test_formats(format: str, tmp_path: Path) -> None:
    assert job(tmp_path / "a", *SAMPLERS["unipc"], "--format", format, "--grid-png") == 0
    expected = torch.cat([alone("unipc", Tiny(), range(a, a + 4)) for a in range(0, 22, 4)])[:22]
    images = ((expected + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert len(np.unique(images)) > 50 and (images == 0).mean() < 0.2  # there is something to compare
    parts = sorted((tmp_path / "a").glob("samples*"))
    assert [p.name.split(".")[0] for p in parts] == [f"samples-{first:012d}" for first in (0, 8, 16)]
    if format == "npz":
        with np.load(parts[1]) as part:
            assert part.files == ["samples", "ids"] and part["samples"].dtype == np.uint8
            assert np.abs(part["samples"] - images[8:16]).max() <= 1 and part["ids"].tolist() == list(range(8, 16))
    elif format == "npy":
        part = np.load(parts[1])
        assert part.dtype == np.float32 and np.allclose(part, expected[8:16], atol=1e-6)
    elif format == "pt":
        part = torch.load(parts[1], weights_only=True)
        assert torch.allclose(part["samples"], expected[8:16], atol=1e-6) and part["ids"].tolist() == list(range(8, 16))
    else:
        if format == "png":
            with zipfile.ZipFile(parts[1]) as archive:
                archive.extractall(tmp_path / "seen")
        folder = tmp_path / "seen" if format == "png" else parts[1]
        assert sorted(p.name for p in folder.iterdir()) == [f"{i:012d}.png" for i in range(8, 16)]
        seen = np.asarray(Image.open(folder / "000000000009.png"))
        assert np.abs(seen - images[9, :, :, 0]).max() <= 1
    assert Image.open(tmp_path / "a" / "preview.png").size == (8 * 34 + 2, 3 * 34 + 2)
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert job(tmp_path / "b", *SAMPLERS["unipc"], "--format", format) == 0
    if format != "png-folder":
        assert content(tmp_path / "a") == content(tmp_path / "b")  # no times in the files


def test_vectors(tmp_path: Path) -> None:
    assert job(tmp_path, *SAMPLERS["unipc"], "--format", "npy", "--grid-png", network="vector") == 0
    assert np.load(tmp_path / "samples-000000000008.npy").shape == (8, 6)
    assert "data:image" not in (tmp_path / "report.html").read_text() and not (tmp_path / "preview.png").exists()


@pytest.mark.parametrize("sampler", ["unipc", "unipc adaptive", "pc"])
def test_failed_samples_are_named_and_not_written(sampler: str, tmp_path: Path, capsys: Any) -> None:
    assert job(tmp_path, *SAMPLERS[sampler], "--format", "pt", network="odd") == 1
    err = capsys.readouterr().err
    samples, ids = found(tmp_path)
    whole = torch.cat([alone_with_status(sampler, range(a, a + 4)) for a in range(0, 22, 4)])[:22]
    lost = [i for i in range(22) if not whole[i].isfinite().all()]
    assert 0 < len(lost) < 22 and np.isfinite(samples).all()
    assert ids.tolist() == [i for i in range(22) if i not in lost]
    recorded = {i: why for shard in manifest.read(tmp_path).values() for i, why in shard.failed.items()}
    assert sorted(recorded) == lost and all("NaN or Inf" in why for why in recorded.values())
    assert f"{len(lost)} samples failed and were not written. sample {lost[0]}: NaN or Inf" in err
    assert main(["verify", str(tmp_path)]) == 1
    assert f"sample {lost[0]} failed: NaN or Inf" in capsys.readouterr().out
    assert f"{len(lost)} samples failed" in (tmp_path / "report.html").read_text()
    before = content(tmp_path)
    assert job(tmp_path, *SAMPLERS[sampler], "--format", "pt", network="odd") == 1  # they would fail again
    assert content(tmp_path) == before


def alone_with_status(sampler: str, ids: range) -> torch.Tensor:
    """With NaN in the samples that fail."""
    from scoresde_ext.integrate import SolverError

    if sampler == "pc":
        rows = []
        for i in ids:
            try:
                rows.append(alone(sampler, Odd(), range(i, i + 1)))
            except SolverError:
                rows.append(torch.full((1, 1, 4, 4), torch.nan))
        return torch.cat(rows)
    try:
        return alone(sampler, Odd(), ids)
    except SolverError as error:
        return error.solution.y


@pytest.mark.parametrize("sampler", ["unipc", "unipc adaptive"])
def test_out_of_memory(sampler: str, tmp_path: Path, capsys: Any) -> None:
    """The batch is halved until it fits, and that is said; the samples are the same within rounding."""
    more = [*SAMPLERS[sampler], "--format", "pt"]
    assert job(tmp_path / "a", *more, network="short", batch=16, shard=16) == 0
    err = capsys.readouterr().err
    assert "out of memory with 16 samples at a time: going on with 8" in err and "going on with 4" in err
    assert err.count("out of memory") == 2
    assert {shard.batch for shard in manifest.read(tmp_path / "a").values()} == {4}
    assert job(tmp_path / "b", *more, batch=16, shard=16) == 0
    np.testing.assert_allclose(found(tmp_path / "a")[0], found(tmp_path / "b")[0], rtol=1e-4, atol=1e-5)
    assert main(["verify", str(tmp_path / "a")]) == 0


def test_out_of_memory_where_mates_matter(tmp_path: Path) -> None:
    """Langevin's step is one for the batch: fewer together would be other samples."""
    with pytest.raises(torch.OutOfMemoryError):
        job(tmp_path, "--sampler", "pc", "--nfe", "48", network="short", batch=8)


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(("how", "word"), [("gone", "is gone"), ("cut", "bytes, not"), ("bit", "another checksum")])
def test_damage_is_found_and_mended(how: str, word: str, tmp_path: Path, capsys: Any) -> None:
    for samples in (14, 22):
        assert job(tmp_path, *SAMPLERS["unipc"], samples=samples) == 0
    whole, (samples, ids) = content(tmp_path), found(tmp_path, "npz")
    assert sorted(whole) == [f"samples-{first:012d}.npz" for first in (0, 8, 14, 16)]
    damage(tmp_path / "samples-000000000014.npz", how)
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.search(f"samples-000000000014.npz .*{word}", out) and f"--config {tmp_path / 'job.yaml'} --remake" in out
    again = ["sample", "--config", str(tmp_path / "job.yaml")]
    assert main(again) == (0 if how == "bit" else 2)
    assert main([*again, "--remake"]) == 0
    assert content(tmp_path) == whole
    # Neighbours are made as one.
    for first in (8, 14):
        damage(tmp_path / f"samples-{first:012d}.npz", how)
    assert main([*again, "--remake"]) == 0
    for one, other in zip(found(tmp_path, "npz"), (samples, ids), strict=True):
        assert np.array_equal(one, other)
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "22 samples in 3 shards: all there, whole, once\n"


def test_a_remake_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found damaged is missing from then on, also for a command without --remake."""
    assert job(tmp_path, *SAMPLERS["unipc"]) == 0
    whole = content(tmp_path)
    damage(tmp_path / "samples-000000000008.npz", "bit")
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(shards, "write", lambda *args: {}["stopped"])
        job(tmp_path, *SAMPLERS["unipc"], "--remake")
    assert job(tmp_path, *SAMPLERS["unipc"]) == 0
    assert content(tmp_path) == whole and main(["verify", str(tmp_path)]) == 0


def test_a_folder_that_another_job_has_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are compared once more when the folder is locked."""
    from scoresde_ext.job import run

    prepare = run.Job.prepare

    def late(self: run.Job) -> Any:
        monkeypatch.setattr(run.Job, "prepare", prepare)
        assert job(tmp_path / "out", "--nfe", "5") == 0
        return prepare(self)

    monkeypatch.setattr(run.Job, "prepare", late)
    assert job(tmp_path / "out", *SAMPLERS["unipc"]) == 2
    assert yaml.safe_load((tmp_path / "out" / "job.yaml").read_text())["nfe"] == 5


def test_verify_finds_what_is_wrong_with_the_set(tmp_path: Path, capsys: Any) -> None:
    assert job(tmp_path, *SAMPLERS["unipc"]) == 0
    log = tmp_path / "manifest" / "worker-00000.jsonl"
    lines = [line for line in log.read_text().split("\n") if line]
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:-9])  # the last is torn
    (tmp_path / "stranger.txt").write_text("here")
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "samples 16 to 21 are not there yet" in out and "samples-000000000016.npz is not in the manifest" in out
    assert "stranger.txt is not in the manifest" in out and "To continue" in out
    doubled = json.loads(lines[1]) | {"first": 6}
    log.write_text("\n".join([*lines, json.dumps(doubled)]) + "\n")
    assert main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "are there twice" in out and "has other ids than the manifest says" in out


def test_status(tmp_path: Path, capsys: Any) -> None:
    assert job(tmp_path, *SAMPLERS["unipc"], samples=14) == 0
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("last"))
    assert rows["samples"] == "14 of 14" and rows["job"] == "not at work"
    assert rows["sampler"] == "unipc, 10.0 evaluations a sample" and rows["shards"].startswith("2 npz")


def test_dry_run(tmp_path: Path, capsys: Any) -> None:
    assert job(tmp_path / "out", *SAMPLERS["unipc"], "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("22 samples of shape (1, 4, 4)") and "in 3 npz shards" in out and "of disk" in out
    assert not (tmp_path / "out").exists()
    assert job(tmp_path / "out", *SAMPLERS["unipc"], samples=14) == 0
    before = content(tmp_path / "out")
    capsys.readouterr()
    assert job(tmp_path / "out", *SAMPLERS["unipc"], "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("8 samples") and "in 2 npz shards" in out and "14 samples are there already" in out
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_configuration_file(suffix: str, tmp_path: Path) -> None:
    """Every option is a key; the command line wins."""
    options = {"network": f"{NETWORKS}:tiny", "device": "cpu", "samples": 9, "batch": 4, "shard-size": 4, "nfe": 2}
    options |= {"sde": "vp", "data_range": [-2, 2], "out": str(tmp_path / "wrong"), "grid_png": True}
    file = tmp_path / f"job.{suffix}"
    if suffix == "yaml":
        file.write_text(yaml.safe_dump(options | {"sde_options": {"beta_max": 15}}))
    else:
        file.write_text(
            "\n".join(f"{k} = {json.dumps(v)}" for k, v in options.items()) + "\n[sde_options]\nbeta_max = 15"
        )
    assert main(["sample", "--config", str(file), "--out", str(tmp_path / "out"), "--samples", "10"]) == 0
    stored = yaml.safe_load((tmp_path / "out" / "job.yaml").read_text())
    assert stored["samples"] == 10 and stored["data_range"] == [-2.0, 2.0] and stored["sde_options"] == {"beta_max": 15}
    assert stored["shape"] == [1, 4, 4] and stored["order"] == 3 and len(stored["record"]["network_sha256"]) == 64
    assert (tmp_path / "out" / "preview.png").exists() and not (tmp_path / "wrong").exists()


class Page(HTMLParser):
    """The tags of a page and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        self.references += [v for name, v in attributes if name in ("src", "href") and v]


def test_the_report_needs_no_other_file(tmp_path: Path) -> None:
    assert job(tmp_path, *SAMPLERS["unipc adaptive"]) == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.references and all(r.startswith("data:image/png;base64,") for r in page.references)
    assert "script" not in page.tags and "link" not in page.tags and "http" not in text.replace("http-equiv", "")
    assert page.tags.count("svg") == 2 and page.tags.count("rect") >= 5
    assert "rtol" in text and "22 samples" in text


def test_upstreams_checkpoints(tmp_path: Path) -> None:
    """The averaged weights by default; the raw ones where asked for. DataParallel's prefix is no matter."""
    model = {"module.gain": torch.tensor(0.2), "module.bias": torch.tensor(0.3)}
    ema = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.tensor(1.1), torch.tensor(-0.2)]}
    torch.save({"optimizer": {}, "model": model, "ema": ema, "step": 7}, tmp_path / "checkpoint.pth")
    for which, (gain, bias) in {"ema": (1.1, -0.2), "model": (0.2, 0.3)}.items():
        out, network = tmp_path / which, Tiny()
        with torch.no_grad():
            network.gain.fill_(gain)
            network.bias.fill_(bias)
        more = [*SAMPLERS["unipc"], "--format", "pt", "--checkpoint", str(tmp_path / "checkpoint.pth")]
        assert job(out, *more, "--weights", which, samples=4) == 0
        np.testing.assert_allclose(found(out)[0], alone("unipc", network, range(4)), rtol=1e-5, atol=1e-6)


def test_safetensors(tmp_path: Path) -> None:
    """Weights for a network that a function without arguments makes."""
    network = Tiny()
    with torch.no_grad():
        network.gain.fill_(0.9)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    assert job(tmp_path / "out", *SAMPLERS["unipc"], "--format", "pt", "--checkpoint", str(path), samples=4) == 0
    samples = torch.as_tensor(found(tmp_path / "out")[0])
    np.testing.assert_allclose(samples, alone("unipc", network, range(4)), rtol=1e-5, atol=1e-6)
    assert (samples - alone("unipc", Tiny(), range(4))).abs().max() > 0.01


def test_networks_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(NETWORKS, tmp_path / "some_networks_of_mine.py")
    monkeypatch.syspath_prepend(tmp_path)
    command = ["sample", "--network", "some_networks_of_mine:tiny", "--device", "cpu", "--samples", "4", "--batch", "4"]
    assert main([*command, "--nfe", "2", "--out", str(tmp_path / "out")]) == 0


def test_calibrated_grid(tmp_path: Path, capsys: Any) -> None:
    problem = ["--network", f"{NETWORKS}:tiny", "--device", "cpu"]
    grid = str(tmp_path / "grid.json")
    assert main(["calibrate", *problem, "--nfe", "5", "--samples", "4", "--out", grid]) == 0
    assert "5 evaluations a sample, " in capsys.readouterr().out
    assert job(tmp_path / "out", "--grid", grid) == 0
    assert {n for s in manifest.read(tmp_path / "out").values() for n in s.evaluations} == {5}
    other = json.loads(Path(grid).read_text())
    Path(grid).write_text(json.dumps(other | {"rms": 0.5}))
    assert job(tmp_path / "out", "--grid", grid) == 2
    assert "grid sha256" in capsys.readouterr().err


def test_likelihood(tmp_path: Path, capsys: Any) -> None:
    """Of the samples of a job, as the library says it."""
    from scoresde_ext.likelihood import get_likelihood_fn

    assert job(tmp_path / "out", *SAMPLERS["unipc"], samples=5) == 0
    data = tmp_path / "out" / "samples-000000000000.npz"
    command = ["likelihood", "--network", f"{NETWORKS}:tiny", "--device", "cpu", "--data", str(data), "--batch", "3"]
    options = ["--rtol", "1e-3", "--atol", "1e-3", "--levels", "256", "--out", str(tmp_path / "bpd.npz")]
    assert main([*command, *options]) == 0
    with np.load(tmp_path / "bpd.npz") as result, np.load(data) as samples:
        x = torch.from_numpy(samples["samples"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        assert result["ids"].tolist() == list(range(5))
        fn = get_likelihood_fn(sde_lib.VPSDE(), lambda x: (x + 1) / 2, rtol=1e-3, atol=1e-3, levels=256, seeds=0)
        fn.options["control"] = "per_sample"
        np.testing.assert_allclose(result["bpd"], fn(Tiny(), x)[0].numpy(), rtol=1e-4)


@pytest.mark.parametrize("sde", ["subvp", "ve"])
def test_other_sdes(sde: str, tmp_path: Path) -> None:
    more = ["--sde", sde, "--eps", "1e-2", "--nfe", "4", "--format", "pt"]
    more += ["--sde-options", "sigma_max=3"] if sde == "ve" else []
    assert job(tmp_path, *more, samples=4) == 0
    made: Any = sde_lib.VESDE(sigma_max=3) if sde == "ve" else sde_lib.subVPSDE()
    sampler = sampling.get_ode_sampler(
        made, (4, 1, 4, 4), lambda x: x, method="unipc", steps=4, eps=1e-2, device="cpu", seeds=3
    )
    np.testing.assert_allclose(found(tmp_path)[0], sampler(Tiny())[0].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_half_precision(tmp_path: Path) -> None:
    """The network computes in it; the state and the files are float32."""
    for name in ("float32", "bfloat16"):
        assert job(tmp_path / name, *SAMPLERS["unipc"], "--format", "pt", "--dtype", name, samples=4) == 0
    half, whole = (found(tmp_path / name)[0] for name in ("bfloat16", "float32"))
    assert half.dtype == np.float32 and 0 < np.abs(half - whole).max() < 0.1
