"""What the trainer optimises, apart from how.

The trainer knows steps, precision, checkpoints and progress; an :class:`Objective` knows its items.
A language model's objective packs token sequences (:mod:`anabranch.training.language`), a graph
model's draws edges. The trainer's step is the same for all::

    micro_batches = objective.plan(items)
    denominators = objective.denominators(items)        # over the whole step, summed over ranks
    denominators += objective.first_pass(model, each)   # if objective.two_pass
    for micro_batch in micro_batches:
        output = objective.loss(model, micro_batch, denominators)
        output.loss.backward()

so that a loss is a sum over the step's items divided by counts of the whole step, and does not
depend on how the step was cut into micro-batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Item = TypeVar("Item")
MicroBatch = TypeVar("MicroBatch")


@dataclass(frozen=True)
class LossOutput:
    """``loss`` is a scalar with a gradient: this micro-batch's part of the step's loss.

    ``sums`` are numerators and counts to be added over the micro-batches of a step, plain floats
    under any names; :meth:`Objective.metrics` turns their totals into what is logged.
    """

    loss: Tensor
    sums: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared(Generic[Item]):
    """Items that can be trained on, and how many rows were left out or cut, by reason."""

    items: Sequence[Item]
    dropped: Mapping[str, int] = field(default_factory=dict)


class Objective(ABC, Generic[Item, MicroBatch]):
    """Turns items into micro-batches and micro-batches into a loss."""

    def prepare(self, items: Sequence[Item]) -> Prepared[Item]:
        """Refuse or leave out items that cannot be trained on; called once, before training.

        Raises :class:`DataError` naming the rows, unless the objective was given a policy.
        """
        return Prepared(items)

    def check(self, model: nn.Module) -> None:
        """Raise :class:`TrainingError` if this model cannot be trained; called before training."""

    def settings(self) -> dict[str, Any]:
        """What identifies the objective, as JSON values; a run is only resumed with the same."""
        return {"objective": type(self).__name__}

    def fingerprint(self, items: Sequence[Item]) -> str:
        """What identifies the items; a run is only resumed on the same ones."""
        return f"{len(items)} items"

    @abstractmethod
    def plan(self, items: Sequence[Item]) -> list[MicroBatch]:
        """Cut the items of one step into micro-batches that fit in memory."""

    @abstractmethod
    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        """Counts over all items of a step, for example label tokens. Summed over ranks."""

    @abstractmethod
    def loss(
        self, model: nn.Module, micro_batch: MicroBatch, denominators: Mapping[str, float]
    ) -> LossOutput:
        """This micro-batch's share of the loss; the shares of a step add up to its loss."""

    two_pass: bool = False
    """Whether :meth:`first_pass` runs before a step's losses."""

    def first_pass(self, model: nn.Module, micro_batch: MicroBatch) -> Mapping[str, float]:
        """What the loss must know of the whole step before any part of it; without gradient.

        Summed over the micro-batches and ranks, and handed to :meth:`loss` with the denominators.
        The pass sees the same dropout as the one with gradient if the generator is set back.
        """
        return {}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Figures to log from the totals of a step's (or an evaluation's) ``sums``."""
        return dict(sums)

    batchable: bool = False
    """Whether :meth:`loss` may be mapped over models by ``torch.func.vmap``: a step is one
    micro-batch, a tensor, and the loss draws nothing, looks at no values and has no ``sums``."""

    unit: str = "tokens"
    """What :meth:`tokens` counts, as progress shows it."""

    def tokens(self, items: Sequence[Item]) -> int:
        """Size of the items, for throughput: tokens, or whatever the objective counts."""
        return len(items)

    def state_dict(self) -> dict[str, Any]:
        """State to checkpoint, JSON or tensors, for example of loss weights that move."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
