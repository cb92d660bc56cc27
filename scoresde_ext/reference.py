"""What every op means, in plain torch: specification, test oracle, and the path for what no kernel covers.

The functions here have the names and arguments of those in :mod:`scoresde_ext.ops`. They compute in the dtype of their
arguments, accept coefficients that require gradients, and make no attempt at speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """One draw of standard normal noise for a batch: either the array ``z``, or the streams that it is generated from.
    (Or, from :func:`scoresde_ext.ops.perturb_keeping`, streams and in ``z`` what they give for the first samples.)

    Element e of sample b is a function of ``(key[0], ids[b], key[1] + draw, e)`` alone.

    Args:
        z: noise, the shape of the array it goes with.
        key: int64 ``(2,)``, seed and first draw, on the device of the array.
        ids: int64 ``(B,)``, stream of each sample; None means 0 .. B-1.
        draw: which draw of the streams, counted from the key's first.
    """

    z: Tensor | None = None
    key: Tensor | None = None
    ids: Tensor | None = None
    draw: int = 0


def rows(c: Tensor | float, x: Tensor) -> Tensor | float:
    """One coefficient a sample, shape ``(B,)``, shaped to multiply ``x`` of shape ``(B, *)``. Numbers pass through."""
    return c.reshape(-1, *[1] * (x.dim() - 1)) if isinstance(c, Tensor) else c


def _noise(draw: Draw, x: Tensor) -> Tensor:
    if draw.key is None:
        assert draw.z is not None
        return draw.z
    return noise_normal(draw.key, draw.ids, draw.draw, x.shape).to(x.dtype)


def affine(x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None) -> Tensor:
    """p x + q out"""
    mean = rows(p, x) * x
    return mean if out is None or q is None else mean + rows(q, x) * out


def affine_noise(
    x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None, n: Tensor | float, draw: Draw
) -> tuple[Tensor, Tensor]:
    """mean = p x + q out; next = mean + n z"""
    mean = affine(x, out, p, q)
    return mean, mean + rows(n, x) * _noise(draw, x)


def affine_next(
    x: Tensor, out: Tensor | None, p: Tensor | float, q: Tensor | float | None, n: Tensor | float, draw: Draw
) -> Tensor:
    """p x + q out + n z"""
    return affine_noise(x, out, p, q, n, draw)[1]


def perturb(x0: Tensor, m: Tensor | float, s: Tensor | float, draw: Draw) -> Tensor:
    """m x0 + s z"""
    return affine_noise(x0, None, m, None, s, draw)[1]


def score_loss(
    out: Tensor, c: Tensor | float | None, d: Tensor | float | None, w: Tensor | float, draw: Draw | None
) -> tuple[Tensor, Tensor]:
    """r = c out + d z; loss = w sum r^2 over each sample; gradient = d loss / d out = 2 w c r.
    (The op keeps 2 c r in half precision, and multiplies by w in the backward pass.)"""
    r = torch.zeros_like(out)
    if c is not None:
        r = r + rows(c, out) * out
    if d is not None and draw is not None:
        r = r + rows(d, out) * _noise(draw, out)
    loss = w * r.square().reshape(out.shape[0], math.prod(out.shape[1:])).sum(1)
    grad = 2 * rows(w, out) * rows(c, out) * r if c is not None else torch.zeros_like(out)
    return loss, grad


def combine(arrays: Sequence[Tensor], coefficients: Tensor | Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
    """``sum_k C[m, k] arrays[k]`` for every line m of the coefficients, ``(M, K)`` or, one matrix a sample,
    ``(M, K, B)``."""
    results = []
    for line in coefficients:
        total = rows(line[0], arrays[0]) * arrays[0]
        for c, array in zip(line[1:], arrays[1:], strict=True):
            total = total + rows(c, array) * array
        results.append(total)
    return tuple(results)


def rk_stage(y: Tensor, ks: Sequence[Tensor], a: Sequence[float], h: Tensor | float) -> Tensor:
    """y + h sum_j a_j k_j"""
    total = torch.zeros_like(y)
    for a_j, k_j in zip(a, ks, strict=True):
        total = total + a_j * k_j
    return y + rows(h, y) * total


def slope_at(
    y: Tensor,
    ks: Sequence[Tensor],
    h: Tensor | float,
    x: Tensor | Sequence[float],
    out: Tensor,
    f: Tensor | float | None,
    q: Tensor | float,
) -> Tensor:
    """f x + q out, without f q out. Coefficients for x: x = y + h sum_j x_j k_j."""
    if f is None:
        return rows(q, out) * out
    return affine(x if isinstance(x, Tensor) else rk_stage(y, ks, x, h), out, f, q)


def rk_drift_stage(
    y: Tensor,
    ks: Sequence[Tensor],
    a: Sequence[float],
    h: Tensor | float,
    x: Tensor | Sequence[float],
    out: Tensor,
    f: Tensor | float | None,
    q: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """k = f x + q out; y + h (sum_j a_j k_j + a_last k)"""
    k = slope_at(y, ks, h, x, out, f, q)
    return k, rk_stage(y, [*ks, k], a, h)


def rk_last_stage(
    y: Tensor,
    ks: Sequence[Tensor],
    a: Sequence[Sequence[float]],
    h: Tensor | float,
    x: Tensor | Sequence[float],
    out: Tensor,
    f: Tensor | float | None,
    q: Tensor | float,
) -> tuple[Tensor, ...]:
    """k as above, then for each line of a: y + h (sum_j a_j k_j + a_last k) for the first two, the sum for others"""
    slopes = [*ks, slope_at(y, ks, h, x, out, f, q)]
    none = torch.zeros_like(y)
    return slopes[-1], *(
        rk_stage(y, slopes, c, h) if m < 2 else rk_stage(none, slopes, c, 1.0) for m, c in enumerate(a)
    )


def rk_error(
    y0: Tensor, y1: Tensor, ks: Sequence[Tensor], e: Sequence[float], h: Tensor | float, rtol: float, atol: float
) -> Tensor:
    """Per sample: sum over elements of (h sum_j e_j k_j / (atol + rtol max(|y0|, |y1|)))^2, in float64"""
    err = rk_stage(torch.zeros_like(y0), ks, e, h)
    scaled = err / (atol + rtol * torch.maximum(y0.abs(), y1.abs()))
    return scaled.double().square().reshape(y0.shape[0], math.prod(y0.shape[1:])).sum(1)


def rk_drift_error(
    y0: Tensor,
    y1: Tensor,
    ks: Sequence[Tensor],
    e: Sequence[float],
    h: Tensor | float,
    out: Tensor,
    f: Tensor | float | None,
    q: Tensor | float,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """rk_error with one more slope, k = f y1 + q out; and that slope"""
    k = slope_at(y1, (), h, y1, out, f, q)
    return rk_error(y0, y1, [*ks, k], e, h, rtol, atol), k


def rk_control(norm: Tensor, h: Tensor, after_rejection: Tensor, exponent: float) -> Tensor:
    """Rows: accepted (1 or 0); the next |h|. Factor 0.9 norm^exponent within [0.2, 10], at most 1 after a rejection."""
    factor = (0.9 * norm**exponent).clamp(0.2, 10.0).nan_to_num(0.2)
    accepted = norm < 1
    factor = torch.where(accepted & after_rejection, factor.clamp(max=1.0), factor)
    factor = torch.where(accepted, factor, factor.clamp(max=0.9))
    return torch.stack([accepted.to(h.dtype), h * factor])


def put(into: Tensor, values: Tensor, chosen: Tensor) -> None:
    """into = values in the samples that are chosen"""
    into.copy_(torch.where(chosen.reshape(-1, *[1] * (into.dim() - 1)), values, into))


# ---- counter-based noise ----

_LOW = 0xFFFFFFFF


def _multiply(m: int, v: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of m v, for a 32-bit m and words v held in int64: products of 16-bit halves stay below 2^63."""
    low = m * (v & 0xFFFF)
    high = m * (v >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on 32-bit words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


PROCESSES = ("vp", "subvp", "ve")


def marginal(u: Tensor, first: float, last: float, process: str, a: float, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """t = first + (last - first) u; m, s of p(x_t | x_0) = N(m x_0, s^2)"""
    t = u * (last - first) + first
    if process == "ve":
        return t, torch.ones_like(t), a * (b / a) ** t
    log_m = -0.25 * t * t * (b - a) - 0.5 * t * a
    variance = -torch.expm1(2.0 * log_m)
    return t, log_m.exp(), variance.sqrt() if process == "vp" else variance


def _words(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int]) -> Tensor:
    """The random words of every block, shape (B, blocks, 4)."""
    batch, blocks = size[0], (math.prod(size[1:]) + 3) // 4
    seed, first = (int(v) for v in key)
    stream = torch.arange(batch, device=key.device) if ids is None else ids
    stream = stream[:, None].expand(batch, blocks)
    block = torch.arange(blocks, device=key.device).expand(batch, blocks)
    counter = (block, torch.full_like(block, (first + draw) & _LOW), stream & _LOW, (stream >> 32) & _LOW)
    return torch.stack(philox(counter, (seed & _LOW, (seed >> 32) & _LOW)), dim=-1)


def _elements(values: Tensor, size: Sequence[int]) -> Tensor:
    return values.reshape(size[0], values.shape[1] * 4)[:, : math.prod(size[1:])].reshape(tuple(size))


def noise_normal(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int]) -> Tensor:
    """Standard normals (Box and Muller 1958): words (a, b) give sqrt(-2 ln u) (cos, sin)(2 pi b / 2^32) with u = (a +
    1/2) / 2^32, u and the result rounded to float32."""
    a, b = _words(key, ids, draw, size).double().unflatten(-1, (2, 2)).unbind(-1)
    radius = (-2 * ((a + 0.5) / 2**32).float().double().log()).sqrt()
    angle = 2 * math.pi * b / 2**32
    return _elements(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1), size).float()


def noise_uniform(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int]) -> Tensor:
    """Uniform on [0, 1) in float32, 24 bits."""
    return _elements((_words(key, ids, draw, size) >> 8).float() / 2**24, size)


def noise_integers(key: Tensor, ids: Tensor | None, draw: int, size: Sequence[int], high: int) -> Tensor:
    """Uniform on {0, ..., high - 1}: floor(word high / 2^32), int64."""
    return _elements(_multiply_shift(_words(key, ids, draw, size), high), size)


def _multiply_shift(word: Tensor, high: int) -> Tensor:
    return (((word & 0xFFFF) * high >> 16) + (word >> 16) * high) >> 16
