"""setup.py, what is packaged, and what an import says where the extension is missing."""

import ast
import importlib
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import scoresde_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "scoresde_ext"


class Setup:
    """Runs setup.py as far as its call of setup(), and keeps what it was going to build."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(setuptools, "setup", self.keep)
        # What setup.py changes, and what would reach it from this machine.
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        monkeypatch.setattr(cpp_extension, "_check_cuda_version", cpp_extension._check_cuda_version)
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        for name in ("SCORESDE_EXT_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.setenv(name, "")

    def keep(self, ext_modules, cmdclass):
        (self.extension,) = ext_modules

    def __call__(self, **environment):
        for name, value in environment.items():
            self.monkeypatch.setenv(name, str(value))
        self.functions = runpy.run_path("setup.py", run_name="__main__")
        return self.extension


@pytest.fixture
def setup_py(monkeypatch):
    return Setup(monkeypatch)


def listed(numbers):
    """What nvcc --list-gpu-arch prints."""
    return "".join(f"compute_{number}\n" for number in numbers.split())


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a CUDA 12.4 toolkit to setup.py, reached through a script that lies elsewhere."""
    home = tmp_path / "cuda-12.4"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    answers = {
        "--version": "Cuda compilation tools, release 12.4, V12.4.131",
        "--list-gpu-arch": listed("50 52 53 60 61 62 70 72 75 80 86 87 89 90"),
        "*": f"#$ TOP={home}/bin/..",  # of a dry run
    }
    cases = "\n".join(f'{asked}) echo "{answer}";;' for asked, answer in answers.items())
    nvcc.write_text(f"#!/bin/sh\ncase $1 in {cases} esac\n")
    nvcc.chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(f'#!/bin/sh\nexec "{nvcc}" "$@"\n')
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    return home


def macros(extension):
    return {flag for flag in extension.extra_compile_args["cxx"] if flag.startswith("-D")}


def test_without_nvcc_the_build_is_for_the_cpu(setup_py, tmp_path):
    extension = setup_py(CUDA_HOME=tmp_path)
    assert extension.name == "scoresde_ext._C"
    assert "csrc/torch/ops.cpp" in extension.sources and "csrc/kernels/cpu_generic.cpp" in extension.sources
    assert all(source.endswith(".cpp") for source in extension.sources)
    assert "cudart_static" not in extension.libraries and not macros(extension)
    assert "-ffp-contract=off" in extension.extra_compile_args["cxx"]


