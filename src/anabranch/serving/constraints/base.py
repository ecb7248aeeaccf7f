"""The interface between the engine and whatever knows which tokens may come next.

A back-end compiles an :class:`~anabranch.models.constraint.OutputConstraint` once for a tokenizer;
every choice of a request then walks its own state through the compiled constraint. The engine asks
a state for a mask before it draws, and tells it what was drawn. Drafted tokens are accepted one by
one to mask the rows behind them, and rolled back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints.vocabulary import Vocabulary

Whitespace = Literal["compact", "spaced", "flexible"]
"""Between the parts of a JSON answer: ``{"a":1}``, ``{"a": 1}``, or, within bounds, any."""


class ConstraintState(ABC):
    """Where one choice of a request is in its constraint."""

    @abstractmethod
    def fill_mask(self, row: np.ndarray) -> None:
        """Write the tokens that may come next to ``row [ceil(vocabulary / 32)]``, int32 bits.

        Token t is bit ``t % 32`` of word ``t // 32``; 1 is allowed. An end token is allowed
        exactly where the answer is complete. At least one token is allowed; where a limit of the
        back-end is hit instead, this raises :class:`RequestFailed`.
        """

    @abstractmethod
    def accept(self, token: int) -> bool:
        """Go on by a token. Returns False, changing nothing, if it is not allowed."""

    @abstractmethod
    def rollback(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens."""

    @abstractmethod
    def forced(self) -> list[int]:
        """Tokens that nearly certainly come next, because the text they spell is the only one.

        They are a draft: the model still decides between spellings of the same text.
        """

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the answer may end here."""


class CompiledConstraint(ABC):
    """A constraint ready for any number of answers. Safe to share between threads."""

    memory: int
    """Bytes, estimated."""

    @abstractmethod
    def start(self) -> ConstraintState:
        """The state before the first token."""


class ConstraintBackend(ABC):
    """Compiles constraints for one tokenizer. A plug-in: register subclasses by ``name``."""

    name: str

    @abstractmethod
    def __init__(self, vocabulary: Vocabulary, whitespace: Whitespace = "spaced") -> None:
        """Raises :class:`MissingExtra` if the back-end's library is not installed."""

    @abstractmethod
    def compile(self, constraint: OutputConstraint) -> CompiledConstraint:
        """Compile, which may take seconds: never on the engine's thread.

        Raises :class:`InvalidConstraint` (not a schema, pattern or grammar at all),
        :class:`UnsupportedConstraint` (with the keyword and its JSON pointer),
        :class:`UnsatisfiableConstraint` or :class:`ConstraintTooComplex`.
        """
