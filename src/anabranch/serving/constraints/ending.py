"""Where an answer may end: the part of a state that is the same for every back-end.

Matchers know text. End tokens are none: they are allowed exactly where the text is complete,
accepted at most once, and rolled back like any other token. Special tokens and rows of the head
that name no token are never allowed, whatever a matcher thinks of them.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from anabranch.errors import RequestFailed
from anabranch.serving.constraints.base import ConstraintState
from anabranch.serving.constraints.vocabulary import Vocabulary


class EndingState(ConstraintState):
    """Adds the end to a matcher of text. Back-ends implement the four methods below."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._accepted = 0
        self._ended = False

    def fill_mask(self, row: np.ndarray) -> None:
        """Write the tokens that may come next; after the end, only the end again.

        Raises :class:`RequestFailed` if no token can come next, which is a limit of the back-end
        that was passed at this place, or a defect in it.
        """
        if self._ended:
            row[:] = self._vocabulary.end_mask
            return
        self._fill_text(row)
        row &= self._vocabulary.text_mask
        if self._text_complete:
            row |= self._vocabulary.end_mask
        if not row.any():
            raise RequestFailed(f"after {self._accepted} tokens no token keeps the constraint")

    def accept(self, token: int) -> bool:
        """Go on by a token. Returns False, changing nothing, if it is not allowed."""
        if self._ended or not 0 <= token < len(self._vocabulary):
            return False
        if token in self._vocabulary.end_tokens:
            self._ended = self._text_complete
            return self._ended
        # An empty token would be accepted anywhere and change nothing.
        if not self._vocabulary.tokens[token] or not self._accept_text(token):
            return False
        self._accepted += 1
        return True

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens."""
        if not 0 <= count <= self._accepted + self._ended:
            raise ValueError(
                f"cannot take back {count} of {self._accepted + self._ended} accepted tokens"
            )
        if count and self._ended:
            self._ended = False
            count -= 1
        if count:
            self._rollback_text(count)
            self._accepted -= count

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._ended or self._text_complete

    def forced(self) -> list[int]:
        """Tokens that nearly certainly come next, as the tokenizer cuts the text that is certain.

        The last of them is left out: together with what follows it may come out longer.
        """
        if self._ended:
            return []
        text = self._forced_bytes().decode(errors="ignore")  # the last character may be cut
        return self._vocabulary.encode(text)[:-1] if text else []

    @abstractmethod
    def _fill_text(self, row: np.ndarray) -> None:
        """Set the bits of text tokens that may come next; other bits may be anything."""

    @abstractmethod
    def _accept_text(self, token: int) -> bool: ...

    @abstractmethod
    def _rollback_text(self, count: int) -> None: ...

    @abstractmethod
    def _forced_bytes(self) -> bytes:
        """What certainly comes next; nothing within a character."""

    @property
    @abstractmethod
    def _text_complete(self) -> bool: ...
