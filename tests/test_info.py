"""What the installation says about itself: build_info() and the command line."""

import os
import subprocess
import sys

import pytest
import torch

import scoresde_ext
from scoresde_ext import _C
from scoresde_ext.__main__ import devices, main


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"compiler", "torch", "cuda", "cpu_capabilities", "cpu_capability"}
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert torch.__version__.startswith(info["torch"])
    assert info["cuda"] is None or set(info["cuda"]) == {"nvcc", "archs"}
    assert info["cpu_capabilities"][0] == "generic"
    assert info["cpu_capability"] in info["cpu_capabilities"]


@pytest.mark.parametrize("capability", _C.build_info()["cpu_capabilities"])
def test_a_lower_instruction_set_can_be_asked_for(capability):
    known = _C.build_info()["cpu_capabilities"]
    best = _C.build_info()["cpu_capability"]
    code = "from scoresde_ext import _C; print(_C.build_info()['cpu_capability'])"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SCORESDE_EXT_CPU": capability},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == min(capability, best, key=known.index)


def test_info_is_a_table_of_the_build(capsys):
    assert main(["info"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace(" kernels", "-kernels").splitlines())
    build = _C.build_info()
    assert rows["scoresde_ext"] == scoresde_ext.__version__
    assert rows["torch"] == f"{torch.__version__} (built against {build['torch']})"
    assert rows["compiler"] == build["compiler"]
    assert rows["CPU-kernels"].startswith(f"{build['cpu_capability']} in use")
    cuda = build["cuda"]
    assert rows["CUDA-kernels"] == (f"{cuda['archs']} by nvcc {cuda['nvcc']}" if cuda else "not built")
    assert rows["device"] in devices()


def test_devices_say_why_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices() == [f"cpu (torch {torch.__version__} is a build without CUDA)"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices() == ["cpu (torch finds no CUDA device)"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_devices_are_named():
    assert len(devices()) == torch.cuda.device_count()
    assert devices()[0].startswith(f"cuda:0 {torch.cuda.get_device_name(0)}, sm_")


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "usage: scoresde" in out and "info" in out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["inform"])
    assert "inform" in capsys.readouterr().err


def test_both_names_of_the_command_line():
    script = os.path.join(os.path.dirname(sys.executable), "scoresde")
    for command in ([sys.executable, "-m", "scoresde_ext"], [script]):
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert answer.stdout.strip() == scoresde_ext.__version__
