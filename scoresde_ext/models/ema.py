"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..checks import check_flags, real


class ExponentialMovingAverage:
    """Keeps ``shadow = decay * shadow + (1 - decay) * parameter`` for every parameter that is trained.

    Args:
        parameters: usually ``model.parameters()``.
        decay: in [0, 1].
        use_num_updates: let the decay start small: min(decay, (1 + n) / (10 + n)) at the n-th update.

    Raises:
        ValueError: a decay outside [0, 1].
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float, use_num_updates: bool = True) -> None:
        self.decay = real("decay", decay, "a number in [0, 1]", lambda v: 0 <= v <= 1)
        check_flags(use_num_updates=use_num_updates)
        self.num_updates: int | None = 0 if use_num_updates else None
        self.shadow_params = [p.clone().detach() for p in _trained(parameters)]
        self.collected_params: list[Tensor] = []

    @torch.no_grad()
    def update(self, parameters: Iterable[Parameter]) -> None:
        """Moves the averages towards ``parameters``; call it after every optimizer step."""
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        trained = self._matching(parameters)
        if trained:
            torch._foreach_lerp_(self.shadow_params, [p.detach() for p in trained], 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Parameter]) -> None:
        """Writes the averages into ``parameters``."""
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
        if len(parameters) != len(self.collected_params):
            raise ValueError(
                f"parameters: expected the {len(self.collected_params)} that were stored, got {len(parameters)}."
            )
        for stored, p in zip(self.collected_params, parameters, strict=True):
            p.copy_(stored)

    def state_dict(self) -> dict[str, Any]:
        """``decay``, ``num_updates`` and ``shadow_params`` (the tensors themselves, not copies)."""
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned. The averages stay on their device.

        Raises:
            ValueError: another number of parameters, or other shapes.
        """
        loaded = state_dict["shadow_params"]
        if [p.shape for p in loaded] != [p.shape for p in self.shadow_params]:
            raise ValueError(
                f"shadow_params: expected {len(self.shadow_params)} tensors of the shapes of this model's parameters, "
                f"got {len(loaded)} that do not fit. The checkpoint belongs to another model."
            )
        self.decay, self.num_updates = state_dict["decay"], state_dict["num_updates"]
        self.shadow_params = [
            new.detach().to(old.device, old.dtype).clone() for new, old in zip(loaded, self.shadow_params, strict=True)
        ]

    def _matching(self, parameters: Iterable[Parameter]) -> list[Parameter]:
        trained = _trained(parameters)
        if len(trained) != len(self.shadow_params):
            raise ValueError(
                f"parameters: expected the {len(self.shadow_params)} trained ones of the model, got {len(trained)}."
            )
        return trained


def _trained(parameters: Iterable[Parameter]) -> list[Parameter]:
    return [p for p in parameters if p.requires_grad]
