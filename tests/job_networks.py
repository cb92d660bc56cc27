"""Tiny networks for the tests of jobs, named as file.py:function."""

import os
import signal

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """The noise in images of independent pixels, about N(bias, gain^2). Sums, products, quotients and roots,
    which are rounded the same at any place in an array."""

    sample_shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.bias = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        t = (labels / 999).reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        m = (1 - t) / (1 + 4 * t * t)  # about that of the VP SDE
        s = (1 - m * m).clamp(min=0).sqrt()
        return s * ((x - m * self.bias) / (m * m * self.gain * self.gain + s * s) + 0.1 * x / (1 + x * x))


class Odd(Tiny):
    """NaN for samples whose first pixel starts above 2, once t is below 0.8."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        wrong = (x.flatten(1)[:, 0] > 1.5) & (labels < 800)
        return torch.where(wrong.reshape(-1, 1, 1, 1), torch.nan, super().forward(x, labels))


class Short(Tiny):
    """Out of memory with more than 4 samples."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x, labels)


class Vector(Tiny):
    sample_shape = (6,)


class Crash(Tiny):
    """Kills its process at its 30th evaluation in the worker of rank 1 that was not restarted."""

    calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.calls == 30 and first and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, labels)


def tiny() -> Tiny:
    return Tiny()


def odd() -> Odd:
    return Odd()


def short() -> Short:
    return Short()


def vector() -> Vector:
    return Vector()


def crash() -> Crash:
    return Crash()


def flat() -> Tiny:
    network = Tiny()
    network.sample_shape = 16  # type: ignore[assignment]
    return network


def unlike() -> nn.Module:
    """Takes other samples."""
    return nn.Linear(3, 3)


def from_file(path: str) -> Tiny:
    network = Tiny()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def broken() -> Tiny:
    raise RuntimeError("cannot be made")


def no_network() -> str:
    return "a network"
