"""Exact likelihoods through the probability-flow ODE (Song et al. 2021, appendix D.2, eq. 39, 40).

``log p_0(x) = log p_T(x(T)) + integral of div(drift) dt``; the divergence is estimated by ``eps^T (d drift / dx) eps``
with random ``eps`` that stay the same for a solve (Skilling 1989; Hutchinson 1990), or summed over the unit vectors,
which is exact. Drift and divergence of an evaluation share one forward pass of the network. The divergence of a stage
that a Runge-Kutta step has no weight for, one of RK45's six and four of DOP853's twelve, is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import integrate, noise
from .callers import say_no_gradient, untraced
from .checks import (
    check_choice,
    check_eps,
    check_flags,
    check_scaler,
    check_state,
    check_tolerances,
    name_rows,
    real,
    whole,
)
from .flow import ProbabilityFlow
from .foreign import recognised
from .integrate import Solution, SolverError, Status, Terms, Time, time_vector
from .models import utils as mutils
from .models.program import score_function
from .models.utils import ScoreFunction
from .ode import solve_ode
from .sde_lib import SDE

HUTCHINSON = ("Gaussian", "Rademacher", "exact")
UNITS = ("bits/dim", "nats")
LARGEST_EXACT = 64
"""Dimensions up to which ``hutchinson_type='exact'`` is taken: it costs as many vector-Jacobian products."""


def get_div_fn(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``div(x, t, eps)`` -> ``(B,)``: the estimate ``eps^T (d fn / dx) eps`` of the divergence of ``fn(x, t)`` at ``x``
    ``(B, *)``."""

    def div_fn(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (product,) = torch.autograd.grad(fn(x, t), x, eps)
        return row_dot(product, eps)

    return div_fn


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``(B,)``: the inner product of each sample of ``a`` with that of ``b``, both ``(B, *)``.

    Halves are added onto halves: elementwise operations give a sample the same bits at any place in any batch, which
    torch's own sums do not.
    """
    n = math.prod(a.shape[1:])
    sums = (a * b).reshape(len(a), n)
    while n > 1:
        half = (n + 1) // 2
        sums[:, : n - half] += sums[:, half:n]
        n = half
    return sums[:, :1].sum(1)


class _FlowWithDivergence(ProbabilityFlow):
    """The state with its accumulated divergence: parts ``(x, log density)``. The divergence is ``share`` times the sum
    of ``v^T (d drift / dx) v`` over the ``vectors`` ``(n, B, *)``."""

    def __init__(self, sde: SDE, score_fn: ScoreFunction, vectors: Tensor, share: float) -> None:
        super().__init__(sde, score_fn)
        self.vectors, self.share = vectors, share
        self.batched = len(vectors) > 1
        self.squares = self.inner(vectors)

    def inner(self, products: Tensor) -> Tensor:
        """``(B,)``: of the vectors with as many others, added up."""
        return self.share * row_dot(products.movedim(0, 1), self.vectors.movedim(0, 1))

    def products(self, out: Tensor, x: Tensor) -> Tensor:
        """``(n, B, *)``: the product ``v^T (d out / dx)`` of every vector."""
        grad = torch.autograd.grad
        if self.batched:
            try:
                return grad(out, x, self.vectors, retain_graph=True, is_grads_batched=True)[0]
            except RuntimeError:  # vmap cannot do the network's derivative; what else is wrong, the loop raises again
                self.batched = False
        last = len(self.vectors) - 1
        return torch.stack([grad(out, x, v, retain_graph=i < last)[0] for i, v in enumerate(self.vectors)])

    def terms(self, t: Time, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        with torch.enable_grad():
            x = ys[0].detach().requires_grad_(True)
            out = self.network(x, t) if self.fused else self.rsde.sde(x, time_vector(t, x))[0].to(x.dtype)
            if not out.requires_grad:
                raise ValueError("model: expected an output that is differentiable in x, got one without gradient.")
            products = self.products(out, x)
        f, q = self.coefficients_at(t) if self.fused else (0.0, 1.0)
        divergence = f * self.squares + q * self.inner(products)
        return Terms(out.detach(), f, q), Terms(divergence.to(x.dtype))

    def passing_terms(self, t: Time, ys: tuple[Tensor, ...]) -> tuple[Terms, ...]:
        """Without the divergence: the drift does not depend on the log density."""
        return *super().terms(t, ys[:1]), Terms(torch.zeros_like(ys[1]))


def get_likelihood_fn(
    sde: SDE,
    inverse_scaler: Callable[[Any], Any] | None,
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Any = "RK45",
    eps: float = 1e-5,
    *,
    epsilons: int = 1,
    units: str = "bits/dim",
    levels: float | None = None,
    control: str = "joint",
    max_steps: int = 10_000,
    seeds: noise.Seeds = None,
    on_failure: str = "raise",
    progress: bool = False,
) -> Likelihood:
    """``likelihood_fn(model, data, draw=None)`` -> ``(bpd (B,), z (B, *), nfe)``: bits a dimension of 8-bit data, and
    the latent codes at T. ``likelihood_fn.solve(model, data, draw=None)`` -> the :class:`integrate.Solution`, its ``y``
    being ``(z, bpd)``.

    With ``levels = L`` it is the density of ``y = L inverse_scaler(x)``, whose unit is one level, for any scaler that
    is affine, element by element: ``bpd = -log2 p(y) / D = -log2 p(x) / D + mean(log2(L |d inverse_scaler / dx|))``.
    For L = 256 and data scaled to [-1, 1] or [0, 1], this is upstream's offset, 7 or 8.

    Args:
        sde: the forward SDE.
        inverse_scaler: the scaler of the samples. Without ``levels`` it gives upstream's offset, 7 -
            inverse_scaler(-1.), which is right for 8-bit data scaled to [-1, 1] or [0, 1] alone. None is the identity,
            for data in [0, 1]: an offset of 8.
        hutchinson_type: law of the divergence estimator's noise, 'Rademacher' or 'Gaussian'; or 'exact': the exact
            divergence, for at most 64 dimensions a sample, without noise.
        rtol, atol: as in :func:`scoresde_ext.sampling.get_ode_sampler`. The log densities count in the error norm.
        method: RK23, RK45, DOP853, an adaptive :class:`integrate.Tableau`, or one of scipy's.
        eps: first time.
        epsilons: noise vectors over which the divergence is averaged. The standard deviation of the estimate falls as 1
            / sqrt(epsilons); each costs one backward pass of the network, all together one forward pass. Where vmap can
            differentiate the network, they run as one batch. (What torch.compile made differentiates once: set
            torch._functorch.config.donated_buffer = False before it compiles; 'exact' asks for that too.)
        units: 'bits/dim', or 'nats': log p, the natural logarithm, of the whole sample, not of a dimension; of
            ``data`` as given, unless ``levels`` says otherwise. levels=1: of inverse_scaler(data).
        levels: levels in a unit of the samples' range, 256 for 8-bit data whose samples are in [0, 1].
        control, max_steps, on_failure: as in :func:`integrate.solve`.
        seeds: of the noise; None: torch's generator; an integer: sample b takes stream b of this seed; ``(seed,
            ids)``: stream ``ids[b]``. The noise is then the same in every call; ``draw=k`` gives call k noise of its
            own, as batch k of a data set should have.
        progress: a progress bar on a terminal.

    ``data`` is ``(B, *)``, float32 or float64 and kept so. No gradient is recorded; a warning says so where ``data``
    wants one.

    Raises:
        ValueError: an argument is wrong; before any evaluation. NotImplementedError: another ``hutchinson_type``.
        SolverError: the integration of samples failed, or their likelihood is not finite; ``.solution`` has the others,
            NaN where one failed.
    """
    recognised(sde)
    inverse_scaler, eps = check_scaler(inverse_scaler), check_eps(eps, sde.T)
    rtol, atol = check_tolerances(rtol, atol)
    _check_method(method)
    if hutchinson_type not in HUTCHINSON:
        raise NotImplementedError(f"hutchinson_type: expected one of {', '.join(HUTCHINSON)}, got {hutchinson_type!r}.")
    epsilons = whole("epsilons", epsilons, 1, expected="a number of noise vectors")
    if hutchinson_type == "exact" and epsilons != 1:
        raise ValueError(f"epsilons: the exact divergence takes no noise, got {epsilons}. Leave it at 1.")
    check_choice("units", units, UNITS)
    check_choice("on_failure", on_failure, ("raise", "status"))
    check_flags(progress=progress)
    if levels is not None:
        expected = "a positive number of levels in a unit of the samples"
        levels = real("levels", levels, expected, lambda v: 0 < v < math.inf)
    options = {
        "rtol": rtol,
        "atol": atol,
        "control": control,
        "max_steps": whole("max_steps", max_steps, 1, expected="a number of steps"),
        "on_failure": on_failure,
        "progress": progress,
        "graph": "off",  # the divergence is differentiated at each evaluation
    }
    return Likelihood(sde, inverse_scaler, hutchinson_type, method, eps, epsilons, units, levels, seeds, options)


def _check_method(method: Any) -> None:
    """The divergence is a second part of the state, with no data prediction; and there is no grid."""
    fixed = [name for name in (*integrate.METHODS, *integrate.MULTISTEP) if name not in integrate.ADAPTIVE]
    if method in fixed or (isinstance(method, integrate.Tableau) and not method.errors):
        raise ValueError(
            f"method: a likelihood takes an adaptive Runge-Kutta method, {', '.join(integrate.ADAPTIVE)}, a Tableau "
            f"with error estimates or one of scipy's, got {method!r:.80}."
        )


class Likelihood:
    """What :func:`get_likelihood_fn` returns."""

    def __init__(
        self,
        sde: SDE,
        inverse_scaler: Callable[[Any], Any],
        hutchinson_type: str,
        method: Any,
        eps: float,
        epsilons: int,
        units: str,
        levels: float | None,
        seeds: noise.Seeds,
        options: dict[str, Any],
    ) -> None:
        self.sde, self.inverse_scaler, self.hutchinson_type = sde, inverse_scaler, hutchinson_type
        self.method, self.eps, self.epsilons, self.units, self.levels = method, eps, epsilons, units, levels
        self.seeds, self.options, self.draws = seeds, options, noise.Draws(seeds)

    @untraced
    def __call__(self, model: Any, data: Tensor, *, draw: int | None = None) -> tuple[Tensor, Tensor, int]:
        solution = self.solve(model, data, draw=draw)
        z, values = solution.y
        return values, z, solution.nfe

    @untraced
    def solve(self, model: Any, data: Tensor, *, draw: int | None = None) -> Solution:
        """The latent codes and likelihoods with what they took."""
        check_state("data", data)
        say_no_gradient("data", data)
        with torch.inference_mode(False), torch.no_grad():  # the divergence is a derivative
            data = data.clone() if data.is_inference() else data
            return self._solve(model, data, draw)

    def _solve(self, model: Any, data: Tensor, draw: int | None) -> Solution:
        offset = self.offset(data)
        vectors, share = self.vectors(data, draw)
        score_fn = score_function(self.sde, model, False, True, mutils)
        drift = _FlowWithDivergence(self.sde, score_fn, vectors, share)
        parts, span = (data, data.new_zeros(len(data))), (self.eps, self.sde.T)
        try:
            solution = solve_ode(drift, span, parts, self.method, **self.options)
        except SolverError as error:
            if error.solution is not None:
                error.solution = self.measured(error.solution, offset)
            raise
        measured = self.measured(solution, offset)
        if self.options["on_failure"] == "raise" and not measured.success:
            raise SolverError(measured.message, measured)
        return measured

    def vectors(self, data: Tensor, draw: int | None) -> tuple[Tensor, float]:
        """The vectors ``(n, B, *)`` of the divergence, and the factor of their sum."""
        if self.hutchinson_type == "exact":
            n = math.prod(data.shape[1:])
            if n > LARGEST_EXACT:
                raise ValueError(
                    f"hutchinson_type: 'exact' expects at most {LARGEST_EXACT} dimensions a sample, got {n}. Use "
                    "'Rademacher' with several epsilons."
                )
            units = torch.eye(n, dtype=data.dtype, device=data.device).reshape(n, 1, *data.shape[1:])
            return units.expand(n, *data.shape), 1.0
        with self.draws(len(data), draw):
            return torch.stack([self.draw(data) for _ in range(self.epsilons)]), 1.0 / self.epsilons

    def draw(self, data: Tensor) -> Tensor:
        if self.hutchinson_type == "Gaussian":
            return noise.normal_tensor(data)
        return noise.integers(2, data).to(data.dtype) * 2 - 1

    def offset(self, data: Tensor) -> Any:
        """Bits a dimension by which the density of ``data`` exceeds the one asked for."""
        if self.levels is not None:
            shape = (1, *data.shape[1:])
            low, middle, high = (
                self.inverse_scaler(torch.full(shape, x, dtype=torch.float64, device=data.device))
                for x in (-1.0, 0.0, 1.0)
            )
            slope = 0.5 * (high - low)
            if not bool(((high - 2 * middle + low).abs() < 1e-3 * slope.abs()).all()):
                raise ValueError(
                    "inverse_scaler: with levels, expected a function a x + b with a other than 0, element by element, "
                    "got another. Ask for units='nats' without levels, and change the variables of that density."
                )
            return math.log2(self.levels) + slope.abs().log2().mean().item()
        return 0.0 if self.units == "nats" else 7.0 - self.inverse_scaler(-1.0)

    def measured(self, solution: Solution, offset: Any) -> Solution:
        """The solution with the likelihoods in place of the divergences; those that are not finite are failures."""
        (z, delta), failed = solution.y, solution.status != 0
        n = math.prod(z.shape[1:])
        shown = z.masked_fill(failed.reshape(-1, *[1] * (z.dim() - 1)), 0.0)  # no prior is shown a NaN
        log_p = recognised(self.sde).prior_logp(shown) + delta
        if self.units == "nats":
            values = log_p - offset * math.log(2) * n
        else:
            values = -log_p / math.log(2) / n + offset
        wrong = ~values.isfinite() & ~failed
        if not bool(wrong.any()):
            return replace(solution, y=(z, values))
        rows = torch.nonzero(wrong).flatten().tolist()
        return replace(
            solution,
            y=(z, values.masked_fill(wrong, math.nan)),
            status=torch.where(wrong, int(Status.NOT_FINITE), solution.status).to(torch.int8),
            message=f"The likelihood is NaN or Inf in {name_rows(rows)}, for the prior's log density or the "
            f"inverse_scaler is; {solution.message}",
        )
