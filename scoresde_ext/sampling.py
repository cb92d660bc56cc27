"""Samplers: predictor-corrector (Song et al. 2021, appendix G) and probability-flow ODE (section 4.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import graphs, noise, sde_lib
from .callers import untraced
from .checks import (
    bad_rows,
    check_choice,
    check_corrector,
    check_device,
    check_eps,
    check_flags,
    check_scaler,
    check_shape,
    check_times,
    name_rows,
)
from .foreign import recognised
from .grids import Grid, calibrate_grid
from .integrate import SolverError, time_vector
from .models import utils as mutils
from .models.program import score_function
from .models.utils import from_flattened_numpy, get_score_fn, to_flattened_numpy
from .ode import InverseScaler, get_ode_sampler
from .predictors import (
    AncestralSamplingPredictor,
    AnnealedLangevinDynamics,
    Corrector,
    EulerMaruyamaPredictor,
    LangevinCorrector,
    NoneCorrector,
    NonePredictor,
    Predictor,
    ReverseDiffusionPredictor,
    get_corrector,
    get_predictor,
    register_corrector,
    register_predictor,
    require_transition,
    takes_grid,
)
from .sde_lib import SDE, VESDE, VPSDE

__all__ = [
    "AncestralSamplingPredictor",
    "AnnealedLangevinDynamics",
    "Corrector",
    "EulerMaruyamaPredictor",
    "Grid",
    "LangevinCorrector",
    "NoneCorrector",
    "NonePredictor",
    "Predictor",
    "ReverseDiffusionPredictor",
    "calibrate_grid",
    "from_flattened_numpy",
    "get_corrector",
    "get_ode_sampler",
    "get_pc_sampler",
    "get_predictor",
    "get_sampling_fn",
    "get_score_fn",
    "mutils",
    "register_corrector",
    "register_predictor",
    "sde_lib",
    "shared_corrector_update_fn",
    "shared_predictor_update_fn",
    "to_flattened_numpy",
]

# ---- one step as a function ----


def shared_predictor_update_fn(
    x: Tensor, t: Tensor, sde: SDE, model: Any, predictor: type | None, probability_flow: bool, continuous: bool
) -> tuple[Tensor, Tensor]:
    """One predictor step of ``model``; None is the predictor that does nothing. Returns ``(x, x_mean)``."""
    check_classes(predictor, None)
    check_flags(probability_flow=probability_flow, continuous=continuous)
    score_fn = score_function(sde, model, False, continuous, mutils)
    return (predictor or NonePredictor)(sde, score_fn, probability_flow).update_fn(x, t)


def shared_corrector_update_fn(
    x: Tensor, t: Tensor, sde: SDE, model: Any, corrector: type | None, continuous: bool, snr: float, n_steps: int
) -> tuple[Tensor, Tensor]:
    """The corrector steps of ``model``; None is the corrector that does nothing. Returns ``(x, x_mean)``."""
    check_classes(None, corrector)
    check_flags(continuous=continuous)
    snr, n_steps = check_corrector(snr, n_steps)
    score_fn = score_function(sde, model, False, continuous, mutils)
    return (corrector or NoneCorrector)(sde, score_fn, snr, n_steps).update_fn(x, t)


# ---- samplers ----


def check_finite(x: Tensor, what: str) -> Tensor:
    """No silent wrong answer: NaN or Inf at the end of a loop is an error that names the samples."""
    if not x.isfinite().all():
        rows = name_rows(bad_rows(x))
        raise SolverError(f"{what} ended with NaN or Inf in {rows}. The network or the step size (snr, N) is at fault.")
    return x


class Visit(NamedTuple):
    """What happens at one time of a predictor-corrector run.

    Args:
        t: the time, ``(B,)``.
        predict: the predictor's step, ``x -> (x, x_mean)``.
        after: ``(B,)``, the time at which samplers that know part of the data put it after that step. As upstream, the
            same ``t`` for the steps of upstream, although the state is one step further.
    """

    t: Tensor
    predict: Callable[[Tensor], tuple[Tensor, Tensor]]
    after: Tensor

    def __call__(self, loop: PCLoop, x: Tensor) -> tuple[Tensor, Tensor]:
        """The corrector's steps and the predictor's: ``(x, x_mean)``."""
        x, _ = loop.correct(x, self.t)
        return self.predict(x)


def check_pair(name: str, states: Any, method: str = "update_fn") -> tuple[Tensor, Tensor]:
    """What a step returns: two arrays, and not one whose samples would pass for them."""
    if not isinstance(states, (tuple, list)) or len(states) != 2:
        raise ValueError(f"{name}: expected {method} to return (x, x_mean), got {type(states).__name__}.")
    return states[0], states[1]


class PCLoop:
    """Predictor and corrector of one run: made once, with one score function."""

    def __init__(
        self,
        sde: SDE,
        model: Any,
        predictor: type | None,
        corrector: type | None,
        snr: float,
        n_steps: int,
        probability_flow: bool,
        continuous: bool,
    ) -> None:
        score_fn = score_function(sde, model, False, continuous, mutils)
        self.sde = sde
        self.predictor = (predictor or NonePredictor)(sde, score_fn, probability_flow)
        self.corrector = (corrector or NoneCorrector)(sde, score_fn, snr, n_steps)

    def ask_for_means(self, wanted: bool) -> None:
        """Whether the predictor's steps from now on return the mean, and not None. The corrector's never do."""
        for step, asked in ((self.predictor, wanted), (self.corrector, False)):
            if type(step).__module__ == Predictor.__module__:
                step.wants_mean = asked

    def predict(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with _draws_of(self.predictor):
            return check_pair("predictor", self.predictor.update_fn(x, t))

    def correct(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        with _draws_of(self.corrector):
            return check_pair("corrector", self.corrector.update_fn(x, t))

    def predict_to(self, x: Tensor, t: float, earlier: float) -> tuple[Tensor, Tensor]:
        with _draws_of(self.predictor):
            return check_pair("predictor", self.predictor.step_to(x, t, earlier), "step_to")

    def visits(self, like: Tensor, eps: float, grid: Sequence[float] | None, progress: bool) -> Iterator[Visit]:
        """The times of a run for states like ``like``, from T to eps.

        Without a grid there are N, and the predictor has its own step at each: as upstream, also at eps. With a grid,
        it steps from each time to the next, and from eps to the data, at 0.
        """
        if grid is None:
            for t in bar(torch.linspace(self.sde.T, eps, self.sde.N, device=like.device), progress):
                vec_t = t.expand(len(like))
                yield Visit(vec_t, functools.partial(self.predict, t=vec_t), vec_t)
            return
        require_transition(self.predictor)
        for t, earlier in bar(list(zip(grid, [*grid[1:], 0.0], strict=True)), progress):
            predict = functools.partial(self.predict_to, t=t, earlier=earlier)
            yield Visit(time_vector(t, like), predict, time_vector(max(earlier, eps), like))


def _draws_of(step: Predictor | Corrector) -> AbstractContextManager[Any]:
    """A class of the user's own may call torch.randn_like."""
    return nullcontext() if type(step).__module__ == Predictor.__module__ else noise.torch_draws()


