"""The probability-flow ODE of a score network, as the integrator takes it: in t, and in the angle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .foreign import recognised
from .integrate import Terms, Time, padded, time_vector
from .models import utils as mutils
from .sde_lib import SDE, ReverseSDE, at_time, is_affine


class ProbabilityFlow:
    """The probability-flow ODE ``dx/dt = drift - g^2 score / 2`` (Song et al. 2021, eq. 13) as a right-hand side for
    the integrator. ``t`` is a float for the whole batch, or float64 ``(B,)``."""

    def __init__(self, sde: SDE, score_fn: mutils.ScoreFunction) -> None:
        sde = recognised(sde)
        self.sde, self.score_fn = sde, score_fn
        self.rsde = sde.reverse(score_fn, probability_flow=True)
        # A user's SDE may have replaced reverse(): then only its own drift says what is meant.
        self.fused = (
            is_affine(sde)
            and type(self.rsde) is ReverseSDE
            and self.rsde.forward is sde
            and self.rsde.score_fn is score_fn
        )

    def network(self, x: Tensor, t: Time) -> Tensor:
        """The network's output at states ``x``: score = k out, with the k of :meth:`marginal`."""
        return self.given(x, self.labels(t, x))

    def given(self, x: Tensor, labels: Tensor) -> Tensor:
        """:meth:`network` where the labels ``(B,)`` are known."""
        out = self.score_fn.network(x, labels)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def labels(self, t: Time, x: Tensor) -> Tensor:
        """What the network is given in place of ``t``."""
        if isinstance(t, Tensor):
            return padded(lambda times: (self.score_fn.labels(times),), time_vector(t, x))[0]
        return self.score_fn.label(t, x)

    def marginal(self, t: Any) -> tuple[Any, Any, Any]:
        """``m, s, k``: mean factor and standard deviation of p(x_t | x_0), and the score's coefficient."""
        return self.at(lambda t: (*self.sde.marginal_coefficients(t), self.score_fn.coefficient(t)), t)  # type: ignore[attr-defined]

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        """``f, q`` with the derivative f x + q out."""
        f, g = self.sde.sde_coefficients(t)  # type: ignore[attr-defined]
        return f, self.rsde.score_factor(g) * self.score_fn.coefficient(t)

    def at(self, coefficients: Callable[[Any], tuple[Any, ...]], t: Time) -> tuple[Any, ...]:
        """``coefficients(t)`` in double precision: floats for a float, ``(B,)`` for times ``(B,)``."""
        if isinstance(t, Tensor):
            return padded(
                lambda times: tuple(torch.as_tensor(c, dtype=t.dtype, device=t.device) for c in coefficients(times)), t
            )
        return at_time(coefficients, self.sde, t)  # type: ignore[arg-type]

    def coefficients_at(self, t: Time) -> tuple[Any, ...]:
        return self.at(self.coefficients, t)

    def terms(self, t: Time, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        (x,) = ys
        if self.fused:
            return (Terms(self.network(x, t), *self.coefficients_at(t)),)
        return (Terms(self.rsde.sde(x, time_vector(t, x))[0].to(x.dtype)),)

    def in_angle(self, span: tuple[float, float]) -> AngleFlow:
        """The same flow with the angle as its variable, for times within ``span``; ValueError where the SDE is not
        affine."""
        self.require_affine("coordinate='angle'")
        return AngleFlow(self, span)

    def require_affine(self, what: str) -> None:
        if not self.fused:
            raise ValueError(
                f"{what}: expected an affine SDE whose marginal, drift and reverse follow from its coefficients, got "
                f"{type(self.sde).__name__}. coordinate='t' with a Runge-Kutta method takes any SDE."
            )


class AngleFlow:
    """The flow in the angle phi = atan(s / m) between signal and noise.

    With r = sqrt(m^2 + s^2), the scaled state y = x / r is cos(phi) x_0 + sin(phi) eps, where x_0 and eps are the
    network's predictions of data and noise. Along the flow ``dy/dphi = cos(phi) eps - sin(phi) x_0 = -tan(phi) y + eps
    / cos(phi)``: data and noise trade places at constant speed, however the SDE's own time runs. (VP, r = 1: Salimans
    and Ho 2022, arXiv 2202.00512, appendix D.)
    """

    def __init__(self, flow: ProbabilityFlow, span: tuple[float, float]) -> None:
        self.flow, self.span = flow, span
        self.sde: Any = flow.sde
        self.ends = {self.coordinate(t): t for t in span}  # the end points are exact

    def coordinate(self, t: float) -> float:
        """phi at time ``t``."""
        m, s, _ = self.flow.marginal(t)
        return math.atan2(s, m)

    def time(self, phi: Time) -> Time:
        """The time at which the angle is ``phi``."""
        early, late = sorted(self.span)
        if not isinstance(phi, Tensor):
            return (
                self.ends[phi]
                if phi in self.ends
                else min(max(self.sde.time_at(-math.log(math.tan(phi))), early), late)
            )
        (t,) = padded(lambda p: (self.sde.time_at(-p.tan().log()),), phi)
        for end, exact in self.ends.items():
            t = torch.where(phi == end, exact, t)
        return t.clamp(early, late)

    def times(self, phi: Tensor) -> Tensor:
        """:meth:`time` of angles of any shape."""
        flat = phi.flatten()
        return self.time(flat).reshape(phi.shape) if len(flat) else phi  # type: ignore[union-attr]

    def enter(self, x: Tensor, t: float) -> Tensor:
        """The scaled state x / r."""
        return ops.affine(x, None, 1.0 / self.scale(t))

    def leave(self, y: Tensor, phi: float) -> Tensor:
        """The state x = r y."""
        return ops.affine(y, None, self.scale(self.time(phi)))

    def scale(self, t: Time) -> Any:
        m, s, _ = self.flow.marginal(t)
        return (m * m + s * s) ** 0.5

    def terms(self, phi: Time, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        (y,) = ys
        t = self.time(phi)
        m, s, k = self.flow.marginal(t)
        r = (m * m + s * s) ** 0.5
        out = self.flow.network(ops.affine(y, None, r), t)
        return (Terms(out, -s / m, -s * k * r / m),)
