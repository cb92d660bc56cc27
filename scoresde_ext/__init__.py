"""Score-based generative modeling through SDEs on fused C++ and CUDA kernels.

The modules are those of upstream score_sde_pytorch, imported one by one::

    from scoresde_ext import sde_lib, losses, sampling, likelihood

Importing the package loads the compiled extension, which registers ``torch.ops.scoresde_ext``.
"""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

import torch

__version__ = "0.1.0"


def _hidden_package() -> str | None:
    """The folder of a built package of this name further down sys.path: Python looks in the current folder first."""
    here = Path(__file__).parent
    for folder in map(Path, sys.path):
        package = folder / here.name
        if package.resolve() != here.resolve() and PathFinder.find_spec(f"{__name__}._C", [str(package)]) is not None:
            return str(folder)
    return None


def _fault_of_extension() -> str | None:
    """Imports _C and returns None, or what is wrong with it."""
    # Looked for in this folder alone: an editable install of another checkout would offer its own.
    if PathFinder.find_spec(f"{__name__}._C", __path__) is None:
        if hidden := _hidden_package():
            here = Path(__file__).parents[1]
            return (
                f"has not been built in {here}, whose files hide the package installed in {hidden} (work in another "
                "folder to use that one)"
            )
        others = ", ".join(sorted(path.name for path in Path(__file__).parent.glob("_C.*.so")))
        return f"has not been built for this Python (there is only {others})" if others else "has not been built"
    try:
        built = import_module(f"{__name__}._C").build_info()["torch"]
    except ImportError as error:
        return f"does not load with torch {torch.__version__}, likely because it was built against another ({error})"
    # Another minor version may load and crash later: torch keeps its C++ interface within one only.
    if built.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"was built against torch {built}, and torch {torch.__version__} is installed"
    return None


if (_fault := _fault_of_extension()) is not None:
    raise ImportError(
        f"The compiled extension of scoresde_ext {_fault}: run `pip install --no-build-isolation -e .` in the "
        "repository (or `.` in place of `-e .`).",
        name=__name__,
    )
