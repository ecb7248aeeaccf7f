"""What a domain recipe writes: how a row becomes text, and how an answer is read and judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from anabranch.errors import did_you_mean
from anabranch.training.errors import DataError

Row = Mapping[str, Any]
"""One row of a data set: column -> value, after the recipe's column map."""

Shape = tuple[str, ...]
"""Columns that a row must have to be understood, for example ``("prompt", "answer")``."""

Message = dict[str, str]
"""``{"role": "user", "content": "..."}``."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One text to learn: a conversation, or plain text.

    The loss counts the assistant turns of ``messages`` except those whose index is in
    ``untrained``, or all of ``text``. Exactly one is given.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    untrained: frozenset[int] = frozenset()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What is known when the last answer is asked for; empty for plain text."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last turn, or the whole text."""
        return self.messages[-1]["content"] if self.messages else self.text

    @property
    def question(self) -> str:
        """The turns before the answer as one text, or the whole text."""
        return "\n".join(m["content"] for m in self.prompt) if self.messages else self.text


class Task(ABC):
    """Turns rows into text to learn, and answers into figures. Options are constructor arguments.

    Found by ``name`` (``anabranch list tasks``). A task that only differs in what its rows look
    like overrides :meth:`render`; one whose answers can be right or wrong also overrides
    :meth:`reference` and :meth:`parse`.
    """

    name: ClassVar[str]
    schema: ClassVar[Sequence[Shape]]
    """The row shapes that are understood, in order of preference."""
    texts: ClassVar[int] = 1
    """Texts of an item whose loss is computed together; 2 for the chosen and the rejected."""

    @abstractmethod
    def render(self, row: Row) -> tuple[Rendered, ...]:
        """The ``texts`` texts of a row. Raises :class:`DataError` without naming the row."""

    def reference(self, row: Row) -> Any:
        """What a parsed answer is compared with; None if the row's answers cannot be judged."""
        return None

    def content(self, row: Row) -> str:
        """The row's own words, without what rendering adds; in them duplicates are sought.

        Texts with one long instruction in common would otherwise all look alike.
        """
        columns = (*self.shape_of(row), "input", "system")
        return "\n".join(text for column in columns for text in _texts(row.get(column)))

    def parse(self, text: str) -> Any:
        """The prediction in a generated answer; None if there is none. Never raises."""
        return text.strip()

    def correct(self, prediction: Any, reference: Any) -> bool:
        """Whether a prediction counts as right."""
        return bool(prediction == reference)

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Figures of a test, higher is better; without predictions there are none."""
        if not predictions:
            return {}
        right = sum(map(self.correct, predictions, references))
        return {"accuracy": right / len(predictions)}

    def shape_of(self, row: Row) -> Shape:
        """The shape of a row; :class:`DataError` lists its columns and what is accepted."""
        for shape in self.schema:
            if all(column in row for column in shape):
                return shape
        accepted = "; ".join(" + ".join(shape) for shape in self.schema)
        wanted = self.schema[0]
        known = {column for shape in self.schema for column in shape}
        hints = "".join(did_you_mean(str(column), known) for column in row if column not in known)
        example = ", ".join(f"{column}: <your column>" for column in wanted)
        raise DataError(
            f"task {self.name!r} cannot read a row with the columns "
            f"{', '.join(map(str, row)) or '(none)'}{hints}; it accepts {accepted}; "
            f"if yours have other names, write map: {{{example}}}"
        )


def _texts(value: Any) -> Iterator[str]:
    """All texts and numbers inside a value, in order."""
    if isinstance(value, Mapping):
        for child in value.values():
            yield from _texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child)
    elif value is not None:
        yield str(value)