def check_classes(predictor: Any, corrector: Any) -> None:
    """Predictors and correctors are handed over as classes; None does nothing."""
    for name, value, get, other in (
        ("predictor", predictor, get_predictor, Corrector),
        ("corrector", corrector, get_corrector, Predictor),
    ):
        if isinstance(value, str):
            raise ValueError(
                f"{name}: expected a class or None, got the name {value!r}. Pass sampling.{get.__name__}({value!r})."
            )
        if value is not None and (not callable(value) or (isinstance(value, type) and issubclass(value, other))):
            raise ValueError(f"{name}: expected a {name}'s class or None, got {value!r:.100}.")


def check_grid(grid: Any, sde: SDE, predictor: type | None, eps: float, continuous: bool) -> list[float] | None:
    """The times of a ``grid`` for predictor-corrector sampling; None stays None.

    Raises:
        ValueError: times that do not fall from T to eps; a network or a predictor that knows only the steps of the
            discrete process.
    """
    if grid is None:
        return None
    times = check_times("grid", grid, sde.T, eps)
    if not continuous and isinstance(recognised(sde), (VPSDE, VESDE)):
        raise ValueError(
            f"grid: expected continuous=True, got {continuous}. A network trained on the N times of the discrete "
            f"{type(sde).__name__} has no labels for others."
        )
    if predictor is not None and not takes_grid(predictor):
        raise ValueError(
            f"grid: expected a predictor with a method step_to(x, t, earlier), got {predictor!r}, whose "
            "update_fn knows its own step size alone. Add the method, or leave grid out."
        )
    return times


def bar(times: Any, progress: bool) -> Any:
    """The times one by one, with a progress bar on a terminal where asked for."""
    return tqdm(times, disable=None if progress else True, unit="step")


