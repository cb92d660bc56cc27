"""Checkpoints in upstream's format, read without executing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes ``{'optimizer', 'model', 'ema', 'step'}``, first to a temporary name beside ``path``: no half-written
    checkpoint is ever left. ``state`` has the same keys."""
    saved = {
        "optimizer": state["optimizer"].state_dict(),
        "model": state["model"].state_dict(),
        "ema": state["ema"].state_dict(),
        "step": state["step"],
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def restore_checkpoint(
    path: str | os.PathLike[str], state: dict[str, Any], device: torch.device | str
) -> dict[str, Any]:
    """Loads a checkpoint of ours or of upstream's into ``state`` and returns it.

    The ``module.`` prefix that DataParallel leaves is added or dropped as the model asks. Loading is always
    ``weights_only``; upstream's files hold a numpy number (its learning rate), and exactly that type is allowed.

    Raises:
        FileNotFoundError: there is no such file. (Upstream creates a folder and goes on with random weights.)
        ValueError: a key is missing.
        RuntimeError: the weights do not fit the model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a checkpoint file, found none at {os.fspath(path)!r}.")
    loaded = read_torch_file(path, device)
    missing = [key for key in ("optimizer", "model", "ema", "step") if key not in loaded]
    if missing:
        raise ValueError(
            f"path: expected a checkpoint with the keys optimizer, model, ema, step; "
            f"{os.fspath(path)!r} lacks {', '.join(missing)}."
        )
    optimizer = loaded["optimizer"]
    for group in optimizer["param_groups"]:
        group.update({key: value.item() for key, value in group.items() if isinstance(value, np.generic)})
    state["model"].load_state_dict(with_prefix_of(state["model"], loaded["model"]), strict=True)
    state["optimizer"].load_state_dict(optimizer)
    state["ema"].load_state_dict(loaded["ema"])
    state["step"] = int(loaded["step"])
    return state


def read_torch_file(path: str | os.PathLike[str], device: torch.device | str) -> Any:
    """What torch.save wrote, read by ``weights_only``; upstream's numpy number is allowed beside."""
    with torch.serialization.safe_globals(_NUMPY_NUMBER):
        return torch.load(path, map_location=device, weights_only=True)


# The function that rebuilds a pickled numpy number; numpy < 2 wrote it under its old name.
_NUMPY_SCALAR = np.float64(0.0).__reduce__()[0]
_NUMPY_NUMBER: list[Any] = [
    _NUMPY_SCALAR,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
]


def with_prefix_of(model: torch.nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights with the ``module.`` of DataParallel where ``model`` has it, and without it elsewhere."""
    prefix = "module."
    wanted = all(key.startswith(prefix) for key in model.state_dict())
    bare = {key.removeprefix(prefix): value for key, value in weights.items()}
    return {prefix + key: value for key, value in bare.items()} if wanted else bare
