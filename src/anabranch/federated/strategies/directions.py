"""Local steps along other directions than the gradient.

The methods of FedAvg-M, SCAFFOLD and their kin differ in one line of the local step, and that line
is always ``scale * gradient - weight * gradient at an earlier model + constant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.shared import freeze_statistics
from anabranch.training.errors import Diverged
from anabranch.training.hooks import Hook
from anabranch.training.options import TrainOptions
from anabranch.training.randomness import random_state, restore_random_state, separate_randomness
from anabranch.training.result import StepReport
from anabranch.training.trainer import Trainer

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Walk:
    """Where a local run led. Without data nothing moved and ``examples`` is 0.

    ``direction`` is the way from start to end by ``reach``, the sum of the learning rates of the
    steps: with plain SGD the mean of what was stepped along. ``gradient`` is the mean of the
    gradients as the loss gave them.
    """

    direction: Tensors
    gradient: Tensors
    reach: float
    examples: int


def walk(
    local: LocalTraining,
    ctx: ClientContext,
    start: Mapping[str, Tensor],
    constant: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    earlier: Mapping[str, Tensor] | None = None,
    weight: float = 0.0,
) -> Walk:
    """Train locally along ``scale * gradient - weight * gradient at earlier + constant``."""
    bend = _Bend(constant or {}, scale, earlier, weight)
    result = local.run(ctx, start, [bend])
    if not result.examples:
        nothing = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        return Walk(nothing, nothing, 0.0, 0)
    if not bend.steps:
        raise Diverged(f"{ctx.name}: none of {result.steps} local steps was finite; lower lr")
    if earlier is not None and weight:
        ctx.spend(result.steps)  # each step computed a second gradient
    return Walk(
        {name: (x - result.tensors[name]) / bend.reach for name, x in start.items()},
        {name: total / bend.steps for name, total in bend.total.items()},
        bend.reach,
        result.examples,
    )


class StepHook(Hook):
    """Computes gradients of the present step elsewhere, with the same examples and dropout."""

    def before_step(self, trainer: Trainer[Any]) -> None:
        """Remember what the step draws its dropout from."""
        freeze_statistics(trainer.model)
        self.random = random_state()

    def gradients_at(self, trainer: Trainer[Any], weights: Mapping[str, Tensor]) -> Tensors:
        """The step's gradients if the model were at ``weights``."""
        with separate_randomness():
            restore_random_state(self.random)
            return trainer.gradients_at(weights, trainer.step_items)[1]


class _Bend(StepHook):
    """Bends each step, and adds up what the mean of a run needs."""

    def __init__(
        self,
        constant: Mapping[str, Tensor],
        scale: float,
        earlier: Mapping[str, Tensor] | None,
        weight: float,
    ) -> None:
        self.constant, self.scale = constant, scale
        self.earlier, self.weight = (earlier, weight) if weight else (None, 0.0)
        self.total: Tensors = {}
        self.reach, self.steps = 0.0, 0

    def before_step(self, trainer: Trainer[Any]) -> None:
        """Only a second gradient needs the generators' states."""
        if self.earlier is not None:
            super().before_step(trainer)

    def after_gradients(self, trainer: Trainer[Any]) -> None:
        """Before clipping, which then bounds what is stepped along."""
        parameters = trainer.trainable
        self.present = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in parameters.items()
        }
        before = self.gradients_at(trainer, self.earlier) if self.earlier is not None else {}
        for name, parameter in parameters.items():
            bent = self.present[name] * self.scale
            if name in before:
                bent -= self.weight * before[name]
            if name in self.constant:
                bent += self.constant[name].to(bent.device)
            parameter.grad = bent

    def after_step(self, trainer: Trainer[Any], report: StepReport) -> None:
        """A step that was not finite leaves no trace."""
        if report.skipped:
            return
        self.steps += 1
        self.reach += report.lr
        for name, gradient in self.present.items():
            self.total[name] = self.total.get(name, 0) + gradient


def is_plain(options: TrainOptions) -> bool:
    """Whether a local run's change is the sum of its directions times rates."""
    return options.optimizer == "sgd" and not options.momentum


def require_plain(local: LocalTraining, method: str) -> None:
    """Refuse local optimisers with a memory of their own."""
    if not is_plain(local.options):
        o = local.options
        given = f"{o.optimizer} with momentum {o.momentum:g}" if o.momentum else o.optimizer
        raise ConfigurationError(
            f"{method} needs plain SGD locally (optimizer: sgd, momentum: 0), not {given}: what it "
            f"shares would not be a mean of gradients"
        )


def require_unscaled(local: LocalTraining, method: str) -> None:
    """Refuse a precision whose gradients are scaled when hooks see them."""
    if local.options.precision == "fp16":
        raise ConfigurationError(f"{method} cannot change gradients that are scaled for fp16")


def labelled(label: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Tensors under ``label/name``, so that several of a parameter fit in a payload."""
    return {f"{label}/{name}": tensor for name, tensor in tensors.items()}


def with_label(label: str, payload: Mapping[str, Any]) -> Tensors:
    """The tensors of a label by their own names."""
    found = label + "/"
    return {
        name.removeprefix(found): value
        for name, value in payload.items()
        if name.startswith(found) and isinstance(value, Tensor)
    }
