"""The files of samples, in the formats that people use."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import files
from .settings import Refused, Sample

SUFFIX = {"npz": ".npz", "npy": ".npy", "pt": ".pt", "png": ".zip", "png-folder": ""}


def name_of(settings: Sample, first: int) -> str:
    """Names in order of their ids."""
    return f"samples-{first:012d}{SUFFIX[settings.format]}"


def is_image(format: str) -> bool:
    """Whether the format keeps 8-bit images."""
    return format in ("npz", "png", "png-folder")


def check_format(settings: Sample, shape: tuple[int, ...]) -> None:
    """Refused where samples of this shape cannot be kept so."""
    if is_image(settings.format) and len(shape) != 3:
        raise Refused(f"format: {settings.format} holds images (C, H, W), got samples of shape {shape}. Take npy or pt")
    if settings.format.startswith("png") and shape[0] not in (1, 3):
        raise Refused(f"format: png holds 1 or 3 channels, got samples of shape {shape}. Take npz, npy or pt")


def to_uint8(x: Tensor, data_range: tuple[float, float]) -> Tensor:
    """Images ``(n, C, H, W)`` as 8-bit ones, ``(n, H, W, C)``: the range becomes 0 to 255, rounded, cut at its ends."""
    low, high = data_range
    scaled = ((x - low) * (255.0 / (high - low))).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def encoded(settings: Sample, x: Tensor) -> np.ndarray:
    """Samples ``(n, *shape)`` as the files have them: uint8 NHWC, or float32 as they are."""
    y = to_uint8(x, settings.data_range) if is_image(settings.format) else x.float()
    return y.cpu().numpy()


def bytes_of(settings: Sample, shape: tuple[int, ...], samples: int) -> int:
    """About how much disk they take: exact to the headers, an upper bound for png."""
    each = math.prod(shape) * (1 if is_image(settings.format) else 4)
    if settings.format.startswith("png"):
        each += 4096 if settings.format == "png-folder" else 300
    shards = -(-samples // (settings.shard_size or samples))
    return samples * (each + 8) + shards * 1500


# ---- writing ----


def png(image: np.ndarray) -> bytes:
    """An image ``(H, W, C)``."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def png_name(i: int) -> str:
    return f"{i:012d}.png"


def _write_npz(file: BinaryIO, samples: np.ndarray, ids: np.ndarray) -> None:
    np.savez(file, samples=samples, ids=ids)


def _write_npy(file: BinaryIO, samples: np.ndarray, ids: np.ndarray) -> None:
    np.save(file, samples)


def _write_pt(file: BinaryIO, samples: np.ndarray, ids: np.ndarray) -> None:
    torch.save({"samples": torch.from_numpy(samples), "ids": torch.from_numpy(ids)}, file)


def _write_zip(file: BinaryIO, samples: np.ndarray, ids: np.ndarray) -> None:
    with zipfile.ZipFile(file, "w") as archive:  # a PNG is compressed already
        for image, i in zip(samples, ids.tolist(), strict=True):
            archive.writestr(zipfile.ZipInfo(png_name(i)), png(image))


def _write_folder(path: Path, samples: np.ndarray, ids: np.ndarray) -> None:
    for image, i in zip(samples, ids.tolist(), strict=True):
        (path / png_name(i)).write_bytes(png(image))


_WRITERS: dict[str, Callable[..., None]] = {
    "npz": _write_npz,
    "npy": _write_npy,
    "pt": _write_pt,
    "png": _write_zip,
    "png-folder": _write_folder,
}


def write(folder: Path, settings: Sample, first: int, samples: np.ndarray, ids: np.ndarray, worker: int) -> str:
    """Writes a shard, see :func:`files.write_file`; returns its SHA-256."""
    put: Any = files.write_folder if settings.format == "png-folder" else files.write_file
    writer = _WRITERS[settings.format]
    return put(folder / name_of(settings, first), lambda into: writer(into, samples, ids), f"{worker}-{os.getpid()}")


# ---- reading ----


def read(path: Path, format: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """The samples of a shard, the first ``limit``, and their ids; npy has none."""
    if format == "npz":
        with np.load(path) as found:
            return found["samples"][:limit], found["ids"][:limit]
    if format == "npy":
        return np.array(np.load(path, mmap_mode="r")[:limit]), None
    if format == "pt":
        loaded = torch.load(path, weights_only=True, mmap=True)
        return loaded["samples"][:limit].numpy(), loaded["ids"][:limit].numpy()
    from PIL import Image

    def opened(content: Any) -> np.ndarray:
        image = np.asarray(Image.open(content))
        return image if image.ndim == 3 else image[:, :, None]

    if format == "png":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()[:limit]
            images = [opened(io.BytesIO(archive.read(name))) for name in names]
    else:
        names = sorted(os.listdir(path))[:limit]
        images = [opened(path / name) for name in names]
    return np.stack(images) if images else np.zeros((0, 1, 1, 1), np.uint8), np.array([int(n[:-4]) for n in names])


def ids_in(path: Path, format: str) -> np.ndarray | int:
    """The ids in a shard; for npy, how many samples it has."""
    if format == "npz":
        with np.load(path) as found:
            return found["ids"]
    if format == "npy":
        return len(np.load(path, mmap_mode="r"))
    if format == "pt":
        return torch.load(path, weights_only=True, mmap=True)["ids"].numpy()
    if format == "png":
        with zipfile.ZipFile(path) as archive:
            return np.array([int(name[:-4]) for name in archive.namelist()], np.int64)
    return np.array(sorted(int(name[:-4]) for name in os.listdir(path)), np.int64)


# ---- preview ----


def sheet(samples: np.ndarray, columns: int = 8, smallest: int = 32) -> bytes:
    """Images ``(n, H, W, C)`` uint8 side by side, as PNG; small ones are enlarged by a whole factor."""
    n, height, width, channels = samples.shape
    scale, gap = max(1, -(-smallest // max(height, width))), 2
    cell = np.array([height * scale + gap, width * scale + gap])
    rows = -(-n // columns)
    whole = np.full((*(cell * (rows, min(n, columns)) + gap), channels), 32, np.uint8)
    for i, image in enumerate(samples):
        y, x = cell * divmod(i, columns) + gap
        whole[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return png(whole)
