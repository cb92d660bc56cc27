"""Sampling along the probability-flow ODE (Song et al. 2021, section 4.3, eq. 13)."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import graphs, integrate, noise, ops, precision
from .callers import say_no_gradient, untraced, warn
from .checks import (
    bad_rows,
    check_choice,
    check_device,
    check_eps,
    check_flags,
    check_latent,
    check_scaler,
    check_shape,
    check_times,
    check_tolerances,
    name_rows,
    whole,
)
from .flow import ProbabilityFlow
from .foreign import recognised
from .integrate import Finished, Solution, SolverError, Status, Stream, time_vector
from .integrate.results import NOISY, describe
from .integrate.run import column
from .models.program import score_function
from .models.utils import ScoreFunction
from .predictors import ReverseDiffusionPredictor
from .sde_lib import SDE

InverseScaler = Callable[[Tensor], Tensor]


def _score_fn(sde: SDE, model: Any) -> ScoreFunction:
    """Where a program replaces upstream's get_score_fn for the samplers: in ``sampling``, which imports this module."""
    sampling = sys.modules.get(f"{__package__}.sampling")
    return score_function(sde, model, False, True, sampling, getattr(sampling, "mutils", None))


def get_ode_sampler(
    sde: SDE,
    shape: Sequence[int],
    inverse_scaler: InverseScaler | None,
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: Any = "RK45",
    eps: float = 1e-3,
    device: torch.device | str = "cuda",
    *,
    control: str = "joint",
    coordinate: str = "t",
    order: int = 3,
    steps: int | None = None,
    grid: Sequence[float] | integrate.CalibratedGrid | None = None,
    seeds: noise.Seeds = None,
    max_steps: int = 10_000,
    on_failure: str = "raise",
    progress: bool = False,
    graph: str = "auto",
) -> OdeSampler:
    """``sampler(model, z=None, draw=None)`` -> ``(samples, nfe)``: the probability-flow ODE from T to eps (Song et al.
    2021, section 4.3, eq. 13). ``sampler.solve(model, z=None, draw=None)`` -> the :class:`integrate.Solution`, ``y``
    being the samples.

    Args:
        sde: the forward SDE.
        shape: ``(B, *)``.
        inverse_scaler: maps the network's data range to the samples' range; None leaves the samples as they are.
        denoise: end with one noise-free step of the reverse-diffusion predictor at eps (not counted).
        rtol, atol: tolerances, with scipy's meaning. For a network that computes in bfloat16, float16 or TF32 they are
            held at 1e-3, 1e-4 and 1e-4, with a warning: below, the error estimates see the network's rounding.
        method: one of :func:`integrate.solve`, or a :class:`integrate.Tableau`, run on the device; another name or
            ``OdeSolver`` class of scipy's runs there, slowly.
        eps: last time.
        device: where to sample.
        control, coordinate, order, steps, grid, max_steps, on_failure: as in :func:`integrate.solve`.
        seeds: None: torch's generator; an integer: sample b of the prior is stream b of this seed; ``(seed, ids)``:
            stream ``ids[b]``. The prior is then the same in every call; ``draw=k`` gives call k one of its own.
        progress: a progress bar on a terminal.
        graph: on a GPU, how the loop over the steps is run, as in :func:`integrate.solve`; but ``auto`` captures a step
            where the network is a module or a function around modules, and keeps it for the next call. It is used as
            long as all that the network reaches is what it was; what is written into its tensors is read.

    ``z`` is the state at T, ``(B, *)``, float32 or float64 and kept so; None draws it from the prior. No gradient is
    recorded; a warning says so where ``z`` wants one.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: samples could not be finished; ``.solution`` has the others, NaN where one failed.
    """
    recognised(sde)
    shape, device, inverse_scaler = check_shape(shape), check_device(device), check_scaler(inverse_scaler)
    eps = check_eps(eps, sde.T)
    rtol, atol = check_tolerances(rtol, atol)
    check_flags(denoise=denoise, progress=progress)
    check_choice("on_failure", on_failure, ("raise", "status"))
    if grid is not None and not isinstance(grid, integrate.CalibratedGrid):
        grid = check_times("grid", grid, sde.T, eps)
    noise.seeded(seeds, shape[0])  # wrong seeds are refused now
    graphs.check(graph, device)
    options = {
        "rtol": rtol,
        "atol": atol,
        "control": control,
        "coordinate": coordinate,
        "order": whole("order", order, 1, 4),
        "steps": None if steps is None else whole("steps", steps, 1, expected="a number of steps"),
        "grid": grid,
        "max_steps": whole("max_steps", max_steps, 1, expected="a number of steps"),
        "on_failure": on_failure,
        "progress": progress,
        "graph": graph,
    }
    return OdeSampler(sde, shape, inverse_scaler, denoise, method, eps, device, seeds, options)


