"""The column layouts in which data sets store conversations, and how each becomes messages.

One table, so that a new layout is one line, and tasks share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anabranch.training.errors import DataError
from anabranch.training.task import Message, Row, Shape

LISTS = ("messages", "conversations")
"""Columns that hold a list of turns."""

PAIRS: tuple[Shape, ...] = (
    ("instruction", "output"),
    ("prompt", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "answer"),
    ("input", "output"),
)
"""Question and answer. ``instruction`` may come with an ``input`` (Alpaca), which is appended, and
any of them with a ``system`` turn."""

CONVERSATIONS: tuple[Shape, ...] = (*((column,) for column in LISTS), *PAIRS)

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Role names in use -> the role of chat templates."""


def conversation(row: Row, shape: Shape) -> tuple[Message, ...]:
    """The messages of a row. Raises :class:`DataError` naming the column or turn."""
    if shape[0] in LISTS:
        return opening(row, shape[0])
    answer = text_of(row, shape[1])
    return (*opening(row, shape[0]), {"role": "assistant", "content": answer})


def opening(row: Row, column: str) -> tuple[Message, ...]:
    """The turns in one column: a list of them, or one question with its system turn and input."""
    if column in LISTS:
        return turns(row[column], column)
    question = text_of(row, column)
    if column == "instruction" and row.get("input"):
        question = f"{question}\n\n{text_of(row, 'input')}"
    system: tuple[Message, ...] = ()
    if row.get("system"):
        system = ({"role": "system", "content": text_of(row, "system")},)
    return (*system, {"role": "user", "content": question})


def turns(value: Any, column: str) -> tuple[Message, ...]:
    """A list of ``{role, content}`` or ``{from, value}`` as messages."""
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r} must be a list of turns, not {type(value).__name__}")
    return tuple(turn(entry, f"{column}[{index}]") for index, entry in enumerate(value))


def turn(value: Any, where: str) -> Message:
    """One turn as a message."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object such as {{role, content}}, not {value!r:.80}")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where} needs text in 'content', not {type(content).__name__}")
    return {"role": ROLES[str(role)], "content": content}


def text_of(row: Row, column: str) -> str:
    """A column as text; numbers are written out, anything else is refused."""
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"column {column!r} must be text, not {type(value).__name__}")
    return str(value).strip()
