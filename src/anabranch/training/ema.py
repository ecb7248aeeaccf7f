"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """``average <- decay * average + (1 - decay) * weights`` after every step.

    Early on the average would stay at the initial weights, so the decay grows towards its value:
    ``min(decay, (1 + step) / (10 + step))``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        self._parameters = parameters
        self._decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (the first is 1)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        average = list(self.average.values())
        weights: list[Tensor] = list(self._parameters.values())
        torch._foreach_lerp_(average, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the model inside, the weights after."""
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        copy_weights(self._parameters, self.average)
        try:
            yield
        finally:
            copy_weights(self._parameters, weights)


@torch.no_grad()
def copy_weights(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite parameters in place."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
