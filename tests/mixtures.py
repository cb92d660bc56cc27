"""A program of upstream's layout, some of whose modules are ours."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROGRAM = str(Path(__file__).parent / "program")
MODULES = ("sde_lib", "losses", "sampling", "likelihood", "models.utils")


@contextmanager
def program(ours: Sequence[str], fork: str = "upstream") -> Iterator[SimpleNamespace]:
    """The modules of the program, those named from us."""
    names = (*MODULES, "models")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, PROGRAM)
    try:
        for name in ours:
            sys.modules[name] = importlib.import_module(f"scoresde_ext.{name}")
        made = SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES})
        if "models.utils" not in ours:
            made.utils.LARGEST_LABEL = 500 if fork == "labels" else 999
            made.utils.OUTPUT_SCALE = 0.5 if fork == "scale" else 1.0
        if "sde_lib" not in ours and fork == "schedule":
            change_schedule(made.sde_lib.BetaSDE)
        yield made
    finally:
        sys.path.remove(PROGRAM)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def change_schedule(cls: Any) -> None:
    cls.beta = lambda self, t: self.beta_0 + t**2 * (self.beta_1 - self.beta_0)
    cls.log_mean = lambda self, t: -(t**3) / 6 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