def get_pc_sampler(
    sde: SDE,
    shape: Sequence[int],
    predictor: type | None,
    corrector: type | None,
    inverse_scaler: InverseScaler | None,
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str = "cuda",
    *,
    seeds: noise.Seeds = None,
    grid: Sequence[float] | Tensor | None = None,
    on_failure: str = "raise",
    progress: bool = False,
    graph: str = "auto",
) -> PcSampler:
    """``sampler(model, draw=None)`` -> ``(samples, N (n_steps + 1))``: predictor-corrector sampling (Song et al. 2021,
    algorithm 1).

    Args:
        sde: the forward SDE; its N is the number of steps.
        shape: ``(B, *)``.
        predictor, corrector: classes, see :func:`get_predictor`; None does nothing.
        inverse_scaler: maps the network's data range to the samples' range; None leaves the samples as they are.
        snr: signal-to-noise ratio of the corrector.
        n_steps: corrector steps a predictor step.
        probability_flow: predictor along the ODE.
        continuous: whether the network was trained on continuous times.
        denoise: return the last mean, without its noise (appendix G).
        eps: last time.
        device: where to sample.
        seeds: a seed, of which sample b is stream b, or ``(seed, ids)``, with stream ``ids[b]``: the same samples
            every time, at any batch size for correctors that do not average over the batch; ``draw=k`` gives call k
            noise of its own. None: the source of noise in force, by default torch's generator.
        grid: times from T to eps, of any number, in place of N equal steps. Predictors then step from each time to the
            next by the SDE's own transition, and from eps to the data (where N equal steps end with one of T/N).
        on_failure: ``raise`` a SolverError, or ``status``: return the samples with NaN or Inf as they are.
        progress: a progress bar on a terminal.
        graph: on a GPU, ``replay`` captures a step as a CUDA graph (all steps, where there is a grid) and launches it
            again and again; so do ``while``, and ``auto`` for a module or a function around modules. ``off`` calls the
            network step by step. ``sampler.graph`` says what the last call did and why. See
            :func:`scoresde_ext.sampling.get_ode_sampler`.

    Raises:
        ValueError: an argument is wrong; before any evaluation.
        SolverError: a sample ended as NaN or Inf.
    """
    recognised(sde)
    shape, device, inverse_scaler = check_shape(shape), check_device(device), check_scaler(inverse_scaler)
    eps = check_eps(eps, sde.T)
    snr, n_steps = check_corrector(snr, n_steps)
    check_classes(predictor, corrector)
    check_flags(probability_flow=probability_flow, continuous=continuous, denoise=denoise, progress=progress)
    check_choice("on_failure", on_failure, ("raise", "status"))
    times = check_grid(grid, sde, predictor, eps, continuous)
    noise.seeded(seeds, shape[0])  # wrong seeds are refused now
    graphs.check(graph, device)
    steps = (predictor, corrector, snr, n_steps, probability_flow, continuous)
    return PcSampler(sde, shape, steps, inverse_scaler, denoise, eps, device, seeds, times, on_failure, progress, graph)


