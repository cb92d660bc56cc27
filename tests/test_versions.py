"""What is promised of torch and Python stands in several places, and is tried by .ci/versions.py."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = runpy.run_path(str(ROOT / ".ci" / "versions.py"))


def first_in(name: str, pattern: str) -> str:
    return re.search(pattern, (ROOT / name).read_text())[1]


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    oldest = first_in("pyproject.toml", r'"torch>=([\d.]+)"')
    assert first_in("setup.py", r"TORCH_NEEDED = \((\d+, \d+)\)").replace(", ", ".") == oldest
    assert first_in("README.md", r"has torch ([\d.]+) or later") == oldest
    assert first_in("docs/versions.md", r"torch ([\d.]+) or later") == oldest
    assert next(iter(VERSIONS["PAIRS"])).startswith(f"{oldest}.")


def test_every_promised_version_is_tried() -> None:
    pairs = VERSIONS["PAIRS"]
    minors = [int(version.split(".")[1]) for version in pairs]
    assert minors == list(range(minors[0], minors[-1] + 1))
    of_constraints = first_in("constraints.txt", r"torch==([\d.]+)")
    oldest_python = first_in("pyproject.toml", r'requires-python = ">=([\d.]+)"')
    assert pairs[of_constraints][0] == oldest_python
    assert set(pairs[of_constraints]) == {python for pythons in pairs.values() for python in pythons}


def test_rows_are_in_order_and_say_what_ran() -> None:
    found = {"result": "5 passed", "tests": "all", "minutes": 12.4, "commit": "abc"}
    failed = found | {"result": "does not build: error"}
    assert VERSIONS["rows"]({"2.11.0 3.12": found, "2.9.1 3.10": failed})[2:] == [
        "| 2.9.1 | 3.10 | all | does not build: error | 12 | abc |",
        "| 2.11.0 | 3.12 | all | 5 passed | 12 | abc |",
    ]


def test_what_failed_is_named() -> None:
    said = "[1/2] c++ a.cpp\na.cpp:3:6: error: no type named 'type_identity'\nninja: build stopped\n"
    assert VERSIONS["first_error"](said) == "a.cpp:3:6: error: no type named 'type_identity'"
    with pytest.raises(VERSIONS["Failed"], match="there is no python9.9"):
        VERSIONS["find_python"]("9.9")


@pytest.mark.skipif(sys.platform != "linux", reason="stand-ins are ELF libraries")
def test_stand_ins_are_loaded_in_the_place_of_missing_libraries(tmp_path: Path) -> None:
    """A library that needs another, with a version and without one, loads where the other was deleted."""
    lib, away = tmp_path / "torch" / "lib", tmp_path / "away"
    lib.mkdir(parents=True)
    away.mkdir()
    compile_shared = ["gcc", "-shared", "-fPIC"]
    for name, code, script in (
        ("libversioned.so.7", "int versioned(void) { return 1; }", "V_7 { global: versioned; };"),
        ("libplain.so.1", "int plain(void) { return 1; }", None),
    ):
        (tmp_path / "code.c").write_text(code)
        (tmp_path / "script").write_text(script or "")
        script_flags = [f"-Wl,--version-script={tmp_path / 'script'}"] if script else []
        subprocess.run(
            [*compile_shared, f"-Wl,-soname,{name}", *script_flags, "-o", away / name, tmp_path / "code.c"], check=True
        )
    (tmp_path / "code.c").write_text(
        "int versioned(void); int plain(void); int sum(void) { return versioned() + plain(); }"
    )
    libraries = [away / "libversioned.so.7", away / "libplain.so.1"]
    subprocess.run([*compile_shared, "-o", lib / "libtorch.so", tmp_path / "code.c", *libraries], check=True)
    for library in libraries:
        library.unlink()

    load = [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(lib / 'libtorch.so')!r}).sum())"]
    assert subprocess.run(load, capture_output=True).returncode != 0
    subprocess.run([sys.executable, ROOT / ".ci" / "stand_ins.py", lib.parent, tmp_path / "out"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path / "out")}
    assert subprocess.check_output(load, env=environment, text=True).strip() == "200"  # CUDA's "no device", twice
