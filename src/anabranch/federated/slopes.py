"""Gradients from two losses: how a loss changes along a direction (Spall 1992; MeZO, Malladi et al.
2023, algorithm 1). Needs no backward pass, and the memory of inference beside the seeded model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from anabranch.errors import ConfigurationError
from anabranch.federated.client import ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.seeded_model import SeededModel
from anabranch.training.objective import Objective
from anabranch.training.sampler import Sampler, shuffled


@dataclass(frozen=True)
class Slope:
    """``value`` is ``(loss(w + eps z) - loss(w - eps z)) / (2 eps)``, ``loss`` their mean.

    Either is NaN if a loss was.
    """

    value: float
    loss: float


class Slopes:
    """The batches of one task, and slopes on them; dropout is off.

    ``steps`` is how many the task asks for. Without data it is 0.
    """

    def __init__(self, ctx: ClientContext, local: LocalTraining, eps: float) -> None:
        self.objective = local.objective
        self.eps = eps
        self.items: Sequence[Any] = self.objective.prepare(ctx.data).items if len(ctx.data) else []
        self.steps = 0
        if self.items:
            options = local.for_task(ctx.work, ctx.seed)
            self.sampler = Sampler(shuffled(len(self.items), options.seed), options.batch)
            self.steps = options.total_steps(self.sampler.steps_per_epoch)

    def next_batch(self) -> list[Any]:
        """Items of the next step."""
        return [self.items[index] for index in self.sampler.next_batch()]

    def along(self, replica: SeededModel, model: nn.Module, seed: int, batch: list[Any]) -> Slope:
        """The slope at the replica's present values. ``model`` is lent by the replica meanwhile."""
        model.eval()
        replica.shift(model, seed, self.eps)
        above = loss_of(model, self.objective, batch)
        replica.shift(model, seed, -self.eps)
        below = loss_of(model, self.objective, batch)
        return Slope((above - below) / (2 * self.eps), (above + below) / 2)


@torch.no_grad()
def loss_of(model: nn.Module, objective: Objective[Any, Any], items: Sequence[Any]) -> float:
    """The loss of one step's items."""
    denominators = objective.denominators(items)
    parts = [objective.loss(model, batch, denominators).loss for batch in objective.plan(items)]
    return math.fsum(float(part) for part in parts)


def require_plain(local: LocalTraining, method: str) -> None:
    """Refuse options that a sum of directions cannot express."""
    if local.options.weight_decay:
        raise ConfigurationError(
            f"{method} cannot decay weights: its model is the base plus directions; set "
            f"weight_decay to 0, not {local.options.weight_decay}"
        )