class PcSampler:
    """What :func:`get_pc_sampler` returns. ``graph``: how its last loop was run, and why."""

    def __init__(
        self,
        sde: SDE,
        shape: tuple[int, ...],
        steps: tuple[type | None, type | None, float, int, bool, bool],
        inverse_scaler: InverseScaler,
        denoise: bool,
        eps: float,
        device: torch.device,
        seeds: noise.Seeds,
        times: list[float] | None,
        on_failure: str,
        progress: bool,
        graph: str,
    ) -> None:
        self.sde, self.shape, self.steps, self.inverse_scaler, self.denoise = sde, shape, steps, inverse_scaler, denoise
        self.eps, self.device, self.seeds, self.times, self.progress = eps, device, seeds, times, progress
        self.on_failure, self.draws = on_failure, noise.Draws(seeds)
        self.asked, self.cache, self.graph = graph, graphs.Cache(), graphs.ON_CPU

    @untraced
    def __call__(self, model: Any, *, draw: int | None = None) -> tuple[Tensor, int]:
        with torch.no_grad(), self.draws(self.shape[0], draw):
            loop = PCLoop(self.sde, model, *self.steps)
            x = noise.prior(self.sde, self.shape, self.device)
            with noise.run(x.device):
                x, x_mean = self._run(loop, model, x)
            result = x_mean if self.denoise else x
            if self.on_failure == "raise":
                check_finite(result, "Predictor-corrector sampling")
            return self.inverse_scaler(result), self.steps_in_all * (self.steps[3] + 1)

    @property
    def steps_in_all(self) -> int:
        return len(self.times) if self.times else self.sde.N

    def _run(self, loop: PCLoop, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        plan = graphs.plan(self.asked, self.cache, model, x.device, self.sde)
        streams, why = None, ""
        if graphs.backend_of(x.device) is not None:
            streams = noise.streams_in_force(x.device)
            if not all(type(step).__module__ == Predictor.__module__ for step in (loop.predictor, loop.corrector)):
                why = "a predictor or corrector of your own may do at each step what a graph would not"
            elif streams is None:
                why = "recorded noise is looked up draw by draw"
        if streams is None or why:
            self.graph = graphs.Choice("off", why) if why else plan.choice
            return _in_order(loop, x, loop.visits(x, self.eps, self.times, self.progress), self.steps_in_all)
        if self.times is not None:
            run = _GridSteps(loop, x, streams, self.eps, self.times)
            plan.run(run, x.device, type(run).__name__, range(1))
            self.graph = plan.choice
            return run.x, run.x_mean
        equal = _EqualSteps(loop, x, streams, torch.linspace(self.sde.T, self.eps, self.sde.N, device=x.device))
        loop.ask_for_means(False)
        plan.run(equal, x.device, type(equal).__name__, bar(range(self.sde.N - 1), self.progress))
        self.graph = plan.choice
        loop.ask_for_means(True)
        return equal.visit()


def _in_order(loop: PCLoop, x: Tensor, visits: Iterable[Visit], n: int) -> tuple[Tensor, Tensor]:
    """All visits, ``n`` of them, and the mean of the last."""
    x_mean = x
    for number, visit in enumerate(visits, 1):
        loop.ask_for_means(number == n)
        x, x_mean = visit(loop, x)
    return x, x_mean


class _EqualSteps:
    """The steps of a run but the last as a :class:`graphs.Loop`: one corrector and one predictor call a step."""

    STATE: tuple[str, ...] = ("x", "streams", "times", "index")
    going: Tensor  # not used: the number of steps is known

    def __init__(self, loop: PCLoop, x: Tensor, streams: Any, times: Tensor) -> None:
        self.loop, self.x, self.streams, self.times = loop, x, streams, times
        self.index = torch.zeros(1, dtype=torch.int64, device=x.device)

    def visit(self) -> tuple[Tensor, Tensor]:
        t = self.times.index_select(0, self.index).expand(len(self.x))
        x, _ = self.loop.correct(self.x, t)
        return self.loop.predict(x, t)

    def step(self) -> None:
        self.x, _ = self.visit()
        self.index = self.index + 1


class _GridSteps:
    """The steps of a run along a grid as a :class:`graphs.Loop` of one step: their times are numbers."""

    STATE: tuple[str, ...] = ("x", "x_mean", "streams")
    going: Tensor

    def __init__(self, loop: PCLoop, x: Tensor, streams: Any, eps: float, times: list[float]) -> None:
        self.loop, self.x, self.x_mean, self.streams, self.eps, self.times = loop, x, x, streams, eps, times

    def step(self) -> None:
        visits = self.loop.visits(self.x, self.eps, self.times, progress=False)
        self.x, self.x_mean = _in_order(self.loop, self.x, visits, len(self.times))


def get_sampling_fn(
    config: Any, sde: SDE, shape: Sequence[int], inverse_scaler: InverseScaler | None, eps: float
) -> Callable[..., tuple[Tensor, int]]:
    """The sampler that ``config.sampling`` asks for (``method`` 'pc' or 'ode', in any case); ValueError for another
    method."""
    sampling = config.sampling
    method = str(sampling.method).lower()
    if method == "ode":
        return get_ode_sampler(
            sde, shape, inverse_scaler, denoise=sampling.noise_removal, eps=eps, device=config.device
        )
    if method == "pc":
        return get_pc_sampler(
            sde=sde,
            shape=shape,
            predictor=get_predictor(str(sampling.predictor).lower()),
            corrector=get_corrector(str(sampling.corrector).lower()),
            inverse_scaler=inverse_scaler,
            snr=sampling.snr,
            n_steps=sampling.n_steps_each,
            probability_flow=sampling.probability_flow,
            continuous=config.training.continuous,
            denoise=sampling.noise_removal,
            eps=eps,
            device=config.device,
        )
    raise ValueError(f"config.sampling.method: expected 'pc' or 'ode', got {sampling.method!r}.")
