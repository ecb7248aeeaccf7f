"""Where drafts come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.options import EngineOptions
from anabranch.serving.runner import ModelRunner
from anabranch.serving.sequence import Segment, Sequence
from anabranch.serving.speculation.proposal import Proposal


@dataclass(frozen=True)
class DraftingContext:
    """What a proposer is made of."""

    options: EngineOptions
    target: ModelRunner
    cache: KVCacheManager
    """The target's."""
    draft: ModelRunner | None
    """A smaller model with the target's vocabulary, if the options name one."""
    clock: Callable[[], float]


class Proposer(ABC):
    """Drafts what may follow sequences. A plug-in.

    It may keep what it likes for a sequence until :meth:`forget`. It must not change sequences.
    """

    name: str

    @classmethod
    @abstractmethod
    def of(cls, context: DraftingContext) -> Proposer:
        """Make one for an engine. Raises :class:`ConfigurationError` if it cannot work there."""

    free = True
    """Whether proposing costs next to nothing, so that it is done before lengths are decided."""

    own_lengths = False
    """Whether it decides itself how much to draft; then no controller does."""

    @abstractmethod
    def propose(
        self, sequences: SequenceOf[Sequence], lengths: SequenceOf[int]
    ) -> list[Proposal | None]:
        """At most so many tokens for each; None where nothing comes to mind."""

    def begin(self, segments: SequenceOf[Segment]) -> None:
        """The target computes these now: who drafts at the same time begins here."""

    def finish(self) -> dict[Sequence, Proposal]:
        """The target is done. Chains that begin with what it computed and are longer by now.

        The first node without a row is verified, too: by the row of the node before it.
        """
        return {}

    def forget(self, sequence: Sequence) -> None:
        """A sequence has finished."""

    def close(self) -> None:
        """The engine has stopped: end threads."""

    def seconds(self, sequences: int, context: int, length: int) -> float:
        """Predicted time of drafting so many tokens for sequences with so much context in all."""
        return 0.0
