"""Pairs of a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from anabranch.training.conversation import LISTS, PAIRS, opening, turn, turns
from anabranch.training.errors import DataError
from anabranch.training.task import Message, Rendered, Row, Task
from anabranch.training.tasks.chat import ends_with_answer


class Preference(Task):
    """A chosen and a rejected answer to one question, for DPO and its relatives.

    Answers are texts, turns, or whole conversations (then the row needs no question).
    """

    name: ClassVar[str] = "preference"
    schema = (
        *(
            (column, "chosen", "rejected")
            for column in (*LISTS, *dict.fromkeys(p[0] for p in PAIRS))
        ),
        ("chosen", "rejected"),
    )
    texts = 2

    def render(self, row: Row) -> tuple[Rendered, ...]:
        """The conversation with the chosen answer, then with the rejected one."""
        shape = self.shape_of(row)
        question = opening(row, shape[0]) if len(shape) == 3 else ()
        pair = tuple(
            Rendered(ends_with_answer((*question, *_answer(row[column], column))))
            for column in ("chosen", "rejected")
        )
        if pair[0].prompt != pair[1].prompt:
            raise DataError("the chosen and the rejected answer belong to different conversations")
        if pair[0].answer == pair[1].answer:
            raise DataError("the chosen and the rejected answer are the same")
        return pair


def _answer(value: Any, column: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": value.strip()},)
    if isinstance(value, Mapping):
        return (turn(value, column),)
    return turns(value, column)