@pytest.mark.parametrize("found_by", ["CUDA_HOME", "PATH"])
def test_with_nvcc_cuda_is_built_in(setup_py, toolkit, found_by):
    if found_by == "CUDA_HOME":
        extension = setup_py(CUDA_HOME=toolkit)
    else:
        extension = setup_py(PATH=f"{toolkit.parent}/bin:/usr/bin:/bin")
    assert Path(cpp_extension.CUDA_HOME) == toolkit
    assert extension.libraries[:4] == ["cudart_static", "rt", "dl", "pthread"]
    assert extension.library_dirs[0] == str(toolkit / "lib64")
    assert {source for source in extension.sources if source.endswith(".cu")} == {
        str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/kernels/*.cu")
    }
    assert macros(extension) == {
        "-DSCORESDE_EXT_WITH_CUDA",
        '-DSCORESDE_EXT_NVCC="12.4"',
        '-DSCORESDE_EXT_CUDA_ARCHS="7.0+PTX;8.0;9.0"',
    }
    flags = [flag for flag in extension.extra_compile_args["nvcc"] if "arch" in flag]
    assert flags == [
        "-gencode=arch=compute_70,code=sm_70",
        "-gencode=arch=compute_70,code=compute_70",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    assert cpp_extension._get_cuda_arch_flags(flags) == []  # torch adds none of its own


def test_architectures_are_the_users_where_given(setup_py, toolkit):
    extension = setup_py(CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST="7.5")
    assert '-DSCORESDE_EXT_CUDA_ARCHS="7.5"' in macros(extension)
    flags = extension.extra_compile_args["nvcc"]
    assert cpp_extension._get_cuda_arch_flags(flags) == ["-gencode=arch=compute_75,code=sm_75"]


@pytest.mark.parametrize(
    ("known", "archs"),
    [
        ("35 37 50 52 53 60 61 62 70 72 75 80 86 87 89 90", "7.0+PTX;8.0;9.0"),  # 11.8
        ("50 52 53 60 61 62 70 72 75 80 86 87 89 90 90a 100 100a 101 120", "7.0+PTX;8.0;9.0;10.0;12.0"),  # 12.8
        ("75 80 86 87 88 89 90 100 110 103 120 121", "7.5+PTX;8.0;9.0;10.0;12.0"),  # 13.0
        ("75 80 86 87 88 89 90 100 110 103 120 121 107 130", "7.5+PTX;8.0;9.0;10.0;12.0"),  # one to come
    ],
)
def test_the_default_architectures_are_those_the_nvcc_knows(setup_py, known, archs):
    setup_py(SCORESDE_EXT_CUDA="0")
    assert ";".join(setup_py.functions["default_archs"](listed(known))) == archs


def test_an_nvcc_without_a_usable_architecture_is_named(setup_py):
    setup_py(SCORESDE_EXT_CUDA="0")
    for answer in (listed("35 50 61"), "nvcc fatal   : Unknown option '-list-gpu-arch'"):
        with pytest.raises(SystemExit, match="no architecture of compute capability 7.0 or later: set TORCH_CUDA_ARCH"):
            setup_py.functions["default_archs"](answer)


def test_cuda_can_be_left_out_by_hand(setup_py, toolkit):
    assert not macros(setup_py(CUDA_HOME=toolkit, SCORESDE_EXT_CUDA="0"))


def test_cuda_of_another_major_is_a_warning_that_names_both(setup_py, toolkit, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "-DSCORESDE_EXT_WITH_CUDA" in macros(setup_py(CUDA_HOME=toolkit))
    assert re.search(r"warning: nvcc is of CUDA 12\.4 and torch \S+ of CUDA 13\.0", capsys.readouterr().err)
    cpp_extension._check_cuda_version("g++", None)  # torch's own refusal is out of the way

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    setup_py(CUDA_HOME=toolkit)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"SCORESDE_EXT_CUDA": "1"}, "SCORESDE_EXT_CUDA=1 asks for CUDA, but there is no nvcc"),
        ({"SCORESDE_EXT_CUDA": "yes"}, "SCORESDE_EXT_CUDA must be 0 or 1, or unset .*'yes'"),
    ],
)
def test_a_wrong_choice_of_cuda_is_one_sentence(setup_py, tmp_path, environment, sentence):
    with pytest.raises(SystemExit, match=sentence):
        setup_py(CUDA_HOME=tmp_path, **environment)


def test_a_broken_nvcc_is_one_sentence(setup_py, toolkit):
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(SystemExit, match="does not answer as a CUDA compiler.*SCORESDE_EXT_CUDA=0"):
        setup_py(CUDA_HOME=toolkit)


def test_without_torch_the_build_says_what_to_install(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"`pip install torch`, then `pip install --no-build-isolation \.`"):
        setup_py()


def test_a_torch_too_old_is_named(setup_py, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(SystemExit, match=r"torch >= 2\.11.*2\.9\.1\+cu128"):
        setup_py()


@pytest.mark.parametrize(
    "version, standard",
    [("2.11.0+cu130", "-std=c++17"), ("2.13.0+cpu", "-std=c++17"), ("2.14.1+cu130", "-std=c++20")],
)
def test_the_sources_are_compiled_by_the_oldest_standard_that_torch_allows(
    setup_py, toolkit, monkeypatch, version, standard
):
    """So a build with the torch of constraints.txt shows what the oldest one would refuse."""
    monkeypatch.setattr(torch, "__version__", version)
    arguments = setup_py(CUDA_HOME=toolkit).extra_compile_args
    assert [[flag for flag in arguments[of] if "std=" in flag] for of in ("cxx", "nvcc")] == [[standard]] * 2


def test_a_setuptools_too_old_is_named_before_it_reads_pyproject(setup_py, monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    sentence = (
        r'needs setuptools >= 77, .* has 65\.5\.0: run `pip install "setuptools>=77" ninja`, then `pip install --no-'
    )
    with pytest.raises(SystemExit, match=sentence):
        setup_py()
    assert not hasattr(setup_py, "extension")


def test_the_same_setuptools_everywhere(setup_py):
    setup_py(SCORESDE_EXT_CUDA="0")
    needed = f'"setuptools>={setup_py.functions["SETUPTOOLS_NEEDED"]}"'
    assert f"requires = [{needed}, " in (ROOT / "pyproject.toml").read_text()
    assert f"pip install {needed} ninja && pip install --no-build-isolation ." in (ROOT / "README.md").read_text()


def test_without_compiler_or_python_headers_the_build_says_so(setup_py, monkeypatch, tmp_path):
    setup_py(SCORESDE_EXT_CUDA="0")
    check_compiler = setup_py.functions["check_compiler"]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    with pytest.raises(SystemExit, match="has no Python.h: install them"):
        check_compiler()
    (tmp_path / "Python.h").touch()
    check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"no no-such-compiler: install g\+\+"):
        check_compiler()


def test_cuda_is_compiled_again_where_a_header_is_newer(setup_py, tmp_path, monkeypatch):
    setup_py(SCORESDE_EXT_CUDA="0")
    monkeypatch.chdir(tmp_path)
    header, source, compiled = Path("csrc/math/a.h"), Path("csrc/kernels/a.cu"), Path("temp/csrc/kernels/a.o")
    for age, path in ((3, source), (2, header), (1, compiled)):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    setup_py.functions["forget_stale_cuda"]("temp")
    assert compiled.exists()
    os.utime(header, (1e9, 1e9))
    setup_py.functions["forget_stale_cuda"]("temp")
    assert not compiled.exists()


def test_the_sdist_holds_everything_a_build_needs(tmp_path):
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__", "golden")
    shutil.copytree(ROOT, copy, ignore=ignore)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "scoresde_ext/py.typed"]
    needed += [str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*")]
    needed += [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py*") if "__pycache__" not in path.parts]
    assert set(needed) <= names


@pytest.mark.parametrize("folder", ["math", "kernels"])
def test_no_torch_header_below_csrc_torch(folder):
    files = [path for path in (ROOT / "csrc" / folder).iterdir() if path.suffix in {".h", ".cuh", ".cpp", ".cu"}]
    assert files
    for path in files:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11)/", path.read_text()), path


def test_no_two_sources_share_an_object_file():
    sources = [path.with_suffix("") for path in ROOT.glob("csrc/*/*") if path.suffix in {".cpp", ".cu"}]
    assert len(sources) == len(set(sources))


def test_every_dependency_is_pinned_and_torch_to_its_cpu_build():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==[\w.+]+( ; .+)?", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    pinned = {pin[1].lower() for pin in pins if pin}
    required = {re.match(r"[\w-]+", line)[0].lower() for line in importlib.metadata.requires("scoresde_ext")}
    assert required - {"scoresde_ext"} <= pinned
    torch_pins = [line for line in lines if line.startswith("torch==")]
    assert all("+cpu" in line or 'sys_platform != "linux"' in line for line in torch_pins)


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("scoresde_ext") == scoresde_ext.__version__


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the package file alone, importable under its own name beside the real one."""
    package = tmp_path / "scoresde_checkout"
    package.mkdir()
    shutil.copy(PACKAGE / "__init__.py", package)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def test_import_without_extension_says_how_to_build(checkout):
    with pytest.raises(ImportError, match="has not been built: run `pip install --no-build-isolation -e .`"):
        importlib.import_module(checkout.name)


def test_import_beside_an_installed_package_says_what_hides_it(checkout, tmp_path, monkeypatch):
    installed = tmp_path / "site-packages"
    (installed / checkout.name).mkdir(parents=True)
    (installed / checkout.name / "__init__.py").touch()
    (installed / checkout.name / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    sentence = (
        rf"not been built in {tmp_path}, whose files hide the package installed in {installed} \(work in another "
        r"folder to use that one\): run `pip install --no-build-isolation -e \.` in the repository"
    )
    with pytest.raises(ImportError, match=sentence):
        importlib.import_module(checkout.name)


def test_import_with_an_extension_of_another_python(checkout):
    (checkout / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    with pytest.raises(ImportError, match=r"not been built for this Python .*only _C\.cpython-39.*`pip install --no"):
        importlib.import_module(checkout.name)


def test_import_with_an_extension_that_does_not_load(checkout):
    (checkout / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"does not load with torch .*another \(.*\): run `pip install --no-build"):
        importlib.import_module(checkout.name)


def test_import_with_an_extension_for_another_torch(checkout):
    (checkout / "_C.py").write_text("def build_info():\n    return {'torch': '2.9.1'}\n")
    with pytest.raises(ImportError, match=r"built against torch 2\.9\.1, and torch \S+ is installed: run `pip"):
        importlib.import_module(checkout.name)


def test_the_command_line_without_extension_prints_no_traceback(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "scoresde_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-m", "scoresde_ext", "info"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 1
    assert re.search(r"has not been built.*: run `pip install", answer.stderr) and "Traceback" not in answer.stderr


def test_import_is_light():
    """Only the extension is loaded: no scipy, none of the modules that the user has not asked for."""
    code = "import sys, scoresde_ext; print([m for m in sys.modules if m.startswith(('scipy', 'scoresde_ext.'))])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(ast.literal_eval(answer.stdout)) == [f"scoresde_ext._C{part}" for part in ("", ".calls", ".host")]