class OdeSampler:
    """What :func:`get_ode_sampler` returns."""

    def __init__(
        self,
        sde: SDE,
        shape: tuple[int, ...],
        inverse_scaler: InverseScaler,
        denoise: bool,
        method: Any,
        eps: float,
        device: torch.device,
        seeds: noise.Seeds,
        options: dict[str, Any],
    ) -> None:
        self.sde, self.shape, self.inverse_scaler, self.denoise = sde, shape, inverse_scaler, denoise
        self.method, self.eps, self.device, self.seeds, self.options = method, eps, device, seeds, options
        self.cache, self.draws = graphs.Cache(), noise.Draws(seeds)

    @untraced
    def __call__(self, model: Any, z: Tensor | None = None, *, draw: int | None = None) -> tuple[Tensor, int]:
        solution = self._run(model, z, draw)
        return solution.y, solution.nfe

    @untraced
    def solve(self, model: Any, z: Tensor | None = None, *, draw: int | None = None) -> Solution:
        """The samples with what they took."""
        return self._run(model, z, draw)

    @untraced
    def stream(self, model: Any, slots: int, *, draw: int = 0) -> Stream:
        """The samples one by one, ``slots`` at a time, see :func:`integrate.stream`: for an adaptive method of ours
        under ``control='per_sample'``. A sample that fails is NaN and has its status; nothing is raised for it."""
        if self.options["control"] != "per_sample":
            raise ValueError(f"control: a stream expects 'per_sample', got {self.options['control']!r}.")
        score_fn = _score_fn(self.sde, model)
        flow, span = ProbabilityFlow(self.sde, score_fn), (self.sde.T, self.eps)

        def source(first: int, stop: int) -> Tensor:
            with noise.seeded(noise.part(self.seeds, first, stop), stop - first, draw):
                return noise.prior(self.sde, (stop - first, *self.shape[1:]), self.device)

        @torch.no_grad()
        def after(group: Finished) -> Finished:
            y, status = group.y, group.status
            if self.denoise:
                y, status = self._last_step(y, status, score_fn)
            return group._replace(y=self.inverse_scaler(y), status=status)

        kept = {n: self.options[n] for n in ("rtol", "atol", "coordinate", "order", "max_steps")}
        kept["rtol"], kept["atol"] = _held_tolerances(flow, self.options["rtol"], self.options["atol"], self.device)
        stream = integrate.stream(flow, span, source, self.shape[0], slots, self.method, **kept)
        stream.after = after
        return stream

    def _run(self, model: Any, z: Tensor | None, draw: int | None) -> Solution:
        score_fn = _score_fn(self.sde, model)
        if z is None:
            with self.draws(self.shape[0], draw):
                z = noise.prior(self.sde, self.shape, self.device)
        else:
            check_latent(z, self.shape, self.device)
            say_no_gradient("z", z)
            z = z.detach()
        flow, span = ProbabilityFlow(self.sde, score_fn), (self.sde.T, self.eps)
        cause: BaseException | None = None
        try:
            plan = graphs.plan(self.options["graph"], self.cache, model, z.device, self.sde)
            solution = solve_ode(flow, span, (z,), self.method, **(self.options | {"graph": plan}))
        except SolverError as error:
            if error.solution is None:  # scipy's
                raise
            solution, cause = error.solution, error.__cause__
        if self.denoise and bool((solution.status == Status.SUCCESS).any()):
            solution, cause = self._denoised(solution, score_fn, cause)
        with torch.no_grad():
            solution = replace(solution, y=self.inverse_scaler(solution.y[0]))
        if self.options["on_failure"] == "raise" and not solution.success:
            raise SolverError(solution.message, solution) from cause
        return solution

    def _denoised(
        self, solution: Solution, score_fn: ScoreFunction, cause: BaseException | None
    ) -> tuple[Solution, BaseException | None]:
        """The last step without noise, of the samples that reached it; and what the network raised, if it did."""
        (x,), status = solution.y, solution.status
        try:
            y, status = self._last_step(x, status, score_fn)
        except Exception as raised:
            y, cause = torch.full_like(x, math.nan), raised
            status = torch.where(status == Status.SUCCESS, int(Status.RAISED), status).to(status.dtype)
        span, max_steps, noisy = (self.sde.T, self.eps), self.options["max_steps"], NOISY in solution.message
        message = describe(status.cpu(), solution.t.cpu(), span, solution.nfe, max_steps, cause, noisy)
        return replace(solution, y=(y,), status=status, message=message), cause

    @torch.no_grad()
    def _last_step(self, x: Tensor, status: Tensor, score_fn: ScoreFunction) -> tuple[Tensor, Tensor]:
        """States and status after it."""
        finished = status == Status.SUCCESS
        predictor = ReverseDiffusionPredictor(self.sde, score_fn, probability_flow=False)
        # No network is shown a NaN.
        mean = predictor.update_fn(torch.where(column(finished, x), x, 0.0), time_vector(self.eps, x))[1]
        lost = ~mean.reshape(len(x), math.prod(x.shape[1:])).isfinite().all(1)
        status = torch.where(finished & lost, int(Status.NOT_FINITE), status).to(status.dtype)
        return torch.where(column(status == 0, x), mean, math.nan), status


