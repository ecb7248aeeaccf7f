"""Sharpness-aware minimisation: steps from the worst point nearby (Foret et al., ICLR 2021)."""

from __future__ import annotations

import math
from typing import Any

import torch

from anabranch.errors import ConfigurationError
from anabranch.training.hooks import Hook
from anabranch.training.randomness import random_state, restore_random_state
from anabranch.training.trainer import Trainer


class SharpnessAware(Hook):
    """Replaces a step's gradient g at y by the one at ``y + rho g / |g|``, of the same items.

    Use it where weights will be averaged, pruned or quantised: what it finds is flat. A step costs
    two gradients. The norm is one over all trained tensors; both gradients see the same dropout;
    running means (BatchNorm) come from the first. The optimiser's momentum, decay and clipping act
    on what it leaves, and so do hooks that come after it. A gradient of zero stays.
    """

    def __init__(self, rho: float = 0.05) -> None:
        if not (rho >= 0 and math.isfinite(rho)):
            raise ConfigurationError(f"rho is at least 0, not {rho}")
        self.rho = rho
        self._random: dict[str, Any] = {}

    def before_step(self, trainer: Trainer[Any]) -> None:
        """Remember what dropout is about to draw."""
        self._random = random_state()

    def after_gradients(self, trainer: Trainer[Any]) -> None:
        """Climb, take the gradient there, come back."""
        trained = {n: p for n, p in trainer.trainable.items() if p.grad is not None}
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        if not gradients:
            return
        # Scaled gradients (float16) have a scaled norm: the quotient is the same.
        norm = torch.nn.utils.get_total_norm(gradients)
        if not self.rho or not norm > 0:
            return
        worst = {n: p.detach().clone() for n, p in trainer.trainable.items()}
        for (name, _), gradient in zip(trained.items(), gradients, strict=True):
            worst[name] += gradient * (self.rho / norm)
        buffers = [(buffer, buffer.detach().clone()) for buffer in trainer.model.buffers()]
        after = random_state()
        restore_random_state(self._random)
        _, found = trainer.gradients_at(worst, trainer.step_items)
        restore_random_state(after)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
            for name, parameter in trained.items():
                parameter.grad = found[name]
