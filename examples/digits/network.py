"""A compact U-Net score network for 8x8 images, and its checkpoints.

No other file of this folder is needed to load one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from scoresde_ext.sde_lib import VESDE, VPSDE, AffineSDE, subVPSDE

SDES: dict[str, Callable[[], AffineSDE]] = {"vp": VPSDE, "subvp": subVPSDE, "ve": VESDE}

DATA_POWER = 0.7  # mean square of a pixel in [-1, 1]


class ResidualBlock(nn.Module):
    """Two convolutions on a skip connection; the embedding of the noise level is added between them."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.level = nn.Linear(embedding, channels_out)
        self.norm2 = nn.GroupNorm(8, channels_out)
        self.conv2 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.level(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(silu(self.norm2(h)))


class DigitsNetwork(nn.Module):
    """``model(x, labels)`` for images ``(B, 1, 8, 8)`` in [-1, 1] and labels ``(B,)``, for continuous times of one SDE.

    Labels and output are those of score_sde_pytorch: label 999 t and output ``-score std`` for VP and sub-VP; label
    sigma and output ``score`` for VE. With ``x = m x_0 + s z``, v the mean square of the data and
    ``a = 1 / sqrt(m^2 v + s^2)``, the estimate of the noise is::

        z = s a^2 x + m sqrt(v) a unet(a x, log(s / m))

    The first term is the best linear estimate. The U-Net sees inputs of unit size for every SDE at every time, and
    log(s / m) in place of the time: the network is then smooth in it, and an adaptive integrator needs few steps.

    Args:
        sde: ``'vp'``, ``'subvp'`` or ``'ve'``, with its default constants.
        width: channels at 8x8, a multiple of 8; at 4x4 there are twice as many. 32 makes 397 thousand parameters.
    """

    frequencies: Tensor

    sample_shape = (1, 8, 8)

    def __init__(self, sde: str, width: int = 32) -> None:
        super().__init__()
        if sde not in SDES:
            raise ValueError(f"sde: expected one of {', '.join(SDES)}, got {sde!r}.")
        self.sde = SDES[sde]()
        self.arguments = {"sde": sde, "width": width}
        wide, embedding = 2 * width, 4 * width
        # For the default width these are exact in half precision too.
        self.register_buffer("frequencies", torch.arange(1, width // 2 + 1) / (width // 2), persistent=False)
        self.embed = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down8 = ResidualBlock(width, width, embedding)
        self.shrink = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.down4 = ResidualBlock(wide, wide, embedding)
        self.middle = ResidualBlock(wide, wide, embedding)
        self.up4 = ResidualBlock(2 * wide, wide, embedding)
        self.grow = nn.ConvTranspose2d(wide, width, 2, stride=2)
        self.up8 = ResidualBlock(2 * width, width, embedding)
        self.norm = nn.GroupNorm(8, width)
        self.last = zero(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if isinstance(self.sde, VESDE):
            m, s = torch.ones_like(labels), labels
        else:
            m, s = self.sde.marginal_coefficients(labels / 999)
        a = torch.rsqrt(m * m * DATA_POWER + s * s)
        unet = self.unet(rows(a, x) * x, torch.log(s / m))
        z = rows(s * a * a, x) * x + rows(m * math.sqrt(DATA_POWER) * a, x) * unet
        return -z / rows(s, x) if isinstance(self.sde, VESDE) else z

    def unet(self, x: Tensor, level: Tensor) -> Tensor:
        phase = level[:, None] * self.frequencies
        embedding = self.embed(torch.cat([phase.sin(), phase.cos()], dim=1).to(x.dtype))
        h8 = self.down8(self.first(x), embedding)
        h4 = self.down4(self.shrink(h8), embedding)
        h = self.up4(torch.cat([self.middle(h4, embedding), h4], dim=1), embedding)
        h = self.up8(torch.cat([self.grow(h), h8], dim=1), embedding)
        return self.last(silu(self.norm(h)))


def zero(layer: Any) -> Any:
    """The layer with all parameters 0: a residual branch, or the network, that starts as nothing trains best."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def rows(v: Tensor, x: Tensor) -> Tensor:
    """One number a sample, ``(B,)``, as ``(B, 1, 1, 1)`` in the dtype of ``x``."""
    return v.to(x.dtype)[:, None, None, None]


def save(path: str | os.PathLike[str], network: DigitsNetwork, **notes: object) -> None:
    """Writes the weights as safetensors. Its metadata hold what :func:`load` needs, and ``notes``."""
    metadata = {key: str(value) for key, value in {**network.arguments, **notes}.items()}
    safetensors.torch.save_file(network.state_dict(), path, metadata)


def load(path: str | os.PathLike[str]) -> DigitsNetwork:
    """The network that :func:`save` wrote, in evaluation mode, on the CPU. ``network.sde`` is the SDE it belongs to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of this network.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    missing = [key for key in ("sde", "width") if key not in metadata]
    if missing:
        raise ValueError(
            f"path: expected a checkpoint that train.py wrote, but the metadata of {os.fspath(path)!r} lack "
            f"{' and '.join(missing)}."
        )
    network = DigitsNetwork(metadata["sde"], int(metadata["width"]))
    network.load_state_dict(safetensors.torch.load_file(path))
    return network.eval()
