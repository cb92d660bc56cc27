"""Wrong inputs of the commands: one line that says what is wrong, exit code 2, and nothing done."""

import errno
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from scoresde_ext.__main__ import main, parser
from scoresde_ext.job import files

NETWORKS = Path(__file__).with_name("job_networks.py")


def command(out: Path, *more: str, network: str = "tiny") -> list[str]:
    return [
        *("sample", "--network", f"{NETWORKS}:{network}", "--device", "cpu", "--out", str(out)),
        *("--samples", "6", "--batch", "4", "--shard-size", "4", "--nfe", "2", *more),
    ]


def refused(capsys: Any, arguments: list[str], *words: str) -> str:
    """Runs the command and returns the line."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "", (code, out, err)
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err
    return err


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no network": (["--network", "nowhere.py:load"], ["network: there is no file nowhere.py"]),
    "no module": (
        ["--network", "nowhere.at_all:load"],
        ["network: cannot import nowhere.at_all", "ModuleNotFoundError"],
    ),
    "no function": (["--network", f"{NETWORKS}:huge"], ["no function 'huge'", "tiny"]),
    "no colon": (["--network", "network"], ["network: expected file.py:function"]),
    "raises": (["--network", f"{NETWORKS}:broken"], ["RuntimeError: cannot be made"]),
    "no checkpoint": (["--checkpoint", "nowhere.safetensors"], ["checkpoint: there is no file nowhere.safetensors"]),
    "needs one": (["--network", f"{NETWORKS}:from_file"], ["checkpoint:", "reads one"]),
    "not callable": (["--network", f"{NETWORKS}:no_network"], ["network: expected a network", "str"]),
    "other shape": (["--network", f"{NETWORKS}:unlike", "--shape", "1,4,4"], ["does not take a sample of shape"]),
    "no shape": (["--network", f"{NETWORKS}:unlike"], ["shape:", "--shape"]),
    "negative": (["--samples", "-3"], ["samples: expected a whole number from 1 on, got '-3'"]),
    "no number": (["--batch", "many"], ["batch: expected a whole number"]),
    "zero": (["--nfe", "0"], ["nfe: expected a whole number from 1 on"]),
    "eps": (["--eps", "-0.1"], ["eps: expected a number above 0"]),
    "eps beyond": (["--eps", "2"], ["eps: expected a time in (0, T = 1)"]),
    "not finite": (["--eps", "nan"], ["eps: expected a number"]),
    "seed": (["--seed", "1.5"], ["seed: expected a whole number"]),
    "sampler": (["--sampler", "best"], ["sampler: expected one of unipc"]),
    "means nothing": (["--rtol", "1e-3"], ["rtol: means nothing to sampler unipc with fixed steps"]),
    "steps": (["--sampler", "heun", "--nfe", "5"], ["nfe: a step of heun takes 2 evaluations, got 5", "4 is near"]),
    "shard size": (["--shard-size", "6"], ["shard_size: expected a multiple of the batch, 4, got 6"]),
    "sde": (["--sde", "edm"], ["sde: expected one of vp, subvp, ve"]),
    "sde options": (
        ["--sde-options", "gamma=1"],
        ["sde_options: vp has the options beta_min, beta_max, N, got gamma\n"],
    ),
    "sde option misspelt": (["--sde-options", "beta_mx=3"], ["got beta_mx; is beta_max meant?"]),
    "sde option of another": (
        ["--sde", "ve", "--sde-options", "beta_max=3"],
        ["sde_options: ve has the options sigma_min, sigma_max, N, got beta_max"],
    ),
    "sde steps": (["--sde-options", "N=10.5"], ["sde_options: N: expected a whole number of steps", "got 10.5"]),
    "sde values": (["--sde-options", "beta_min=-1"], ["sde_options: beta_min"]),
    "device": (["--device", "abacus"], ["device: cannot use 'abacus'"]),
    "range": (["--data-range", "1,0"], ["data_range: expected two rising numbers"]),
    "format": (["--network", f"{NETWORKS}:vector"], ["format: npz holds images (C, H, W)"]),
    "channels": (["--shape", "2,4,4", "--format", "png"], ["format: png holds 1 or 3 channels"]),
    "grid": (["--grid", "nowhere.json"], ["nfe, grid: expected one of them"]),
    "predictor": (
        ["--sampler", "pc", "--predictor", "best"],
        [
            "sample: predictor: expected a registered one (",
            "ancestral_sampling, ",
            "none, reverse_diffusion), got 'best'.",
        ],
    ),
    "corrector": (
        ["--sampler", "pc", "--corrector", "best"],
        ["corrector: expected a registered one (", "langevin, none), got 'best'."],
    ),
    "predictor for another sde": (
        ["--sampler", "pc", "--predictor", "ancestral_sampling", "--sde", "subvp"],
        ["sde: ancestral sampling is known for VPSDE and VESDE, got subVPSDE"],
    ),
    "predictor with few steps": (
        ["--sampler", "pc", "--nfe", "4"],
        ["N: the discrete process of VPSDE expects N > beta_max", "got N = 2 and beta_max = 20"],
    ),
    "shape of the network": (
        ["--network", f"{NETWORKS}:flat"],
        ["shape: expected the shape of one sample, for example 3,32,32, got 16"],
    ),
    "discrete": (["--no-continuous"], ["continuous: sampler unipc needs"]),
    "config": (["--config", "nowhere.yaml"], ["config: cannot read nowhere.yaml"]),
    "unknown option": (["--speed", "9"], ["--speed"]),
    "shortened option": (["--sam", "9"], ["--sam"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs(case: str, tmp_path: Path, capsys: Any) -> None:
    more, words = WRONG[case]
    refused(capsys, command(tmp_path / "out", *more), *words)
    assert list(tmp_path.iterdir()) == []  # nothing was done


def test_missing_settings(capsys: Any) -> None:
    refused(capsys, ["sample"], "network: is missing. Give --network, or a --config that has it")


def test_configuration_files(tmp_path: Path, capsys: Any) -> None:
    for name, content, words in (
        ("a.yaml", "samples: [1", ["a.yaml is not what its name says"]),
        ("b.toml", "samples 3", ["b.toml is not what its name says"]),
        ("c.yaml", "- 3", ["expected settings by name", "list"]),
        ("d.yaml", "smaples: 3", ["smaples: no such setting; is samples meant?"]),
        ("e.toml", "batch = -1", ["e.toml: batch: expected a whole number from 1 on, got -1"]),
        ("f.yaml", "denoise: 1", ["denoise: expected true or false, got 1"]),
        ("g.yaml", "batch: true", ["batch: expected a whole number"]),
    ):
        (tmp_path / name).write_text(content)
        refused(capsys, ["sample", "--config", str(tmp_path / name)], *words)


@pytest.mark.parametrize("where", ["below a file", "of the system"])
def test_folder_that_cannot_be_written(where: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("here")
    out = tmp_path / "file" / "out" if where == "below a file" else Path("/proc/out")
    refused(capsys, command(out), "out: cannot write to", str(out))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path, capsys: Any) -> None:
    tmp_path.chmod(0o500)
    refused(capsys, command(tmp_path / "out"), "out: cannot write to", "Permission denied")


def test_disk_without_space(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    refused(capsys, command(tmp_path / "out"), "are needed in", "10 bytes are free")
    assert not list((tmp_path / "out").glob("samples*"))


def test_disk_full_at_the_start(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(capsys, command(tmp_path / "out"), "out: cannot write to", "No space left on device")


def test_disk_full_on_the_way(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1; what is written is whole, and the same command continues to what an undisturbed job makes."""
    out, sync, left = tmp_path / "out", os.fsync, [6]

    def full(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(command(out)) == 1
    err = capsys.readouterr().err
    assert "stopped: No space left on device. What is written is whole, and the same command continues" in err
    assert main(command(out)) == 0 and main(command(tmp_path / "whole")) == 0
    for path in (tmp_path / "whole").glob("samples*"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert main(["verify", str(out)]) == 0


def test_other_settings(tmp_path: Path, capsys: Any) -> None:
    """The difference is shown; what does not change the samples may differ."""
    out = tmp_path / "out"
    assert main(command(out)) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    seed = refused(
        capsys, command(out, "--seed", "1", "--nfe", "3"), "made with other settings", "seed is 0 there, 1 here"
    )
    assert "nfe is 2 there, 3 here" in seed and str(out) in seed
    refused(capsys, command(out, network="odd"), "network function is tiny there, odd here")
    refused(capsys, command(out, "--format", "png"), "format is npz there, png here")
    weights = tmp_path / "weights.pt"
    torch.save({"gain": torch.tensor(1.0), "bias": torch.tensor(0.0)}, weights)
    refused(capsys, command(out, "--checkpoint", str(weights)), "checkpoint sha256 is none there")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(command(out, "--batch", "2")) == 0


def test_a_second_job_is_refused(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lock = files.FolderLock(out)
    assert lock.acquire(0) and files.is_locked(out)
    refused(capsys, command(out), "another job is at work on")
    lock.release()
    assert not files.is_locked(out)
    assert main(command(out)) == 0


def test_folders_that_are_none(tmp_path: Path, capsys: Any) -> None:
    for name in ("status", "verify"):
        refused(capsys, [name, str(tmp_path)], "expected one that `scoresde sample` wrote")
        refused(capsys, [name, str(tmp_path / "nowhere")], "expected one that `scoresde sample` wrote")


def test_checkpoints_are_not_run(tmp_path: Path, capsys: Any) -> None:
    """A torch file that holds code is refused, and its code does not run."""
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trap),)

    torch.save({"gain": Evil()}, tmp_path / "evil.pt")
    refused(capsys, command(tmp_path / "out", "--checkpoint", str(tmp_path / "evil.pt")), "holds more than weights")
    assert not trap.exists()
    (tmp_path / "bad.safetensors").write_bytes(b"not at all")
    refused(capsys, command(tmp_path / "out", "--checkpoint", str(tmp_path / "bad.safetensors")), "cannot read")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    refused(capsys, command(tmp_path / "out", "--checkpoint", str(tmp_path / "other.pt")), "does not fit the network")


def test_a_network_that_breaks_on_the_way_is_no_wrong_input(tmp_path: Path) -> None:
    """Not swallowed: its traceback is what the user needs."""
    module = tmp_path / "breaks.py"
    module.write_text(
        "calls = []\n"
        "def network(x, labels):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 3: raise KeyError('lost')\n"
        "    return x\n"
        "network.sample_shape = (1, 4, 4)\n"
        "def load(): return network\n"
    )
    with pytest.raises(KeyError, match="lost"):
        main(command(tmp_path / "out", "--network", f"{module}:load"))


def test_likelihood_and_calibrate(tmp_path: Path, capsys: Any) -> None:
    problem = ["--network", f"{NETWORKS}:tiny", "--device", "cpu"]
    np.save(tmp_path / "data.npy", np.full((2, 1, 4, 4), np.nan, np.float32))
    (tmp_path / "data.npz").write_bytes(b"no archive")
    out = ["--out", str(tmp_path / "out.npz")]
    refused(capsys, ["likelihood", *problem, *out, "--data", "nowhere.npz"], "data: cannot read nowhere.npz")
    refused(capsys, ["likelihood", *problem, *out, "--data", str(tmp_path / "data.npz")], "data: expected samples in")
    refused(capsys, ["likelihood", *problem, *out, "--data", str(tmp_path / "data.npy")], "got NaN or Inf")
    refused(capsys, ["calibrate", *problem, "--nfe", "0", *out], "nfe: expected a whole number from 1 on")
    refused(
        capsys,
        ["calibrate", *problem, "--nfe", "5", "--order", "5", *out],
        "order: expected a whole number from 1 to 4, got 5",
    )
    refused(capsys, ["calibrate", *problem, "--nfe", "5", "--out", str(tmp_path)], "out: cannot write to")
    np.save(tmp_path / "data.npy", np.zeros((2, 3, 4, 4), np.float32))
    unlike = ["--network", f"{NETWORKS}:unlike", "--device", "cpu", *out]
    refused(capsys, ["likelihood", *unlike, "--data", str(tmp_path / "data.npy")], "does not take a sample of shape")
    refused(
        capsys, ["calibrate", *unlike, "--nfe", "5", "--shape", "1,4,4"], "does not take a sample of shape (1, 4, 4)"
    )
    assert not (tmp_path / "out.npz").exists()


def test_calibration_that_fails_is_one_line(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--network", f"{NETWORKS}:odd", "--device", "cpu", "--nfe", "5", "--out", str(tmp_path / "grid.json")]
    assert main(["calibrate", *arguments]) == 1
    assert re.fullmatch(
        r"scoresde calibrate: stopped: The integration .* failed, .* NaN or Inf.*\n", capsys.readouterr().err
    )


def test_options_are_not_torchruns() -> None:
    """torchrun completes what is the beginning of one of its options, also behind the name of the module."""
    torchrun = pytest.importorskip("torch.distributed.run").get_args_parser()
    theirs = [name for action in torchrun._actions for name in action.option_strings]
    commands = next(a for a in parser()._actions if a.dest == "==SUPPRESS==" or a.choices).choices
    ours = [name for command in commands.values() for action in command._actions for name in action.option_strings]
    assert "--samples" in ours and "--nproc-per-node" in theirs
    for name in set(ours) - {"-h", "--help"}:
        assert not [other for other in theirs if other.startswith(name)], name


def test_a_stored_configuration_is_a_configuration(tmp_path: Path) -> None:
    assert main(command(tmp_path / "out")) == 0
    stored = tmp_path / "out" / "job.yaml"
    assert yaml.safe_load(stored.read_text())["seed"] == 0
    assert main(["sample", "--config", str(stored)]) == 0
