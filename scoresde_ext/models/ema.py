"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..checks import check_flags, real

_AVERAGED_IN = {torch.bfloat16: torch.float32, torch.float16: torch.float32}  # others in their own dtype


class ExponentialMovingAverage:
    """Keeps ``shadow = decay * shadow + (1 - decay) * parameter`` for every parameter that is trained: that requires a
    gradient when the average is made. Freezing it later changes nothing.

    The averages have the dtype of their parameters, and float32 for bfloat16 and float16, where ``(1 - decay)`` times a
    difference would be rounded away. They follow a network that changes its dtype; for another device see :meth:`to`.

    Args:
        parameters: usually ``model.parameters()``.
        decay: in [0, 1].
        use_num_updates: let the decay start small: min(decay, (1 + n) / (10 + n)) at the n-th update.

    Raises:
        ValueError: a decay outside [0, 1]. Later, by methods that take ``parameters``: these are not the ones that are
            averaged, one that is not averaged requires a gradient now, or the averages are on another device.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float, use_num_updates: bool = True) -> None:
        self.decay = _check_decay(decay)
        check_flags(use_num_updates=use_num_updates)
        self.num_updates: int | None = 0 if use_num_updates else None
        if isinstance(parameters, Module):
            raise TypeError(f"parameters: expected model.parameters(), got the module {type(parameters).__name__}.")
        parameters = list(parameters)
        self._is_averaged = [p.requires_grad for p in parameters]
        self.shadow_params = [
            p.detach().to(_AVERAGED_IN.get(p.dtype, p.dtype), copy=True) for p in parameters if p.requires_grad
        ]
        self.collected_params: list[Tensor] = []

    @torch.no_grad()
    def update(self, parameters: Iterable[Parameter]) -> None:
        """Moves the averages towards ``parameters``; call it after every optimizer step."""
        ends = self._ends(self._matching(parameters))
        decay = _check_decay(self.decay)
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        if ends:
            torch._foreach_lerp_(self.shadow_params, ends, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Parameter]) -> None:
        """Writes the averages into ``parameters``, in their dtype and on their device."""
        for shadow, p in zip(self.shadow_params, self._matching(parameters), strict=True):
            p.copy_(shadow)

    def store(self, parameters: Iterable[Parameter]) -> None:
        """Keeps a copy of ``parameters`` for :meth:`restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Parameter]) -> None:
        """Writes the stored copies back: evaluate with the averages between :meth:`store` and this, training is not
        disturbed."""
        parameters = list(parameters)
        if not self.collected_params and parameters:
            raise ValueError("parameters: expected store(parameters) before restore, but nothing is stored.")
        check_shapes("parameters", parameters, self.collected_params, "stored")
        for stored, p in zip(self.collected_params, parameters, strict=True):
            p.copy_(stored)

    def to(self, device: torch.device | str) -> ExponentialMovingAverage:
        """Moves the averages, and what :meth:`store` keeps, to a device: for a network that was moved after its average
        was made. Returns the average itself."""
        self.shadow_params = [p.to(device) for p in self.shadow_params]
        self.collected_params = [p.to(device) for p in self.collected_params]
        return self

    def state_dict(self) -> dict[str, Any]:
        """``decay``, ``num_updates`` and ``shadow_params`` (the tensors themselves, not copies)."""
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned. The averages keep their device and dtype.

        Raises:
            ValueError: another number of parameters, or other shapes. Nothing is loaded then.
        """
        loaded = state_dict["shadow_params"]
        check_shapes("shadow_params", loaded, self.shadow_params)
        decay, count = _check_decay(state_dict["decay"]), state_dict["num_updates"]
        self.decay, self.num_updates = decay, None if count is None else int(count)
        self.shadow_params = [
            new.detach().to(old.device, old.dtype, copy=True)
            for new, old in zip(loaded, self.shadow_params, strict=True)
        ]

    def _matching(self, parameters: Iterable[Parameter]) -> list[Parameter]:
        """Of all parameters of the network, or of the trained ones alone, those that are averaged."""
        averaged = list(parameters)
        if len(averaged) != len(self.shadow_params):
            if len(averaged) == len(self._is_averaged):
                self._check_others(averaged)
                averaged = list(compress(averaged, self._is_averaged))
            else:
                averaged = [p for p in averaged if p.requires_grad]
        check_shapes("parameters", averaged, self.shadow_params)
        return averaged

    def _check_others(self, parameters: list[Parameter]) -> None:
        for i, (p, is_averaged) in enumerate(zip(parameters, self._is_averaged, strict=True)):
            if p.requires_grad and not is_averaged:
                raise ValueError(
                    f"parameters: number {i}, of shape {tuple(p.shape)}, was frozen when the average was made, has no "
                    "average, and is trained now. Make a new ExponentialMovingAverage after you unfreeze parameters."
                )

    def _ends(self, averaged: list[Parameter]) -> list[Any]:
        """The parameters in the dtype of their averages, which take that of a network that has changed its own."""
        for p, shadow in zip(averaged, self.shadow_params, strict=True):
            if p.device != shadow.device:
                raise ValueError(
                    f"parameters: expected the device of the averages, {shadow.device}, got {p.device}. "
                    f"Move the averages with .to({str(p.device)!r})."
                )
        dtypes = [p.dtype for p in averaged]
        wanted = [_AVERAGED_IN.get(dtype, dtype) for dtype in dtypes]
        if wanted != [shadow.dtype for shadow in self.shadow_params]:
            self.shadow_params = [s.to(dtype) for s, dtype in zip(self.shadow_params, wanted, strict=True)]
        return averaged if dtypes == wanted else [p.to(dtype) for p, dtype in zip(averaged, wanted, strict=True)]


def check_shapes(name: str, tensors: Sequence[Tensor], wanted: Sequence[Tensor], verb: str = "averaged") -> None:
    """ValueError unless ``tensors`` have the number and the shapes of ``wanted``."""
    shapes, right = [t.shape for t in tensors], [t.shape for t in wanted]
    if shapes == right:
        return
    if len(shapes) != len(right):
        raise ValueError(f"{name}: expected the {len(right)} tensors that are {verb}, got {len(shapes)}.")
    i = next(i for i in range(len(right)) if shapes[i] != right[i])
    raise ValueError(
        f"{name}: expected the shapes that are {verb}, {tuple(right[i])} for number {i}, got {tuple(shapes[i])}."
    )


def _check_decay(decay: Any) -> float:
    return real("decay", decay, "a number in [0, 1]", lambda v: 0 <= v <= 1)
