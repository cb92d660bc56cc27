"""Score networks in closed form: the score of the data is known exactly, so samplers and solvers have right answers.

Networks are called as ``network(x, labels)`` with ``x`` of shape (B, *) and ``labels`` of shape (B,), and return
an array like ``x``.  What labels are and what the network returns is upstream's convention, named by ``label_mode``:

============  =======================================  ==========================================
label_mode    labels                                   output
============  =======================================  ==========================================
vp_cont       999 t                                    -score * std(t) of the VP SDE
subvp_cont    999 t                                    -score * std(t) of the sub-VP SDE
vp_disc       t (N - 1), as floats                     -score * sqrt(1 - alpha_bar[label])
ve_cont       sigma(t)                                 score
ve_disc       integers, 0 the largest of the N sigmas  score
============  =======================================  ==========================================
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

# labels -> (m, s, k), all (B,): x_t given x_0 is N(m x_0, s^2), and the network's output is k times the score.
LabelMeaning = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def per_sample(v: Tensor, x: Tensor) -> Tensor:
    """View v (B,) so that it broadcasts over x (B, *)."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


def label_meaning(label_mode: str, p0: float, p1: float, N: int) -> LabelMeaning:
    """What labels of this mode say about the marginal; (p0, p1) are the betas of (sub-)VP or the sigmas of VE."""
    if label_mode in ("vp_cont", "subvp_cont"):

        def continuous(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            t = labels / 999
            log_m = -0.25 * t**2 * (p1 - p0) - 0.5 * t * p0
            variance = -torch.expm1(2 * log_m)
            s = variance.sqrt() if label_mode == "vp_cont" else variance
            return log_m.exp(), s, -s

        return continuous

    if label_mode == "vp_disc":
        alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(p0 / N, p1 / N, N))).float()

        def discrete(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            a = alpha_bar.to(labels.device)[labels.long()]
            s = (1 - a).sqrt()
            return a.sqrt(), s, -s

        return discrete

    if label_mode not in ("ve_cont", "ve_disc"):
        raise ValueError(f"unknown label_mode {label_mode!r}")

    def exploding(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = labels if label_mode == "ve_cont" else p0 * (p1 / p0) ** (1 - labels.float() / (N - 1))
        return torch.ones_like(s), s, torch.ones_like(s)

    return exploding


class ToyModel(nn.Module):
    """a x + b sin(w labels) + c tanh(x): no score of anything, but smooth and dependent on both arguments."""

    def __init__(self, a: float, b: float, c: float, w: float) -> None:
        super().__init__()
        self.a, self.b, self.c, self.w = a, b, c, w

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        wave = torch.sin(self.w * labels.to(x.dtype))
        return self.a * x + self.b * per_sample(wave, x) + self.c * torch.tanh(x)


class GaussianModel(nn.Module):
    """Data N(mu, s^2 I): score = -(x - m mu) / (m^2 s^2 + std^2).  mu: one number, or one for every entry of axis 1."""

    def __init__(
        self, label_mode: str, p0: float, p1: float, N: int, mu: float | Sequence[float] = 0.0, s: float = 1.0
    ) -> None:
        super().__init__()
        self.meaning = label_meaning(label_mode, p0, p1, N)
        self.register_buffer("mu", torch.tensor(mu, dtype=torch.float32))
        self.s = s

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        m, std, k = self.meaning(labels)
        mu = along_channels(self.mu, x)
        return per_sample(-k / (m**2 * self.s**2 + std**2), x) * (x - per_sample(m, x) * mu)


class MixtureModel(nn.Module):
    """Data sum_k w_k N(mu_k, s_k^2 I).  A sample is one point: its elements share the responsibilities."""

    def __init__(
        self,
        label_mode: str,
        p0: float,
        p1: float,
        N: int,
        mus: Sequence[float] | Sequence[Sequence[float]],
        ss: Sequence[float],
        ws: Sequence[float],
    ) -> None:
        super().__init__()
        self.meaning = label_meaning(label_mode, p0, p1, N)
        self.register_buffer("mus", torch.tensor(mus, dtype=torch.float32))
        self.ss, self.ws = list(ss), list(ws)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        m, std, k = self.meaning(labels)
        dimension = x[0].numel()
        log_weights, scores = [], []
        for mu, s, w in zip(self.mus, self.ss, self.ws, strict=True):
            variance = m**2 * s**2 + std**2
            offset = x - per_sample(m, x) * along_channels(mu, x)
            squared = offset.reshape(len(x), -1).square().sum(1)
            log_weights.append(math.log(w) - 0.5 * dimension * variance.log() - 0.5 * squared / variance)
            scores.append(-offset / per_sample(variance, x))
        share = torch.softmax(torch.stack(log_weights, 1), dim=1)
        mixed = sum(per_sample(share[:, i], x) * score for i, score in enumerate(scores))
        return per_sample(k, x) * mixed


class TinyTrainNet(nn.Module):
    """conv3x3(x) + g sin(0.01 labels): 85 parameters, enough to see six optimiser steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, kernel_size=3, padding=1)
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.conv(x) + self.g * per_sample(torch.sin(0.01 * labels.float()), x)


def along_channels(mu: Tensor, x: Tensor) -> Tensor:
    """View mu, one number or (C,), so that it broadcasts along axis 1 of x (B, C, *)."""
    return mu.to(x.dtype) if mu.ndim == 0 else mu.to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
