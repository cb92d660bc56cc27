"""The network that a user names, with the weights of a checkpoint.

Two things are executed: the module that was named, and its function. Checkpoints are read without executing anything.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import sde_lib, utils
from ..models import utils as mutils
from ..models.ema import check_shapes
from .settings import Problem, Refused, first_line, reason, sizes

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_SDES: dict[str, Any] = {"vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE, "ve": sde_lib.VESDE}


def make_sde(settings: Problem, N: int | None = None) -> sde_lib.AffineSDE:
    """The SDE that was asked for."""
    given = settings.sde_options or {}
    options: dict[str, Any] = {name: int(v) if v.is_integer() else v for name, v in given.items()}
    make = _SDES[settings.sde]
    known = list(inspect.signature(make).parameters)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; is {near[0]} meant?" if near else ""
            raise Refused(f"sde_options: {settings.sde} has the options {', '.join(known)}, got {name}{meant}")
    if N is not None:
        options["N"] = N
    try:
        return make(**options)
    except ValueError as error:
        raise Refused(f"sde_options: {first_line(error)}") from None


def source_of(name: str) -> Path | None:
    """The file of ``file.py:function``; None for a module."""
    place = name.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else None


def find_function(name: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` or ``package.module:function`` names."""
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise Refused(f"network: expected file.py:function or package.module:function, got {name!r}")
    path = source_of(name)
    if path is not None and not path.is_file():
        raise Refused(f"network: there is no file {path}")
    try:
        module = _import_file(path) if path is not None else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise Refused(f"network: cannot import {place}: {type(error).__name__}: {first_line(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        public = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise Refused(f"network: {place} has no function {function!r}; it has {', '.join(public) or 'none'}")
    return found


def _import_file(path: Path) -> Any:
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as Python does for a script: the file may import its neighbours
        sys.path.insert(0, folder)
    name = f"{path.stem}_of_scoresde_job"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_network(settings: Problem, device: torch.device) -> Any:
    """The network, on its device, in its dtype and in evaluation mode.

    The function is called with the checkpoint's path where it takes one argument. Where it takes none it makes the
    network, and the weights are loaded into it here.
    """
    function = find_function(settings.network)
    path = settings.checkpoint
    if path is not None and not Path(path).is_file():
        raise Refused(f"checkpoint: there is no file {path}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        parameters = ()  # type: ignore[assignment]
    takes_path = any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters
    )
    if takes_path and path is None:
        raise Refused(f"checkpoint: {settings.network} reads one. Say which")
    try:
        network = function(path) if takes_path else function()
        if path is not None and not takes_path:
            load_weights(network, path, settings.weights)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"network: {settings.network} failed: {type(error).__name__}: {first_line(error)}") from None
    if isinstance(network, torch.nn.Module):
        network = network.to(device, getattr(torch, settings.dtype)).eval().requires_grad_(False)
    elif not callable(network):
        raise Refused(f"network: expected a network from {settings.network}, got {type(network).__name__}")
    return network


def load_weights(network: Any, path: str, which: str) -> None:
    """Weights of a safetensors file, of a torch file of weights, or of upstream's ``{'optimizer', 'model', 'ema',
    'step'}``, ``which`` then being ``ema`` or ``model``."""
    if not isinstance(network, torch.nn.Module):
        raise Refused(f"checkpoint: expected a torch.nn.Module to load {path} into, got {type(network).__name__}")
    try:
        if path.endswith(".safetensors"):
            import safetensors.torch

            weights: dict[str, Any] = safetensors.torch.load_file(path)
        else:
            weights = utils.read_torch_file(path, "cpu")
    except Exception as error:
        why = (
            "it holds more than weights, and is not run" if "weights_only" in str(error).lower() else first_line(error)
        )
        raise Refused(f"checkpoint: cannot read {path}: {why:.200}") from None
    if not isinstance(weights, dict):
        raise Refused(f"checkpoint: expected weights by name in {path}, got {type(weights).__name__}")
    average = weights.get("ema") if "model" in weights else None
    weights = weights.get("model", weights)
    try:
        utils.load_weights(network, weights)
        if average is not None and which == "ema":
            parameters = list(network.parameters())
            trained = [p for p in parameters if p.requires_grad] or parameters  # all, where it comes frozen
            check_shapes("ema", average["shadow_params"], trained)
            with torch.no_grad():
                for p, shadow in zip(trained, average["shadow_params"], strict=True):
                    p.copy_(shadow)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise Refused(f"checkpoint: {path} does not fit the network: {first_line(error):.300}") from None


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device of this worker: ``cuda`` is one GPU a worker."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"device: cannot use {name!r}: {first_line(error):.200}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def sample_shape(settings: Problem, network: Any) -> tuple[int, ...]:
    """As asked for, or as the network has it."""
    shape = settings.shape or getattr(network, "sample_shape", None)
    if shape is None:
        raise Refused("shape: the network has no attribute sample_shape. Give --shape, for example 3,32,32")
    try:
        return sizes(shape)
    except ValueError as error:
        raise Refused(f"shape: {error}, got {shape!r:.100}") from None


def try_network(network: Any, sde: sde_lib.SDE, shape: tuple[int, ...], device: torch.device, continuous: bool) -> None:
    """One evaluation shows what does not fit."""
    x = torch.zeros((1, *shape), device=device)
    try:
        with torch.no_grad():
            score_fn = mutils.get_score_fn(sde, network, continuous=continuous)
            score_fn(x, torch.full((1,), float(sde.T), device=device))
    except Exception as error:
        what = f"network: does not take a sample of shape {shape}"
        raise Refused(f"{what}: {type(error).__name__}: {first_line(error):.300}") from None


def read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Refused(f"{what}: cannot read {path}: {reason(error)}") from None
