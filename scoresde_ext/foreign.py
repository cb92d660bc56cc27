"""SDEs of a program's own, read as ours.

Programs bring their own copy of upstream's ``sde_lib``, some with changes. :func:`recognised` says how an SDE is read:
as one of ours, by its methods, or not at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reference import rows
from .sde_lib import PROCESSES, SDE, VESDE, VPSDE, AffineSDE, Tabulated, subVPSDE

_METHODS = ("sde", "marginal_prob", "discretize", "reverse", "prior_sampling", "prior_logp")


class _Foreign:
    """An SDE of the program's own, read as ours of the same name. Its attributes are its own, whenever they are looked
    up: what is changed there later counts here."""

    foreign: Any

    def __init__(self, foreign: Any) -> None:
        vars(self)["foreign"] = foreign

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self).get("foreign"), name)
        return value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value

    @property
    def T(self) -> float:
        return self.foreign.T

    def _checked_table(self, name: str) -> Tensor:
        if not hasattr(self.foreign, name):  # upstream's subVPSDE has none
            return self._missing_table(name)
        table = getattr(self, name)
        if len(table) != self.N:
            raise ValueError(
                f"sde: expected {name} of N = {self.N} values, got {len(table)}. Make another {type(self).__name__}: "
                "yours does not make its tables again when its N changes."
            )
        return table

    def _missing_table(self, name: str) -> Tensor:
        ours: Any = _OURS[type(self).__name__](*(getattr(self, p) for p in self.PARAMETERS))
        return getattr(ours, name)


class _ByMethods(_Foreign):
    """One whose methods are called."""

    TABLES: tuple[str, ...] = ()

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._like(x, "sde", self.foreign.sde(x, t))

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._like(x, "marginal_prob", self.foreign.marginal_prob(x, t))

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self._check_tables()
        return self._like(x, "discretize", self.foreign.discretize(x, t))

    def reverse(self, score_fn: Callable[[Tensor, Tensor], Tensor], probability_flow: bool = False) -> Any:
        return _ReverseByMethods(self, self.foreign.reverse(score_fn, probability_flow))

    def _missing_table(self, name: str) -> Tensor:
        raise ValueError(f"sde: expected a {type(self).__name__} with a table {name}, which this step needs, got none.")

    def _like(self, x: Tensor, method: str, pair: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        array, number = pair
        if array.shape != x.shape or (isinstance(number, Tensor) and number.shape != x.shape[:1]):
            raise ValueError(
                f"sde: expected {type(self.foreign).__name__}.{method} to return an array like x, {tuple(x.shape)}, "
                f"and one number a sample, got {tuple(array.shape)} and {tuple(getattr(number, 'shape', ()))}. "
                "Is it written for images (B, C, H, W) alone?"
            )
        return array, number

    def _check_tables(self) -> None:
        if self.TABLES and hasattr(self.foreign, self.TABLES[0]):
            self._checked_table(self.TABLES[0])

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        return self.foreign.prior_sampling(shape)

    def prior_logp(self, z: Tensor) -> Tensor:
        return self.foreign.prior_logp(z)


class _ReverseByMethods:
    """The reverse of such an SDE."""

    def __init__(self, forward: _ByMethods, rsde: Any) -> None:
        self.forward, self.rsde = forward, rsde

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self).get("rsde"), name)

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        return self.forward._like(x, "reverse().sde", self.rsde.sde(x, t))

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.forward._check_tables()
        return self.forward._like(x, "reverse().discretize", self.rsde.discretize(x, t))


class UnknownSDE(_ByMethods, SDE):
    """An SDE that nothing is known of but its methods. The program's own ``get_score_fn`` says what a network of it
    returns."""


_OURS: dict[str, type[Tabulated]] = {cls.__name__: cls for cls in (VPSDE, subVPSDE, VESDE)}
# Named as the class they are read as: in messages, and in what is saved.
_SAME: dict[str, type] = {name: type(name, (_Foreign, cls), {}) for name, cls in _OURS.items()}
_OTHER: dict[str, type] = {name: type(name, (_ByMethods, cls), {"TABLES": cls.TABLES}) for name, cls in _OURS.items()}
PROCESSES.update({_SAME[name]: PROCESSES[cls] for name, cls in _OURS.items()})


def recognised(sde: Any) -> SDE:
    """How this package reads an SDE; called where one comes in, and again where it is used.

    * An SDE of ours is what it is, and so is one derived from our :class:`SDE`: a network of it returns the score at
      label t (see :func:`scoresde_ext.models.utils.get_score_fn`), unless it derives from VPSDE, subVPSDE or VESDE.
    * One whose class, or a class that it derives from, is named VPSDE, subVPSDE or VESDE and has upstream's attributes
      is read as ours of this name, wherever the class is from. If all its methods compute the same, the kernels do;
      else its methods are called.
    * Of any other with upstream's methods, these are called, if the program has a ``models.utils.get_score_fn`` of its
      own: that one says what a network of it returns.

    Raises:
        NotImplementedError: anything else. What a network of it returns would be a guess.
    """
    if type(sde) in PROCESSES or isinstance(sde, (VPSDE, subVPSDE, VESDE)):
        return sde
    cls = type(sde)
    if cls not in _names:
        _names[cls] = next((base.__name__ for base in cls.__mro__ if base.__name__ in _OURS), None)
    name, lacking = _names[cls], []
    if name:
        key = _Itself(sde), fingerprint(sde)
        if key in _seen:
            return _seen[key]
        lacking = [a for a in (*_OURS[name].PARAMETERS, "T", *_METHODS) if not hasattr(sde, a)]
        if not lacking:
            _seen[key] = _read_as(name, sde)
            if len(_seen) > 16:
                _seen.popitem(last=False)
            return _seen[key]
    if isinstance(sde, SDE):
        return sde
    if name is None and not isinstance(sde, type) and all(hasattr(sde, a) for a in ("N", "T", *_METHODS)):
        from .models.program import own_function  # which imports this module

        if own_function("get_score_fn"):
            return UnknownSDE(sde)
    got = f"{type(sde).__name__} without {', '.join(lacking)}" if lacking else type(sde).__name__
    if isinstance(sde, type):
        got = f"the class {sde.__name__} and no object of it"
    raise NotImplementedError(
        f"sde: expected VPSDE, subVPSDE or VESDE, of scoresde_ext or with upstream's attributes, or a class derived "
        f"from scoresde_ext.sde_lib.SDE, got {got}."
    )


def _read_as(name: str, foreign: Any) -> SDE:
    sde = _SAME[name](foreign)
    return sde if _computes_the_same(foreign, sde) else _OTHER[name](foreign)


_seen: OrderedDict[Hashable, SDE] = OrderedDict()  # the latest few objects, as they were
_names: dict[type, str | None] = {}  # of ours, that a class is called by


class _Itself:
    """A value as a part of a key: equal to the same object alone, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(sde: Any) -> Hashable:
    """The SDE's class with its methods, and its attributes, as a key: tensors and other objects by their identity."""

    def mark(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return _Itself(value), 0 if value.is_inference() else value._version
        return value if isinstance(value, (bool, int, float, str, type(None))) else _Itself(value)

    cls, attributes = type(sde), getattr(sde, "__dict__", {})
    methods = (getattr(cls, name, None) for name in _METHODS)
    return cls, *map(_Itself, methods), *((name, mark(value)) for name, value in attributes.items())


def _computes_the_same(foreign: Any, ours: SDE) -> bool:
    """Whether two SDEs are the same process: at 64 times, in double precision, where upstream's formulas are exact.
    Discrete steps are compared to what float32 tables leave of them."""
    random = torch.get_rng_state()

    def values(sde: Any) -> list[tuple[float, Any]]:
        x = torch.linspace(-2.0, 2.0, 256, dtype=torch.float64, device="cpu").reshape(64, 1, 2, 2)
        early, late = (torch.logspace(-5.0, -1.0, 32), torch.linspace(0.1, 1.0, 32))
        t = torch.cat([early, late]).to("cpu", torch.float64) * float(sde.T)
        # Too few steps: the last of them do not exist.
        steps = t[AffineSDE.row(ours, "discrete_betas", t) <= 1] if isinstance(ours, VPSDE) else t
        found = [(1e-5, sde.T), (1e-5, sde.sde(x, t)), (1e-5, sde.marginal_prob(x, t)), (1e-5, sde.prior_logp(x))]
        found += [(1e-3, sde.discretize(x[: len(steps)], steps))]
        for flow in (False, True):
            rsde = sde.reverse(lambda x, t: torch.sin(x) * rows(1.0 + t, x), flow)
            found += [(1e-5, rsde.sde(x, t)), (1e-3, rsde.discretize(x[: len(steps)], steps))]
        torch.default_generator.manual_seed(0)
        return [*found, (1e-5, sde.prior_sampling((2, 3, 4, 4)))]

    try:
        # Neither the program's devices and sources of noise, nor its gradients.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            pairs = list(zip(values(foreign), values(ours), strict=True))
        return all(_close(a, b, tolerance) for (tolerance, a), (_, b) in pairs)
    except Exception:  # whatever the program's methods do not like about these arrays, they are its own
        return False
    finally:
        torch.set_rng_state(random)


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, tuple):
        return (
            isinstance(b, tuple)
            and len(a) == len(b)
            and all(_close(*pair, tolerance) for pair in zip(a, b, strict=True))
        )
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=2e-3 * tolerance)
