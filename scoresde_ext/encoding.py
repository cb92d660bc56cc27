"""Data to latent codes and back along the probability-flow ODE, and interpolation between codes (Song et al. 2021,
section 4.3 and appendix D.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .callers import say_no_gradient, untraced
from .checks import as_real, as_whole, check_eps, check_state, check_tolerances, real
from .flow import ProbabilityFlow
from .foreign import recognised
from .integrate import SolverError
from .likelihood import row_dot
from .models.program import score_function
from .ode import solve_ode
from .sde_lib import SDE

__all__ = ["decode", "encode", "interpolate", "slerp"]


@untraced
def encode(
    sde: SDE,
    model: Any,
    data: Tensor,
    *,
    eps: float = 1e-3,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Any = "RK45",
    control: str = "joint",
    coordinate: str = "t",
    order: int = 3,
    steps: int | None = None,
    grid: Any = None,
    max_steps: int = 10_000,
    on_failure: str = "raise",
    progress: bool = False,
) -> Tensor:
    """The latent codes of ``data``: its states at T, when followed along the probability-flow ODE from eps on.

    A latent code is what ``get_ode_sampler``'s sampler takes as ``z`` and :func:`decode` as ``latents``; with the same
    ``eps`` both lead back to the data, to the tolerances.

    Args:
        sde: the forward SDE.
        model: a network trained on continuous times; it is put into evaluation mode.
        data: ``(B, *)`` in the network's range; float32 or float64.
        eps: the time of the data.
        rtol, atol, method: as in :func:`scoresde_ext.sampling.get_ode_sampler`.
        control, coordinate, order, steps, max_steps, on_failure: as in :func:`scoresde_ext.integrate.solve`. With
            ``on_failure='status'``, samples that failed are NaN.
        grid: the times of fixed steps, from eps to T.
        progress: a progress bar on a terminal.

    Returns:
        ``(B, *)``, in the dtype of ``data``.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: samples could not be finished; ``.solution`` has the others, NaN where one failed.
    """
    options = {"control": control, "coordinate": coordinate, "order": order, "steps": steps, "grid": grid}
    options |= {"max_steps": max_steps, "on_failure": on_failure, "progress": progress}
    T = recognised(sde).T
    return _follow(sde, model, "data", data, (check_eps(eps, T), T), method, rtol, atol, options)


@untraced
def decode(
    sde: SDE,
    model: Any,
    latents: Tensor,
    *,
    eps: float = 1e-3,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Any = "RK45",
    control: str = "joint",
    coordinate: str = "t",
    order: int = 3,
    steps: int | None = None,
    grid: Any = None,
    max_steps: int = 10_000,
    on_failure: str = "raise",
    progress: bool = False,
) -> Tensor:
    """The data of ``latents`` ``(B, *)``, in the network's range: the way back from T to eps.

    Arguments and errors are those of :func:`encode`; a ``grid`` runs from T to eps.
    """
    options = {"control": control, "coordinate": coordinate, "order": order, "steps": steps, "grid": grid}
    options |= {"max_steps": max_steps, "on_failure": on_failure, "progress": progress}
    T = recognised(sde).T
    return _follow(sde, model, "latents", latents, (T, check_eps(eps, T)), method, rtol, atol, options)


def _follow(
    sde: SDE,
    model: Any,
    name: str,
    x: Tensor,
    span: tuple[float, float],
    method: Any,
    rtol: float,
    atol: float,
    options: dict[str, Any],
) -> Tensor:
    """The state at the end of ``span`` from that at its start."""
    rtol, atol = check_tolerances(rtol, atol)
    check_state(name, x)
    say_no_gradient(name, x)
    flow = ProbabilityFlow(sde, score_function(sde, model, False, True))
    try:
        with torch.no_grad():
            return solve_ode(flow, span, (x,), method, rtol=rtol, atol=atol, **options).y[0]
    except SolverError as error:
        if error.solution is not None:
            error.solution = replace(error.solution, y=error.solution.y[0])
        raise


@untraced
def interpolate(
    sde: SDE,
    model: Any,
    a: Tensor,
    b: Tensor,
    weights: int | Sequence[float] | Tensor = 8,
    *,
    eps: float = 1e-3,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Any = "RK45",
    control: str = "joint",
    coordinate: str = "t",
    order: int = 3,
    steps: int | None = None,
    max_steps: int = 10_000,
    progress: bool = False,
) -> Tensor:
    """Samples between ``a`` and ``b``: both are encoded, their codes interpolated by :func:`slerp`, and those decoded.

    All ``n B`` codes are decoded as one batch.

    Args:
        a, b: data ``(B, *)`` in the network's range, of one shape, dtype and device.
        weights: ``n`` weights of ``b``, each in [0, 1]; or their number n >= 2, for 0, 1 / (n - 1), ..., 1. The weights
            0 and 1 give ``a`` and ``b`` again, to the tolerances.

    The other arguments are those of :func:`encode`.

    Returns:
        ``(n, B, *)``, in the dtype of ``a``.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: samples could not be finished. They are numbered through a and then b while these are encoded, and
            through the result as ``(n B, *)`` while it is decoded; the message starts with which.
    """
    wanted = _check_weights(weights)
    check_state("a", a)
    check_state("b", b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"b: expected a tensor like a, {a.dtype} {tuple(a.shape)} on {a.device}, got {b.dtype} {tuple(b.shape)} on "
            f"{b.device}."
        )
    options: dict[str, Any] = {"eps": eps, "rtol": rtol, "atol": atol, "method": method, "control": control}
    options |= {"coordinate": coordinate, "order": order, "steps": steps, "max_steps": max_steps, "progress": progress}
    say_no_gradient("a, b", a, b)
    a, b = a.detach(), b.detach()
    try:
        stage = "encoding a and b"
        z_a, z_b = encode(sde, model, torch.cat([a, b]), **options).split(len(a))
        latents = torch.cat([slerp(z_a, z_b, w) for w in wanted])
        stage = "decoding"
        return decode(sde, model, latents, **options).reshape(len(wanted), *a.shape)
    except SolverError as error:
        raise SolverError(f"While {stage}: {error}", error.solution) from error


def _check_weights(weights: Any) -> list[float]:
    n = as_whole(weights)
    if n is not None:
        if n < 2:
            raise ValueError(f"weights: expected at least 2 samples from a to b, or a list of weights, got {n}.")
        return [i / (n - 1) for i in range(n)]
    try:
        wanted = [as_real(w) for w in weights]
    except TypeError:
        wanted = []
    if not wanted or not all(w is not None and 0.0 <= w <= 1.0 for w in wanted):
        raise ValueError(f"weights: expected a number of samples, or weights in [0, 1], got {weights!r:.100}.")
    return wanted  # type: ignore[return-value]


# Two directions span a plane only where they differ by more than their rounding.
_PARALLEL = 1e-6


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation from ``a`` (weight 0) to ``b`` (weight 1), sample by sample: ``(sin((1 - w) theta) a +
    sin(w theta) b) / sin(theta)``, theta the angle between the two (Shoemake 1985; for latent codes: Song, Meng, Ermon
    2021, "Denoising Diffusion Implicit Models", appendix D.5).

    Independent Gaussian codes are nearly orthogonal in many dimensions, and their mean by this rule has their variance,
    whatever the scale of the prior. Where the two lie on a line, there is no angle to follow: they are interpolated
    linearly, as one-dimensional samples always are.

    Args:
        a, b: ``(B, *)``, of one shape, dtype and device.
        weight: in [0, 1]; at the ends the result is ``a`` or ``b``, to the bit.
    """
    weight = real("weight", weight, "a number in [0, 1]", lambda w: 0 <= w <= 1)
    u, v = a.double(), b.double()
    uu, vv, uv = row_dot(u, u).tolist(), row_dot(v, v).tolist(), row_dot(u, v).tolist()
    # One by one, in Python's floats: what a sample gets does not depend on its place in the batch.
    pairs = [_slerp_coefficients(aa, bb, ab, weight) for aa, bb, ab in zip(uu, vv, uv, strict=True)]
    coefficients = torch.tensor(pairs, dtype=torch.float64, device=a.device).reshape(-1, 2)
    return ops.affine(a, b, coefficients[:, 0].contiguous(), coefficients[:, 1].contiguous())


def _slerp_coefficients(aa: float, bb: float, ab: float, weight: float) -> tuple[float, float]:
    """From the inner products."""
    lengths = math.sqrt(aa * bb)
    cosine = ab / lengths if lengths > 0 else 1.0
    theta = math.acos(min(max(cosine, -1.0), 1.0))
    sine = math.sin(theta)
    if sine < _PARALLEL:
        return 1.0 - weight, weight
    return math.sin((1.0 - weight) * theta) / sine, math.sin(weight * theta) / sine
