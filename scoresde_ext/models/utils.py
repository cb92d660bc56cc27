"""Score functions from networks, and the registry of networks."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .. import sde_lib
from .._C import host
from ..callers import warn
from ..checks import check_flags, check_inputs, traced
from ..foreign import UnknownSDE, recognised
from ..integrate.drift import Lent, time_vector
from ..reach import Network, modules_of, same_modules_of
from ..reference import rows

_MODELS: dict[str, type] = {}


def register_in(registry: dict[str, type], kind: str, cls: type | None, name: str | None) -> Any:
    """Registers a class under ``name`` or its own name; without ``cls``, the decorator that does. ValueError where the
    name is taken."""

    def register(cls: type) -> type:
        key = cls.__name__ if name is None else name
        if key in registry:
            raise ValueError(f"name: a {kind} {key!r} is already registered ({registry[key]}). Choose another name.")
        registry[key] = cls
        return cls

    return register if cls is None else register(cls)


def look_up(registry: dict[str, type], kind: str, name: str) -> type:
    """The class registered under ``name``; KeyError that lists the names if there is none."""
    try:
        return registry[name]
    except KeyError:
        names = ", ".join(sorted(registry)) or "none"
        raise KeyError(
            f"{kind}: expected a registered one ({names}), got {name!r}. Import the module that registers it first."
        ) from None


def register_model(cls: type | None = None, *, name: str | None = None) -> Any:
    """Class decorator: registers a network under ``name`` or its class name; ValueError where the name is taken."""
    return register_in(_MODELS, "model", cls, name)


def get_model(name: str) -> type:
    """The network registered under ``name``, here or in the program's own ``models.utils``, where the networks of
    upstream's ``models`` register themselves; KeyError if there is none."""
    theirs = getattr(sys.modules.get("models.utils"), "_MODELS", {})
    return look_up({**theirs, **_MODELS}, "model", name)


def get_sigmas(config: Any) -> np.ndarray:
    """The noise levels of SMLD, largest first: geometric from ``model.sigma_max`` to ``model.sigma_min`` in
    ``model.num_scales``."""
    model = config.model
    return np.exp(np.linspace(np.log(model.sigma_max), np.log(model.sigma_min), model.num_scales))


def get_ddpm_params(config: Any) -> dict[str, Any]:
    """The tables of DDPM for ``model.{beta_min, beta_max, num_scales}`` (Ho et al. 2020), as float64 arrays."""
    steps = 1000
    # Upstream's scale: betas are those of 1000 steps whatever num_scales says.
    beta_min, beta_max = (
        config.model.beta_min / config.model.num_scales,
        config.model.beta_max / config.model.num_scales,
    )
    betas = np.linspace(beta_min, beta_max, steps, dtype=np.float64)
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas, axis=0)
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_1m_alphas_cumprod": np.sqrt(1.0 - alphas_cumprod),
        "beta_min": beta_min * (steps - 1),
        "beta_max": beta_max * (steps - 1),
        "num_diffusion_timesteps": steps,
    }


def create_model(config: Any) -> nn.Module:
    """The network that ``config.model.name`` names, on ``config.device``, in DataParallel as upstream has it."""
    model = get_model(config.model.name)(config).to(config.device)
    return nn.DataParallel(model)


def set_mode(model: Network, train: bool) -> None:
    """Training or evaluation mode for the whole network, where it is in the other. Called once a run: the walk over all
    modules costs milliseconds.

    For a function, it is the mode of the modules that it reaches, see :mod:`scoresde_ext.reach`; training mode only
    that of modules with a parameter to train: a teacher whose weights are frozen stays as it is.
    """
    for module in modules_of(model):
        if _has_mode(module, model, train) and not all(_in_mode(m, train) for m in module.modules()):
            _switch(module, train)


def ensure_mode(model: Network, train: bool) -> None:
    """Like :func:`set_mode`, for what is called every training step: it looks at the outermost modules alone."""
    for module in same_modules_of(model):
        if not _in_mode(module, train) and _has_mode(module, model, train):
            _switch(module, train)


def _in_mode(module: nn.Module, train: bool) -> bool:
    """Whether a module says so. What torch.export made has a ``train`` of its own, and says anything; a frozen
    ScriptModule says nothing."""
    return getattr(module, "training", train) == train and "train" not in module.__dict__


def _has_mode(module: nn.Module, model: Network, train: bool) -> bool:
    """Whether a module that the network reaches takes part in this mode."""
    return not train or module is model or any(p.requires_grad for p in module.parameters())