_FLOORS = {torch.bfloat16: (1e-3, "bfloat16"), torch.float16: (1e-4, "float16")}


def _held_tolerances(
    flow: ProbabilityFlow, rtol: float, atol: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """The tolerances, not below what the network's rounding allows."""
    floor, kind = precision_floor(flow, device, dtype)
    if max(rtol, atol) >= floor:
        return rtol, atol
    warn(
        f"rtol, atol: held at {floor:g} (got {rtol:g} and {atol:g}), for the network computes in {kind}: smaller "
        "errors are below its rounding, and would cost hundreds of evaluations. Run it in float32 for more."
    )
    return floor, floor


def precision_floor(flow: ProbabilityFlow, device: torch.device, dtype_of_state: torch.dtype) -> tuple[float, str]:
    """The smallest tolerance that the network's rounding allows, and what it computes in."""
    network: Any = flow.score_fn.network
    dtype = getattr(network, "dtype", None)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype in _FLOORS:
        return _FLOORS[dtype]
    if (
        device.type == "cuda"
        and dtype_of_state == torch.float32
        and dtype in (None, torch.float32)
        and _uses_tf32(network)
    ):
        return 1e-4, "TF32"
    return 0.0, ""


def _uses_tf32(network: Any) -> bool:
    """Whether float32 products on a GPU are rounded to TF32: matrix products on request, convolutions by default."""
    if precision.of_matrix_products() == "tf32":
        return True
    modules = (m for module in getattr(network, "modules", ()) for m in module.modules())
    return precision.of_convolutions() == "tf32" and any(isinstance(m, torch.nn.modules.conv._ConvNd) for m in modules)


def solve_ode(
    flow: ProbabilityFlow,
    t_span: tuple[float, float],
    ys: tuple[Tensor, ...],
    method: Any,
    *,
    rtol: float,
    atol: float,
    on_failure: str = "raise",
    progress: bool = False,
    graph: str | graphs.Plan = "auto",
    **options: Any,
) -> Solution:
    """Our integrator for the methods it has, scipy for the others."""
    if options.get("steps") is None and options.get("grid") is None:
        rtol, atol = _held_tolerances(flow, rtol, atol, ys[0].device, ys[0].dtype)
    if isinstance(method, integrate.Tableau) or method in integrate.METHODS or method in integrate.MULTISTEP:
        return integrate.solve(
            flow, t_span, ys, method, rtol=rtol, atol=atol, on_failure=on_failure, progress=progress, graph=graph,
            **options,
        )  # fmt: skip
    options["on_failure"] = on_failure
    if (graph_asked := graph.asked if isinstance(graph, graphs.Plan) else graph) in ("while", "replay"):
        options["graph"] = graph_asked
    asked = sorted(name for name, value in options.items() if value != _DEFAULTS.get(name))
    if asked:
        raise ValueError(f"{asked[0]}: method {method!r} is scipy's and does not know it.")
    return _solve_with_scipy(flow, t_span, ys, method, rtol, atol)


_DEFAULTS = {"control": "joint", "coordinate": "t", "order": 3, "max_steps": 10_000, "on_failure": "raise"}


@functools.cache
def _warn_slow(method: str) -> None:
    warn(
        f"method {method} is scipy's alone: every evaluation copies the state to numpy and back. "
        "RK23, RK45 and DOP853 stay on the device."
    )


def _solve_with_scipy(
    drift: Any, t_span: tuple[float, float], ys: tuple[Tensor, ...], method: Any, rtol: float, atol: float
) -> Solution:
    from scipy import integrate as scipy_integrate

    if not isinstance(method, type) and method not in ("Radau", "BDF", "LSODA"):
        raise ValueError(
            f"method: expected one of {', '.join((*integrate.METHODS, *integrate.MULTISTEP))}, or of scipy's Radau, "
            f"BDF, LSODA or an OdeSolver class, got {method!r}."
        )
    _warn_slow(str(method))
    sizes = [y.numel() for y in ys]

    def unpack(flat: Any) -> tuple[Tensor, ...]:
        parts = torch.from_numpy(flat).split(sizes)
        return tuple(part.reshape(y.shape).to(y.device, y.dtype) for part, y in zip(parts, ys, strict=True))

    def pack(parts: Sequence[Tensor]) -> Any:
        return torch.cat([part.detach().reshape(-1).double().cpu() for part in parts]).numpy()

    def derivative(t: float, flat: Any) -> Any:
        state = unpack(flat)
        slopes = [ops.affine(y, term.out, term.f, term.q) for y, term in zip(state, drift.terms(t, state), strict=True)]
        packed = pack(slopes)
        if not math.isfinite(packed.sum()):
            rows = name_rows(bad_rows(*slopes))
            raise SolverError(f"The integration stopped: NaN or Inf in {rows} at t = {t:.6g}.")
        return packed

    solution = scipy_integrate.solve_ivp(derivative, t_span, pack(ys), method=method, rtol=rtol, atol=atol)
    if not solution.success:
        raise SolverError(
            f"The integration by scipy's {method} stopped at t = {solution.t[-1]:.6g}: {solution.message}"
        )
    batch = len(ys[0])
    times = torch.from_numpy(solution.t)
    count = torch.full((batch,), len(times) - 1)
    return Solution(
        y=unpack(solution.y[:, -1].copy()),
        t=torch.full((batch,), float(times[-1]), dtype=torch.float64),
        status=torch.zeros(batch, dtype=torch.int8),
        message=solution.message,
        nfe=solution.nfev,
        evaluations=torch.full((batch,), solution.nfev),
        n_accepted=count,
        n_rejected=torch.zeros_like(count),  # scipy does not say
        times=times,
        step_sizes=times.diff().abs(),
        error_norms=torch.empty(0, dtype=torch.float64),
        first_step=abs(float(times[1] - times[0])),
    )
