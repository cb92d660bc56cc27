"""A program's own ``models.utils``, beside ours.

Programs bring their own ``get_score_fn`` and ``get_model_fn``, some with changes: another factor of the labels, another
scale of the output. They are called, unless a trial shows that they compute what ours do, which leave products to the
kernels.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .. import sde_lib
from ..callers import constant_when_compiled
from ..foreign import UnknownSDE, fingerprint, recognised
from ..reach import Network
from . import utils
from .utils import CheckedNetwork, ScoreFunction, make_score_fn, network_in_mode

_OURS: dict[str, Callable[..., Any]] = {"get_score_fn": utils.get_score_fn, "get_model_fn": utils.get_model_fn}


def own_function(name: str, *places: Any) -> Callable[..., Any] | None:
    """The program's own ``get_score_fn`` or ``get_model_fn``: what was put in the place of ours, in this module or
    where ``places`` find it, or that of a module ``models.utils`` which is not this one. None: the program has none."""
    for place in (*places, utils, sys.modules.get("models.utils")):
        found = getattr(place, name, None)
        if found is not None and found is not _OURS[name]:
            return found
    return None


def score_function(
    sde: Any, model: Network, train: bool, continuous: bool, *places: Any, each_step: bool = False
) -> ScoreFunction:
    """What samplers, losses and likelihoods use: the score function of the program's own ``get_score_fn`` (see
    :func:`own_function`), called as it is; ours, which leaves products to the kernels, where there is none or it
    computes the same. ``each_step``: of training."""
    theirs = own_function("get_score_fn", *places)
    if theirs is None:
        return make_score_fn(sde, model_function(model, train, *places, each_step=each_step), continuous)
    if _same_score(theirs, sde, continuous):
        return make_score_fn(sde, network_in_mode(model, train, each_step), continuous)
    score = theirs(_as_they_know_it(theirs, sde), model, train=train, continuous=continuous)
    return ScoreFunction(recognised(sde), _InPlaceOf(model, score, train), lambda t: t, lambda t: 1.0)


def model_function(model: Network, train: bool, *places: Any, each_step: bool = False) -> Network:
    """The same for ``get_model_fn``."""
    theirs = own_function("get_model_fn", *places)
    if theirs is None or _same_output(theirs):
        return network_in_mode(model, train, each_step)
    return _InPlaceOf(model, theirs(model, train=train), train)


class _InPlaceOf(CheckedNetwork):
    """What the program made of a network: checked, and given arrays in the network's dtype, as the network is."""

    def __init__(self, model: Network, made: Network, train: bool) -> None:
        super().__init__(model, lent=not train)
        self.model = made


class _Passing:
    """An SDE of ours that ``isinstance`` takes for the program's own class of its name."""

    def __init__(self, sde: Any, cls: type) -> None:
        self._sde, self._cls = sde, cls

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._cls

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("_sde"), name)


def _as_they_know_it(theirs: Any, sde: Any) -> Any:
    """The SDE as the program's own function, which tells SDEs apart by the classes of the program's own ``sde_lib``,
    has to be given it."""
    scope = getattr(inspect.unwrap(theirs), "__globals__", {})
    for ours in (sde_lib.VPSDE, sde_lib.subVPSDE, sde_lib.VESDE):
        if isinstance(sde, ours):
            cls = getattr(scope.get("sde_lib"), ours.__name__, scope.get(ours.__name__))
            return _Passing(sde, cls) if isinstance(cls, type) and not isinstance(sde, cls) else sde
    return sde


_answers: dict[Hashable, bool] = {}


def _once(key: Hashable, question: Callable[[], bool]) -> bool:
    if key not in _answers:
        if len(_answers) >= 256:
            _answers.clear()
        random = torch.get_rng_state()
        try:
            # Apart from the program's gradients and sources of noise. What draws noise is not the same as ours.
            with torch.no_grad(), torch._C.DisableTorchFunction():
                answer = question()
            _answers[key] = answer and torch.equal(torch.get_rng_state(), random)
        finally:
            torch.set_rng_state(random)
    return _answers[key]


@constant_when_compiled
def _same_score(theirs: Any, sde: Any, continuous: bool) -> bool:
    """Whether the program's own ``get_score_fn`` gives a network the same inputs as ours, in the same mode, and makes
    the same score of its output."""

    def answer() -> bool:
        process, given = recognised(sde), _as_they_know_it(theirs, sde)
        if isinstance(process, UnknownSDE):
            return False
        times = (torch.logspace(-5.0, -1.0, 8, device="cpu"), torch.linspace(0.15, 1.0, 8, device="cpu"))
        x, t = _trial_states(), torch.cat(times).double() * process.T
        try:
            for train in (False, True):
                wanted, found = _Recorder(), _Recorder()
                ours = make_score_fn(process, network_in_mode(wanted, train), continuous)(x, t)
                score = theirs(given, found, train=train, continuous=continuous)(x.clone(), t.clone())
                if not (found.saw_the_same_as(wanted) and _equal(score, ours)):
                    return False
            return True
        except NotImplementedError:  # they do not know it; our documentation says what it is, if it derives from ours
            return isinstance(sde, sde_lib.SDE) and not isinstance(sde, _KNOWN)
        except Exception:  # whatever they need that this trial has not
            return False

    return _once((theirs, fingerprint(sde), continuous), answer)


@constant_when_compiled
def _same_output(theirs: Any) -> bool:
    """Whether the program's own ``get_model_fn`` hands inputs and output of the network on as they are."""

    def answer() -> bool:
        x, labels = _trial_states(), torch.linspace(0.0, 999.0, 16, dtype=torch.float64, device="cpu")
        try:
            for train in (False, True):
                wanted, found = _Recorder(), _Recorder()
                ours = network_in_mode(wanted, train)(x, labels)
                out = theirs(found, train=train)(x.clone(), labels.clone())
                if not (found.saw_the_same_as(wanted) and _equal(out, ours)):
                    return False
            return True
        except Exception:
            return False

    return _once(theirs, answer)


_KNOWN = (sde_lib.VPSDE, sde_lib.subVPSDE, sde_lib.VESDE)


def _trial_states() -> Tensor:
    return torch.linspace(-3.0, 3.0, 64, dtype=torch.float64, device="cpu").reshape(16, 1, 2, 2)


class _Recorder(nn.Module):
    """A network that keeps what it is given, and returns numbers of all sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.seen.append((x.clone(), labels.clone(), self.training))
        sizes = torch.logspace(-3.0, 3.0, 64, dtype=torch.float64, device="cpu").reshape(16, 1, 2, 2).flip(0)
        return sizes * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64, device="cpu")

    def saw_the_same_as(self, other: _Recorder) -> bool:
        (x, labels, mode), *more = self.seen
        ((wanted_x, wanted_labels, wanted_mode),) = other.seen
        kind = labels.is_floating_point() == wanted_labels.is_floating_point()
        return not more and kind and _equal(x, wanted_x) and _equal(labels, wanted_labels) and mode == wanted_mode


def _equal(a: Tensor, b: Tensor) -> bool:
    """To the rounding of float32, in which a program may compute."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=0.0)
