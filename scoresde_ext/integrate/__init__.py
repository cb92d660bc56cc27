"""Integration of batches, with the state on its device and in its dtype.

:func:`solve` is the entrance. ``tableaus`` holds the Runge-Kutta methods as data, ``runge_kutta`` runs them,
``multistep`` has the methods that use past evaluations, ``drift`` says what a right-hand side is, ``stepping`` makes
loops of them that a GPU can run by itself, ``refill`` gives the slots of finished samples to the next, ``run`` and
``results`` keep the books.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import graphs
from ..callers import say_no_gradient, untraced
from ..checks import check_choice, check_flags, check_state, check_times, check_tolerances, real, whole
from .drift import Drift, Function, Terms, Time, needs_double, time_vector
from .multistep import MULTISTEP, Adaptive, AdaptiveOnHost, CalibratedGrid, FixedGrid, Flow, grid_tables
from .refill import Finished, Stream
from .results import Solution, SolverError, Status
from .run import Run, padded
from .runge_kutta import FixedSteps, Joint, JointOnDevice, PerSample
from .tableaus import METHODS, Tableau, tableau_of

__all__ = [
    "METHODS",
    "MULTISTEP",
    "CalibratedGrid",
    "Drift",
    "Finished",
    "Solution",
    "SolverError",
    "Status",
    "Stream",
    "Tableau",
    "Terms",
    "Time",
    "padded",
    "solve",
    "stream",
    "time_vector",
]

ADAPTIVE = ("RK23", "RK45", "DOP853")
CONTROLS = ("joint", "per_sample")
COORDINATES = ("t", "angle")


@untraced
def solve(
    f: Callable[..., Any] | Drift,
    t_span: tuple[float, float],
    y0: Tensor | tuple[Tensor, ...],
    method: str | Tableau = "RK45",
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    control: str = "joint",
    coordinate: str = "t",
    order: int = 3,
    steps: int | None = None,
    grid: Sequence[float] | CalibratedGrid | None = None,
    t_eval: Sequence[float] | None = None,
    first_step: float | None = None,
    max_steps: int = 10_000,
    pi: bool = False,
    on_failure: str = "raise",
    progress: bool = False,
    graph: str | graphs.Plan = "auto",
) -> Solution:
    """Integrates ``dy/dt = f(t, y)`` from ``t_span[0]`` to ``t_span[1]``, in either direction, to exactly the end
    point. No evaluation lies outside ``t_span``.

    Adaptive methods take the step control of scipy's ``solve_ivp``: RMS norm, its initial step, safety 0.9, factors
    0.2 to 10, no growth after a rejection. Under ``control='joint'`` the norm is over the whole batch, and the
    decisions are scipy's. Under ``control='per_sample'`` each sample has its own; its result then does not depend on
    the rest of the batch, to the bit, where ``f`` computes each sample by itself.

    A sample that gets NaN or Inf, or cannot go on, is left out and named; the others finish as if it had not been
    there.

    Args:
        f: ``f(t, y)`` with ``t`` of shape ``(B,)`` returning the derivative, shape and dtype of ``y``; or a
            :class:`Drift`. ``t`` is float32; float64 for a float64 state, and where float32 has too few numbers within
            ``t_span``, as it has from 1e6 to 1e6 + 1 (the derivative may then be float64 too). ``f`` may write to what
            it gets.
        t_span: start and end.
        y0: ``(B, *)``, or a tuple of such arrays with one B that form the state together (``f`` then takes and returns
            tuples). float32 or float64 is kept. No gradient is recorded; where ``y0`` or what ``f`` returns wants
            one and the caller records gradients, a warning says so.
        method: ``RK23 RK45 DOP853`` (adaptive), ``euler midpoint heun rk4`` (fixed steps), or a :class:`Tableau`. For
            the :class:`scoresde_ext.flow.ProbabilityFlow` of an affine SDE also ``unipc`` (adaptive, or in fixed steps)
            and ``dpmpp_2m`` (fixed steps), which evaluate once a step.
        rtol, atol: tolerances of the adaptive methods: an error of ``atol + rtol max(|y|, |y_new|)`` an element is
            allowed.
        control: ``joint`` or ``per_sample``: one step size for the batch, or one a sample.
        coordinate: ``t``, or ``angle``: the probability flow of an affine SDE is integrated in phi = atan(s / m), the
            state divided by sqrt(m^2 + s^2). ``f`` is then a :class:`scoresde_ext.flow.ProbabilityFlow`.
        order: of ``unipc``: 1 to 4, its predictor's; its corrector has one more.
        steps: number of equal steps (in the coordinate; ``unipc`` and ``dpmpp_2m``: in the angle); required by a
            fixed-step method, unless ``grid`` is given. With an adaptive method, its formula is run in fixed steps, and
            the tolerances are not used.
        grid: the times of fixed steps, from ``t_span[0]`` to ``t_span[1]``; or, for ``unipc``, what
            :func:`scoresde_ext.sampling.calibrate_grid` returned, which brings its order and coefficients.
        t_eval: times within ``t_span``, in its direction, at which the state is wanted too, by interpolation within the
            steps of an adaptive method (RK45: of 4th order; RK23: the cubic through both ends).
        first_step: first step size of an adaptive method, in the coordinate (``unipc``: in log-SNR); chosen by
            scipy's rule if None (``unipc``: 0.5).
        max_steps: attempted steps of an adaptive method after which a sample is given up.
        pi: proportional-integral step control: the error norm of the step before counts too (Hairer, Norsett, Wanner,
            "Solving Ordinary Differential Equations II", section IV.2). Fewer rejections on stiff problems.
        on_failure: ``raise`` a :class:`SolverError`, or return with the failures in ``Solution.status``.
        progress: show a progress bar on a terminal.
        graph: on a GPU, how the loop over the steps is run: ``while`` captures a step as a CUDA graph and lets the GPU
            repeat it, ``replay`` launches that graph step by step, ``off`` calls ``f`` step by step. ``auto`` is
            ``off`` here, where a captured step would be used once; samplers keep theirs. ``Solution.graph`` says what
            was done and why. Elsewhere ``auto`` and ``off`` are the same, and the others a ValueError.

    Raises:
        ValueError, TypeError: an argument is wrong; before any evaluation. What ``f`` raises at its first evaluation is
            handed on as it is.
        SolverError: some samples could not be finished (unless ``on_failure='status'``); ``.solution`` has the others.
    """
    check_choice("on_failure", on_failure, ("raise", "status"))
    check_flags(progress=progress)
    run, angle = prepare(
        f,
        t_span,
        y0,
        method,
        rtol=rtol,
        atol=atol,
        control=control,
        coordinate=coordinate,
        order=order,
        steps=steps,
        grid=grid,
        t_eval=t_eval,
        first_step=first_step,
        max_steps=max_steps,
        pi=pi,
        progress=progress,
        graph=graph,
        grads=torch.is_grad_enabled(),
    )
    return run.solve(on_failure, angle)


@untraced
def stream(
    f: Callable[..., Any] | Drift,
    t_span: tuple[float, float],
    source: Callable[[int, int], Tensor | tuple[Tensor, ...]],
    count: int,
    slots: int,
    method: str | Tableau = "RK45",
    **options: Any,
) -> Stream:
    """The solutions of ``count`` samples under per-sample control, each as soon as it is finished; the next sample
    takes its slot at once. Iterating gives :class:`Finished` groups.

    What comes out for a sample is what :func:`solve` gives, to the bit, where ``f`` computes each sample by itself.

    Args:
        f, t_span, method: as in :func:`solve`; an adaptive method.
        source: ``source(first, stop)``: the initial states of samples ``first`` to ``stop - 1``, asked for in order.
        count: number of samples.
        slots: how many are integrated at a time. Towards the end, when half of the slots are empty, they are given up.
        options: those of the adaptive methods of :func:`solve`, except ``control`` and ``t_eval``.

    Raises:
        ValueError, TypeError: an argument is wrong; before any evaluation. What ``f`` raises is handed on.
    """
    taken = sorted({"control", "t_eval", "steps", "grid", "on_failure", "progress", "graph"} & options.keys())
    if taken:
        raise ValueError(f"{taken[0]}: a stream takes an adaptive method with one step size a sample. Leave it out.")

    grads = [torch.is_grad_enabled()]  # for the first samples

    def begin(first: int, stop: int) -> tuple[Any, Any]:
        run: Any
        asked = grads.pop() if grads else False
        run, angle = prepare(f, t_span, source(first, stop), method, control="per_sample", grads=asked, **options)
        run.begin()
        return run, angle

    return Stream(begin, count, slots)


def prepare(
    f: Callable[..., Any] | Drift,
    t_span: tuple[float, float],
    y0: Tensor | tuple[Tensor, ...],
    method: str | Tableau,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    control: str = "joint",
    coordinate: str = "t",
    order: int = 3,
    steps: int | None = None,
    grid: Sequence[float] | CalibratedGrid | None = None,
    t_eval: Sequence[float] | None = None,
    first_step: float | None = None,
    max_steps: int = 10_000,
    pi: bool = False,
    progress: bool = False,
    graph: str | graphs.Plan = "auto",
    grads: bool = False,
) -> tuple[Run, Any]:
    """The run that :func:`solve` asks for, and the flow in the angle where that is its coordinate. ``grads``: whether
    the caller records gradients."""
    packed = isinstance(y0, tuple)
    ys = y0 if isinstance(y0, tuple) else (y0,)
    start, end = _check_problem(f, t_span, ys)
    check_choice("control", control, CONTROLS)
    check_choice("coordinate", coordinate, COORDINATES)
    check_flags(pi=pi)
    max_steps = whole("max_steps", max_steps, 1, expected="a number of steps")
    plan = graph if isinstance(graph, graphs.Plan) else graphs.Plan(graph)
    graphs.check(plan.asked, ys[0].device)
    if steps is not None and grid is not None:
        raise ValueError("steps, grid: expected one of them, got both.")
    fixed = steps is not None or grid is not None
    if fixed and t_eval is not None:
        raise ValueError("t_eval: expected an adaptive method; with fixed steps, integrate from time to time.")
    calibrated = grid if grid is not None and isinstance(grid, CalibratedGrid) else None
    if calibrated and method != "unipc":
        raise ValueError(f"grid: this one was calibrated for method='unipc', got {method!r}.")
    ends = "t_span[0]", "t_span[1]"
    times = None if grid is None else check_times("grid", calibrated.times if calibrated else grid, start, end, ends)
    wanted = None if t_eval is None else check_times("t_eval", t_eval, start, end, ends, within=True)
    if not fixed:
        rtol, atol = check_tolerances(rtol, atol, *ys)
    if grads:
        say_no_gradient("y0", *ys)
    ys = tuple(y.detach().contiguous() for y in ys)
    problem = ((start, end), ys, packed, max_steps)
    per_sample = control == "per_sample"

    run: Run
    if method in MULTISTEP:
        flow = _check_multistep(f, str(method), coordinate, pi)
        order, first_step = whole("order", order, 1, 4), _check_first_step(first_step, math.inf)
        if fixed:
            times = times or _angle_grid(flow, start, end, steps)
            matrices = calibrated.tables(flow) if calibrated else (grid_tables(flow, times, order, str(method)), False)
            run = FixedGrid(times, *matrices, flow, *problem, None, progress)
        elif method == "unipc":
            rest = (order, rtol, atol, first_step, flow, *problem, wanted, progress)
            on_host = graphs.backend_of(ys[0].device) is None
            run = AdaptiveOnHost(*rest) if on_host and not per_sample else Adaptive(per_sample, *rest)
        else:
            raise ValueError(f"steps: expected a number of steps, or a grid, for the fixed-step method {method!r}.")
        run.plan = plan
        return run, None

    tableau = _method(method)
    if wanted and not tableau.dense and tableau.order > 4:
        raise ValueError(f"t_eval: {method!r} has no interpolation as accurate as its steps. Use RK45 or unipc.")
    if not (tableau.errors or fixed):
        raise ValueError(f"steps: expected a number of steps, or a grid, for the fixed-step method {method!r}.")
    drift: Drift = f if hasattr(f, "terms") else Function(f, packed, needs_double(start, end), grads)
    angle = None
    if coordinate == "angle":
        if not hasattr(f, "in_angle"):
            raise ValueError(
                f"coordinate: 'angle' expects f to be the ProbabilityFlow of an affine SDE, got {f!r:.80}."
            )
        drift = angle = f.in_angle((start, end))
        to = angle.coordinate
        times, wanted = (None if v is None else [to(t) for t in v] for v in (times, wanted))
        problem = ((to(start), to(end)), (angle.enter(ys[0], start),), packed, max_steps)
    span = problem[0]
    if fixed:
        run = FixedSteps(tableau, times or _even(steps, *span), drift, *problem, None, progress)
    else:
        first_step = _check_first_step(first_step, abs(span[1] - span[0]))
        joint = Joint if graphs.backend_of(ys[0].device) is None else JointOnDevice
        kind = PerSample if per_sample else joint
        run = kind(tableau, rtol, atol, first_step, pi, drift, *problem, wanted, progress)
    run.plan = plan
    return run, angle


def _method(method: str | Tableau) -> Tableau:
    if not isinstance(method, Tableau) and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    return tableau_of(method)


def _check_problem(f: Any, t_span: tuple[float, float], ys: tuple[Tensor, ...]) -> tuple[float, float]:
    """Start and end, where the problem is one."""
    if not callable(f) and not hasattr(f, "terms"):
        raise TypeError(f"f: expected a function f(t, y) or a Drift, got {type(f).__name__}.")
    try:
        start, end = t_span
    except (TypeError, ValueError):
        raise ValueError(f"t_span: expected a start and an end time, got {t_span!r:.100}.") from None
    start, end = real("t_span[0]", start, "a finite time"), real("t_span[1]", end, "a finite time")
    if start == end:
        raise ValueError(f"t_span: expected two different times, got {start} and {end}.")
    if not ys:
        raise ValueError("y0: expected at least one array, got an empty tuple.")
    for y in ys:
        check_state("y0", y)
        if len(y) != len(ys[0]) or y.device != ys[0].device or y.dtype != ys[0].dtype:
            raise ValueError("y0: expected parts of one batch size, dtype and device.")
    return start, end


def _check_first_step(first_step: float | None, longest: float) -> float | None:
    if first_step is None:
        return None
    return real("first_step", first_step, "a step within the interval", lambda h: 0 < h <= longest)


def _check_multistep(f: Any, method: str, coordinate: str, pi: bool) -> Flow:
    if not hasattr(f, "require_affine"):
        raise ValueError(f"method: {method!r} expects f to be the ProbabilityFlow of an affine SDE, got {f!r:.80}.")
    f.require_affine(f"method={method!r}")
    if coordinate != "t":
        raise ValueError(f"coordinate: {method!r} has its own, the angle; leave it at 't', got {coordinate!r}.")
    if pi:
        raise ValueError(f"pi: leave it at False, {method!r} has a controller of its own.")
    return f


def _angle_grid(flow: Flow, start: float, end: float, steps: int | None) -> list[float]:
    """Times equally spaced in the angle atan(s / m), the ends exact."""
    first, last = (math.atan(math.exp(-flow.sde.log_snr(t))) for t in (start, end))
    inner = torch.tensor(_even(steps, first, last)[1:-1], dtype=torch.float64)
    return [start, *flow.sde.time_at(-inner.tan().log()).tolist(), end]


def _even(steps: int | None, start: float, end: float) -> list[float]:
    steps = whole("steps", steps, 1, expected="a number of steps")
    h = (end - start) / steps
    return [start + i * h for i in range(steps)] + [end]
