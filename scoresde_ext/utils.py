"""Checkpoints in upstream's format, read without executing anything."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

STATE = ("optimizer", "model", "ema", "step")


def require_keys(state: Any, keys: Sequence[str] = STATE) -> None:
    """A training state has these keys."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"state: expected the keys {', '.join(keys)}, got one without {', '.join(missing)}.")


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes ``{'optimizer', 'model', 'ema', 'step'}``, the keys of ``state``, as a :func:`whole_file`.

    Numpy numbers are written as Python's, so that :func:`restore_checkpoint` can read whatever is written.

    Raises:
        ValueError: ``state`` lacks a key, or holds something else that ``weights_only`` does not read. Nothing is
            written then.
    """
    require_keys(state)
    saved = {
        "optimizer": _plain(state["optimizer"].state_dict()),
        "model": state["model"].state_dict(),
        "ema": _plain(state["ema"].state_dict()),
        "step": _whole(state["step"]),
    }
    with whole_file(path) as file:
        torch.save(saved, file)
        file.flush()
        _check_readable(Path(file.name), saved)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to. It gets its name when all is written and synced: no half-written one is ever found there."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """``value`` with Python's numbers where containers hold numpy's. Tensors stay what they are: a learning rate may be
    one."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_plain(key): _plain(v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def _whole(step: Any) -> int:
    if int(step) != step:
        raise ValueError(f"step: expected a whole number, got {step!r}.")
    return int(step)


def _check_readable(path: Path, saved: dict[str, Any]) -> None:
    """That :func:`read_torch_file` reads what was written. The arrays are mapped, not read."""
    try:
        read_torch_file(path, "cpu", mmap=True)
    except pickle.UnpicklingError:
        name, value = _unreadable("state", saved) or ("state", saved)
        raise ValueError(
            f"{name}: expected tensors, numbers, strings and containers of them, got {type(value).__name__}, "
            "which weights_only does not read. Convert it, or allow it with torch.serialization.add_safe_globals."
        ) from None


def _unreadable(name: str, value: Any) -> tuple[str, Any] | None:
    """The innermost value that :func:`read_torch_file` does not read, and its place."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if found := _unreadable(f"{name}[{key!r}]", inner):
                return found
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        read_torch_file(file, "cpu")
    except pickle.UnpicklingError:
        return name, value
    return None


def restore_checkpoint(
    path: str | os.PathLike[str], state: dict[str, Any], device: torch.device | str
) -> dict[str, Any]:
    """Loads a checkpoint of ours or of upstream's into ``state`` and returns it.

    The prefixes ``module.`` of DataParallel and ``_orig_mod.`` of torch.compile are added or dropped as the model asks.
    Loading is always ``weights_only``; upstream's files hold a numpy number (its learning rate), and exactly that type
    is allowed.

    Raises:
        FileNotFoundError: there is no such file. (Upstream creates a folder and goes on with random weights.)
        ValueError: a key is missing, there or in ``state``; the optimizer's state or the averages do not fit.
        RuntimeError: the weights do not fit the model.

    ``state`` is as it was after each of these.
    """
    require_keys(state)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a checkpoint file, found none at {os.fspath(path)!r}.")
    loaded = read_torch_file(path, device)
    missing = [key for key in STATE if key not in loaded]
    if missing:
        raise ValueError(
            f"path: expected a checkpoint with the keys optimizer, model, ema, step; "
            f"{os.fspath(path)!r} lacks {', '.join(missing)}."
        )
    optimizer, step = _plain(loaded["optimizer"]), _whole(loaded["step"])
    _check_optimizer(state["optimizer"], optimizer)
    before = {key: state[key].state_dict() for key in ("optimizer", "ema")}  # loading makes new tensors beside these
    try:
        state["optimizer"].load_state_dict(optimizer)
        state["ema"].load_state_dict(_plain(loaded["ema"]))
        load_weights(state["model"], loaded["model"])
    except Exception:
        for key, value in before.items():
            state[key].load_state_dict(value)
        raise
    state["step"] = step
    return state


def _check_optimizer(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
    """That the state goes with the parameters of ``optimizer``; torch itself compares their number alone."""
    groups = [group["params"] for group in optimizer.param_groups]
    sizes, wanted = [len(group["params"]) for group in loaded["param_groups"]], [len(group) for group in groups]
    if sizes != wanted:
        raise ValueError(f"optimizer: expected the state of {wanted} parameters in its groups, got {sizes}.")
    numbers = [number for group in loaded["param_groups"] for number in group["params"]]
    for number, p in zip(numbers, (p for group in groups for p in group), strict=True):
        for name, value in loaded["state"].get(number, {}).items():
            if name in _LIKE_THE_PARAMETER and isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"optimizer: expected {name} of shape {tuple(p.shape)} for parameter {number}, "
                    f"got {tuple(value.shape)}."
                )


_LIKE_THE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def read_torch_file(
    path: str | os.PathLike[str] | IO[bytes], device: torch.device | str, mmap: bool | None = None
) -> Any:
    """What torch.save wrote, read by ``weights_only``; upstream's numpy number is allowed beside."""
    with torch.serialization.safe_globals(_NUMPY_NUMBER):
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)


_NUMPY_SCALAR = np.float64(0.0).__reduce__()[0]  # the function that rebuilds a pickled numpy number


def _old_numpy_scalar(*arguments: Any) -> Any:
    """The same under the name by which numpy < 2 wrote it. Names are looked at where torch 2.5 knows no other way."""
    return _NUMPY_SCALAR(*arguments)


_old_numpy_scalar.__module__, _old_numpy_scalar.__name__ = "numpy.core.multiarray", "scalar"
_old_numpy_scalar.__qualname__ = _old_numpy_scalar.__name__

_NUMPY_NUMBER: list[Any] = [_NUMPY_SCALAR, _old_numpy_scalar, np.dtype, np.dtypes.Float64DType]


def load_weights(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Loads weights whose names may have other wrappers than the model's: ``module.`` of DataParallel, ``_orig_mod.``
    of torch.compile, at any place. RuntimeError where they do not fit; the model is then as it was."""
    own = model.state_dict()
    renamed = _renamed(weights, own)
    if len(renamed) < len(weights):
        renamed = weights  # names that differ by a wrapper alone mean what they say
    elif hasattr(weights, "_metadata"):  # versions of the modules, by their names
        renamed._metadata = _renamed(weights._metadata, own._metadata)  # type: ignore[attr-defined]
    fits = own.keys() == renamed.keys() and all(_shape(own[name]) == _shape(renamed[name]) for name in own)
    before = None if fits else copy.deepcopy(own)  # torch loads what fits before it refuses the rest
    try:
        model.load_state_dict(renamed)
    except Exception:
        if before is not None:
            model.load_state_dict(before)
        raise


def _renamed(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """``values`` by those of ``names`` that are the same without wrappers."""
    by_bare_name = {_bare(name): name for name in names}
    return OrderedDict((by_bare_name.get(_bare(name), name), value) for name, value in values.items())


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None