def _switch(module: nn.Module, train: bool) -> None:
    try:
        module.train(train)
    except (NotImplementedError, RuntimeError) as error:
        parts = () if isinstance(module, fx.GraphModule) else tuple(module.children())
        for part in parts:  # one of them has only one mode: the others take theirs
            _switch(part, train)
        if parts:
            module.training = train
        else:
            _say_that_it_stays(module, train, error)


_looked_at: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _say_that_it_stays(module: nn.Module, train: bool, error: Exception) -> None:
    """A warning, once, where a module has one mode only and that makes a difference."""
    if _looked_at.get(module) == train:
        return
    _looked_at[module] = train
    asked, other = ("training", "evaluation") if train else ("evaluation", "training")
    if not isinstance(module, fx.GraphModule):
        what = f"its part {type(module).__name__}"
        warn(f"model: {what} cannot be put into {asked} mode ({error}). It stays as it is.")
    elif _recorded_in(module, not train):
        warn(
            f"model: it was exported in {other} mode and stays in it, with its dropout and batch norm. Export it again "
            f"from a network in {asked} mode."
        )


def _recorded_in(module: fx.GraphModule, train: bool) -> bool:
    """Whether the graph of an exported module has an operation that was recorded in this mode and has another."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        mode = values.get("train", values.get("training"))
        # Without running statistics, batch norm is the same in both modes; so is dropout of nothing.
        if mode is train and values.get("running_mean", module) is not None and values.get("p") != 0:
            return True
    return False


def get_model_fn(model: Network, train: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """``model_fn(x, labels)``: the network in the mode asked for. A plain function is accepted as a network."""
    check_flags(train=train)
    return network_in_mode(model, bool(train))  # also where it is numpy's


def network_in_mode(model: Network, train: bool, each_step: bool = False) -> CheckedNetwork:
    """:func:`get_model_fn`, once a run or, by what is remembered of a network, at ``each_step`` of training."""
    if each_step:
        ensure_mode(model, train)
        return CheckedNetwork(model)
    set_mode(model, train)
    # What trains has no use for its inputs afterwards.
    return CheckedNetwork(model, modules_of(model), lent=not train)


class CheckedNetwork:
    """A network that is given inputs in the dtype of its own parameters, and whose output is checked.

    ``modules`` are those that it reaches; None: as found before. ``lent``: its inputs stay as they are, see
    :class:`scoresde_ext.integrate.drift.Lent`.
    """

    def __init__(self, model: Network, modules: Sequence[nn.Module] | None = None, lent: bool = False) -> None:
        if not callable(model) or isinstance(model, type):
            got = f"the class {model.__name__}" if isinstance(model, type) else f"{model!r:.100}"
            raise ValueError(f"model: expected a network, a module or a function of (x, labels), got {got}.")
        self.model, self.modules = model, same_modules_of(model) if modules is None else modules
        dtypes = {_dtype_of(module) for module in self.modules} - {None}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.lent = Lent("model") if lent else None

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.dtype is not None and x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self.dtype is not None and labels.is_floating_point():
            # Labels run to 999: half precision would merge neighbours.
            labels = labels.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        out = self.model(x, labels) if self.lent is None else self.lent(self.model, x, labels)
        if not isinstance(out, Tensor) or out.shape != x.shape or not out.is_floating_point():
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"model: expected an output of the shape of its input, floating point {tuple(x.shape)}, got {got}. "
                "A score network maps (x, labels) to one number for each element of x."
            )
        return out


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return None


class ScoreFunction:
    """``score(x, t) = k(t) out`` with ``out = network(x, labels(t))``; ``labels`` is a function of t, or a function
    without arguments whose value they are proportional to, if ``proportional``.

    Called, it returns the score, shape ``(B, *)``, at states ``x`` and times ``t`` ``(B,)``. :meth:`terms` leaves the
    product to the kernels. ValueError for times and states as in ``marginal_prob``, and for an output of another shape.
    """

    def __init__(
        self,
        sde: sde_lib.SDE,
        network: Network,
        labels: Callable[..., Any],
        coefficient: Callable[[Any], Any],
        predicts_noise: bool = False,
        proportional: bool = False,
    ) -> None:
        self.sde, self.network, self.coefficient = sde, network, coefficient
        self.labels: Callable[[Tensor], Tensor] = (lambda t: t * labels()) if proportional else labels
        self._factor = labels if proportional else None
        self.predicts_noise = predicts_noise  # score = -out / std(t)

    @property
    def scale(self) -> float | None:
        """The number of which labels are ``scale t``; None where they are something else. (It is looked up when it is
        needed: it may follow from the SDE's N.)"""
        return None if self._factor is None else float(self._factor())

    def label(self, t: float, like: Tensor) -> Tensor:
        """The labels of a batch ``like`` that has one time."""
        scale = self.scale
        if scale is None or not like.is_cpu or traced():
            return self.labels(time_vector(t, like))
        return self._scaled(scale, t, len(like), like.dtype == torch.float64)

    @staticmethod
    def _scaled(scale: float, t: float, n: int, is_double: bool) -> Tensor:
        """Labels of n samples on the CPU. The same numbers as a product of tensors, which takes longer than all else
        that a small batch needs between two evaluations: one of float32 numbers in double precision is rounded once."""
        return host.filled(n, (t if is_double else float(np.float32(t))) * scale, is_double)

    def terms(self, x: Tensor, t: Tensor, at: Any) -> tuple[Tensor, Any]:
        """``(out, k)``; k at the time ``at``, ``t`` itself or the number that all of it is, on the CPU."""
        scale = None if isinstance(at, Tensor) else self.scale
        labels = self.labels(t) if scale is None else self._scaled(scale, at, len(t), t.dtype == torch.float64)
        return self.network(x, labels), self.coefficient(at)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        check_inputs(x, t, self.sde.T)
        out, k = self.terms(x, t, t)
        return (rows(k, out) * out).to(x.dtype)


def get_score_fn(sde: sde_lib.SDE, model: Network, train: bool = False, continuous: bool = False) -> ScoreFunction:
    """The score function of a network for ``sde``. Sets the network's mode once, now.

    The network's labels and the score's coefficient are upstream's: VP and sub-VP label 999 t and score = -out / std;
    VP trained on discrete steps label t (N - 1) and the discrete std; VE label sigma(t), or the index from the largest
    sigma down, and score = out. For a user's own SDE the network is taken to return the score at label t.

    Args:
        sde: VPSDE, subVPSDE, VESDE, also of the program's own, or a class derived from our SDE; see
            :func:`scoresde_ext.foreign.recognised`.
        model: a module or function ``model(x, labels)``.
        train: mode of the network.
        continuous: whether the network was trained on continuous times.

    Raises:
        NotImplementedError: another SDE.
    """
    recognised(sde)
    check_flags(continuous=continuous)
    return make_score_fn(sde, get_model_fn(model, train), continuous)


def make_score_fn(sde: sde_lib.SDE, network: Callable[[Tensor, Tensor], Tensor], continuous: bool) -> ScoreFunction:
    """:func:`get_score_fn` for a network that is in its mode already."""
    process: Any = recognised(sde)
    if isinstance(process, UnknownSDE):
        raise NotImplementedError(
            f"sde: what a network of {type(process.foreign).__name__} returns is not known here. Only the program's "
            "own get_score_fn says it."
        )
    if isinstance(process, (sde_lib.VPSDE, sde_lib.subVPSDE)):
        if continuous or isinstance(process, sde_lib.subVPSDE):
            std = _marginal_std(process)
            return ScoreFunction(process, network, lambda: 999, lambda t: -1.0 / std(t), True, proportional=True)
        return ScoreFunction(
            process,
            network,
            lambda: process.N - 1,
            lambda t: -1.0 / process.row("sqrt_1m_alphas_cumprod", t),
            proportional=True,
        )
    if isinstance(process, sde_lib.VESDE):
        if continuous:
            return ScoreFunction(process, network, _marginal_std(process), lambda t: 1.0)
        return ScoreFunction(
            process, network, lambda t: torch.round((process.T - t) * (process.N - 1)).long(), lambda t: 1.0
        )
    return ScoreFunction(process, network, lambda t: t, lambda t: 1.0)


def _marginal_std(sde: sde_lib.AffineSDE) -> Callable[[Any], Any]:
    """std(t) as a function, also where a subclass gives it by ``marginal_prob`` alone."""
    if sde_lib.is_affine(sde):
        return lambda t: sde.marginal_coefficients(t)[1]
    return lambda t: sde.marginal_prob(t.new_zeros(len(t), 1, 1, 1), t)[1]


def to_flattened_numpy(x: Tensor) -> np.ndarray:
    """A flat numpy copy of a tensor, as scipy's solvers want it."""
    return x.detach().cpu().numpy().reshape((-1,))


def from_flattened_numpy(x: np.ndarray, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_flattened_numpy`."""
    assert math.prod(shape) == x.size
    return torch.from_numpy(x.reshape(tuple(shape)))
