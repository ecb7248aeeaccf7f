"""Drafts copied from the context: prompt lookup decoding (Saxena 2023).

Where the newest tokens occurred before, what followed them is likely to follow again: in summaries,
edits of code, extraction, and answers that quote. The text that a client predicts is searched, too.
The more tokens agree, the more of a draft is accepted: they are its likeness.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from anabranch.serving.sequence import Sequence
from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.proposer import DraftingContext, Proposer

LONGEST = 4
SHORTEST = 2
"""Tokens that must agree. One alone is right too seldom to be worth a row."""


@dataclass
class _Index:
    """Where each n-gram of a sequence was last followed by something."""

    tokens: list[int] = field(default_factory=list)
    """The predicted text, then the sequence as far as it is indexed."""
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    taken: int = 0
    """Tokens of the sequence that are indexed."""

    def add(self, tokens: SequenceOf[int]) -> None:
        """Index further tokens. The newest n-gram has nothing behind it, so it comes later."""
        for token in tokens:
            end = len(self.tokens)
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self.ends[tuple(self.tokens[end - size : end])] = end
            self.tokens.append(token)

    def find(self, length: int) -> Proposal | None:
        """What followed the longest n-gram that the tokens end with, as it last occurred."""
        for size in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            end = self.ends.get(tuple(self.tokens[-size:]))
            if end is not None:
                return Proposal(self._continue(end, length), likeness=size)
        return None

    def _continue(self, end: int, length: int) -> tuple[int, ...]:
        found = self.tokens[end : end + length]
        while len(found) < length:  # it runs into the present: what repeats goes on repeating
            found += found[: length - len(found)]
        return tuple(found)


class Lookup(Proposer):
    """Copies from the sequence's own tokens. Costs a few dictionary look-ups per new token."""

    name = "lookup"

    @classmethod
    def of(cls, context: DraftingContext) -> Lookup:
        """Needs nothing."""
        return cls()

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Sequence, _Index] = WeakKeyDictionary()

    def propose(
        self, sequences: SequenceOf[Sequence], lengths: SequenceOf[int]
    ) -> list[Proposal | None]:
        """The continuation of the latest earlier occurrence."""
        drafts: list[Proposal | None] = []
        for sequence, length in zip(sequences, lengths, strict=True):
            index = self._index(sequence)
            drafts.append(index.find(length) if length > 0 else None)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        """Drop its index."""
        self._indices.pop(sequence, None)

    def _index(self, sequence: Sequence) -> _Index:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = _Index()
            index.add(sequence.request.prediction)
        index.add(sequence.tokens[index.taken :])
        index.taken = len(sequence.tokens)
        return index
