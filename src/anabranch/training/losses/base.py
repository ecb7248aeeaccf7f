"""The interface of a loss over answer tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from anabranch.training.example import Item
from anabranch.training.hooks import Hook
from anabranch.training.objective import LossOutput


@dataclass(frozen=True)
class TokenScores:
    """The trained tokens of one micro-batch, in order of item, example, position.

    All tensors have one entry per trained token. ``reference`` is there when the loss asks for it
    (:attr:`Loss.needs_reference`): scores of the frozen base, without gradient.
    """

    nll: Tensor
    """Negative log-likelihood, float32, with gradient."""
    item: Tensor
    """Index of the token's item in the micro-batch, int64."""
    example: Tensor
    """Index of the token's example within its item, int64 (0 = chosen, 1 = rejected of a pair)."""
    items: Sequence[Item]
    """The items of this micro-batch; ``items[i][e].task`` is the task of a token's example."""
    reference: Tensor | None = None


class Loss(ABC):
    """A loss over answer tokens. Options are constructor arguments."""

    name: ClassVar[str]
    needs_reference: bool = False
    texts: ClassVar[int] = 1
    """Examples of one item: 2 for a loss over (chosen, rejected) pairs."""

    @abstractmethod
    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        """Counts over all items of a step; summed over ranks before any loss is computed."""

    @abstractmethod
    def __call__(self, scores: TokenScores, denominators: Mapping[str, float]) -> LossOutput:
        """This micro-batch's share of the step's loss, and sums to log."""

    two_pass: bool = False
    """Whether :meth:`first_pass` runs before a step's losses."""

    def first_pass(self, scores: TokenScores) -> Mapping[str, float]:
        """Sums over the whole step that the loss needs beforehand, like denominators."""
        return {}

    def hooks(self, items: Sequence[Item], validation: Sequence[Item]) -> Sequence[Hook]:
        """What the loss does around a run's steps, given the run's data; pass it to the trainer."""
        return ()

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Figures to log from the totals of the sums of a step or an evaluation."""
        return dict(sums)

    def state_dict(self) -> dict[str, Any]:
        """State to checkpoint (JSON values or tensors)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
