"""Who decides how much is drafted: the interface, and the two that need no estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar, NamedTuple, Self

from anabranch.errors import ConfigurationError
from anabranch.planning import CostModel

DraftCost = Callable[[int, int, int], float]
"""``(batch, context, k)`` -> seconds of drafting k tokens for each of ``batch`` sequences that
have ``context`` tokens in all."""


class Load(NamedTuple):
    """What the coming step computes beside drafts."""

    prefill_tokens: int
    """Tokens of prompts."""
    contexts: Sequence[int]
    """Length of each decoding sequence, in tokens."""
    free_slots: int | None = None
    """Tokens for which the cache has room; None for no limit."""


class SpeculationController(ABC):
    """Says how many tokens each decoding sequence drafts or verifies, step by step.

    The classes of sequences, any hashable values, are kinds of drafts that are accepted about
    equally often, for example (adapter, drafter). A step is ``lengths``, then ``observe`` for each
    sequence with drafts, then ``record``.
    """

    name: ClassVar[str]
    longest: int
    """The most tokens that it ever asks for."""

    @classmethod
    @abstractmethod
    def of(cls, cost_model: CostModel, draft_cost: DraftCost | None, k_max: int) -> Self:
        """One for an engine; ``draft_cost`` None means that drafts are looked up at no cost."""

    @abstractmethod
    def lengths(
        self, classes: Sequence[Hashable], load: Load, available: Sequence[int] | None = None
    ) -> list[int]:
        """Tokens to draft for each sequence; 0 for none.

        ``available`` are the lengths of drafts that are there already, of which the answer says
        how much to verify. None decides before drafting.
        """

    def worth_proposing(self, classes: Sequence[Hashable], load: Load) -> bool:
        """Whether to look for drafts that cost nothing before asking for ``lengths``."""
        return True

    def observe(self, of: Hashable, accepted: int, rejected: bool) -> None:
        """Of one sequence: drafted tokens that were accepted, and whether one was refused."""

    def record(self, seconds: float) -> None:
        """How long the step took for which ``lengths`` decided: drafting, target, verification."""

    def release(self, request: Hashable) -> None:
        """No drafts of this request (:class:`RequestClass`) will come any more."""


class FixedLength(SpeculationController):
    """Always drafts ``k`` tokens, whatever the load."""

    name = "fixed"

    def __init__(self, k: int) -> None:
        if k < 0:
            raise ConfigurationError(f"k is {k}; 0 is the least")
        self.longest = k

    @classmethod
    def of(cls, cost_model: CostModel, draft_cost: DraftCost | None, k_max: int) -> FixedLength:
        """Always the most."""
        return cls(k_max)

    def lengths(
        self, classes: Sequence[Hashable], load: Load, available: Sequence[int] | None = None
    ) -> list[int]:
        """``k``, or what is there."""
        if available is None:
            return [self.longest] * len(classes)
        return [min(self.longest, there) for there in available]

    def worth_proposing(self, classes: Sequence[Hashable], load: Load) -> bool:
        """Unless nothing is to be drafted."""
        return self.longest > 0


class NoSpeculation(SpeculationController):
    """Never drafts: the baseline."""

    name = "none"
    longest = 0

    @classmethod
    def of(cls, cost_model: CostModel, draft_cost: DraftCost | None, k_max: int) -> NoSpeculation:
        """Needs nothing."""
        return cls()

    def lengths(
        self, classes: Sequence[Hashable], load: Load, available: Sequence[int] | None = None
    ) -> list[int]:
        """Zeros."""
        return [0] * len(classes)

    def worth_proposing(self, classes: Sequence[Hashable], load: Load) -> bool:
        """Never."""
        return False
