"""``scoresde calibrate`` and ``scoresde likelihood``."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..grids import calibrate_grid
from ..integrate import SolverError
from ..likelihood import get_likelihood_fn
from . import files, networks
from .settings import Calibrate, Likelihood, Problem, Refused, first_line, reason


def prepared(settings: Problem, shape: tuple[int, ...] | None = None) -> tuple[Any, Any, torch.device, tuple[int, ...]]:
    """Network, SDE, device and the shape of a sample, which is the network's if None."""
    check_writable(settings.out)
    device = networks.choose_device(settings.device, 0)
    sde = networks.make_sde(settings)
    network = networks.load_network(settings, device)
    shape = networks.sample_shape(settings, network) if shape is None else shape
    networks.try_network(network, sde, shape, device, continuous=True)
    return network, sde, device, shape


def check_writable(out: str) -> None:
    """Refused where no file can be written under this name."""
    path = Path(out)
    probe = path.with_name(f".{path.name}.{os.getpid()}{files.PARTIAL}")
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(f"out: cannot write to {out}: {reason(error)}") from None


def calibrate(settings: Calibrate) -> int:
    """Writes the grid, and says how exact it is."""
    network, sde, device, shape = prepared(settings)
    try:
        grid = calibrate_grid(
            sde,
            network,
            (1, *shape),
            nfe=settings.nfe,
            order=settings.order,
            eps=settings.eps,
            samples=settings.samples,
            coefficients=settings.coefficients,
            seed=settings.seed,
            device=device,
            progress=True,
        )
    except ValueError as error:
        raise Refused(first_line(error)) from None
    except SolverError as error:
        if error.__cause__ is not None:  # of the network
            raise error.__cause__ from None
        print(f"scoresde calibrate: stopped: {first_line(error)}", file=sys.stderr)
        return 1
    grid.save(settings.out)
    print(
        f"{settings.out}: {grid.nfe} evaluations a sample, {'theoretical' if grid.fitted is None else 'fitted'} "
        f"coefficients; held-out samples are off by {grid.rms_held_out:.2g} (rms), the median one by "
        f"{grid.median_held_out:.2g}"
    )
    return 0


def likelihood(settings: Likelihood) -> int:
    """Writes ``bpd`` (or ``log_p``, in nats) and ``ids``. Returns 1 where some are not finite."""
    data = read_data(settings)
    network, sde, device, _ = prepared(settings, tuple(data.shape[1:]))
    low, high = settings.data_range
    options: dict[str, Any] = {"rtol": settings.rtol, "atol": settings.atol, "eps": settings.eps}

    def likelihood_fn(first: int, stop: int) -> Any:
        return get_likelihood_fn(
            sde,
            lambda x: (x - low) / (high - low),
            settings.hutchinson,
            epsilons=settings.epsilons,
            units=settings.units,
            levels=settings.levels,
            control="per_sample",
            seeds=(settings.seed, range(first, stop)),
            **options,
        )

    try:
        likelihood_fn(0, 1)
    except (ValueError, NotImplementedError) as error:
        raise Refused(first_line(error)) from None
    values, failed = [], 0
    with tqdm(total=len(data), unit=" samples", disable=None) as bar:
        for first in range(0, len(data), settings.batch):
            part = data[first : first + settings.batch].to(device)
            try:
                solution = likelihood_fn(first, first + len(part)).solve(network, part)
            except SolverError as error:
                if error.solution is None or error.__cause__ is not None:
                    raise error.__cause__ or error from None
                solution = error.solution
            values.append(solution.y[1].double().cpu().numpy())
            failed += int((solution.status != 0).sum())
            bar.update(len(part))
    found = np.concatenate(values)
    name = "bpd" if settings.units == "bits/dim" else "log_p"
    arrays: dict[str, Any] = {name: found, "ids": np.arange(len(found))}
    files.write_file(Path(settings.out), lambda file: np.savez(file, **arrays))
    good = found[np.isfinite(found)]
    print(f"{settings.out}: {len(good)} of {len(found)}, mean {name} {good.mean() if len(good) else np.nan:.4f}")
    return 1 if failed else 0


def read_data(settings: Likelihood) -> Tensor:
    """The data in the network's range, ``(n, *shape)`` float32."""
    path = settings.data
    networks.read(path, "data")
    try:
        if path.endswith(".npz"):
            with np.load(path) as found:
                samples = found["samples"]
        elif path.endswith(".npy"):
            samples = np.load(path)
        else:
            loaded = torch.load(path, weights_only=True)
            samples = (loaded["samples"] if isinstance(loaded, dict) else loaded).numpy()
    except (KeyError, ValueError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise Refused(f"data: expected samples in {path}: {first_line(error):.200}") from None
    if samples.ndim < 2 or len(samples) == 0:
        raise Refused(f"data: expected samples (n, ...), got an array of shape {samples.shape}")
    if samples.dtype == np.uint8:
        low, high = settings.data_range
        return torch.from_numpy(samples).movedim(-1, 1).float() * ((high - low) / 255.0) + low
    data = torch.from_numpy(samples).float()
    if not bool(data.isfinite().all()):
        raise Refused(f"data: expected finite values in {path}, got NaN or Inf")
    return data
