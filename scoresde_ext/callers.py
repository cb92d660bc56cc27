"""What concerns the code that calls the package: warnings that point at it, and torch.compile around it."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

WITHIN = (f"{Path(__file__).parent}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def warn(message: str) -> None:
    """A warning at the line outside of this package, and of torch, that the call came from: Python then shows it once
    for each such line."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(WITHIN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def say_no_gradient(name: str, *values: Tensor) -> None:
    """A warning where a gradient is asked for by what no gradient is recorded for."""
    if torch.is_grad_enabled() and any(v.requires_grad for v in values):
        warn(
            f"{name}: a gradient is wanted (requires_grad=True), but none is recorded: backward() of the result does "
            "not reach it. Detach it, or call this within torch.no_grad(), to say that this is meant."
        )


def untraced(function: Function) -> Function:
    """For what runs a loop of its own: torch.compile around it leaves it and all it calls as they are. (A compiled
    network stays compiled.) As ``torch.compiler.disable``, which takes seconds to import, where nothing compiles."""
    disabled: Any = None

    @functools.wraps(function)
    def entrance(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = sys.modules["torch._dynamo"].disable(function)
        return disabled(*args, **kwargs)

    return entrance  # type: ignore[return-value]


def constant_when_compiled(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which takes seconds to import: the mark that it leaves. Before torch
    2.12 arguments may not be objects: there the graph ends, and another one begins behind the call."""
    if torch.__version__ < "2.12":
        return untraced(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
