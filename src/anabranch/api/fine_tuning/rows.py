"""Training rows in JSON Lines, read line by line and refused with every line's defect.

A row is ``{"messages": [{"role", "content", "weight"?}, ...]}`` whose last message is the
assistant's, or ``{"prompt", "completion"}``. Blank lines and a byte order mark are skipped; line
numbers are the file's own, from 1. Nothing else is tolerated: a key that would be ignored here is
a mistake of whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from anabranch.api.body import parse
from anabranch.errors import InvalidRequest, did_you_mean
from anabranch.training.conversation import ROLES
from anabranch.training.errors import DataError
from anabranch.training.task import Row
from anabranch.training.tasks.chat import Chat

NAMED = 20
"""How many bad lines an error names."""

MAX_LINE_BYTES = 8 * 1024 * 1024

ROLES_TAKEN = ("system", "developer", "user", "assistant")

_MESSAGE_KEYS = ("role", "content", "weight")
_CHAT = Chat()


class BadRow(ValueError):
    """What is wrong with one row."""


@dataclass
class Findings:
    """What reading a file has shown. ``bad`` holds the first :data:`NAMED` bad lines."""

    rows: int = 0
    num_bad: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)

    def note(self, line: int, defect: str) -> None:
        """Count a bad line."""
        self.num_bad += 1
        if self.num_bad <= NAMED:
            self.bad.append((line, defect))

    def message(self) -> str:
        """All of it in one text, or nothing if the file is good."""
        if not self.num_bad:
            return "" if self.rows else "the file is empty: it has no row to train on"
        named = "; ".join(f"line {line}: {defect}" for line, defect in self.bad)
        rest = f"; and {self.num_bad - NAMED} more" if self.num_bad > NAMED else ""
        count = "1 line is" if self.num_bad == 1 else f"{self.num_bad} lines are"
        return f"{count} not valid: {named}{rest}"


def check_file(path: Path) -> None:
    """Raise :class:`InvalidRequest` unless every line is a row, and there is one."""
    findings = Findings()
    with path.open("rb") as file:
        for line, raw in lines(file):
            try:
                row_of(raw)
                findings.rows += 1
            except BadRow as defect:
                findings.note(line, str(defect))
    if message := findings.message():
        raise InvalidRequest("file", message)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line number and row; the file has been checked. Raises :class:`BadRow` if it has not."""
    with path.open("rb") as file:
        for line, raw in lines(file):
            yield line, row_of(raw)


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; one beyond the limit comes one byte over it."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        rest = raw
        while not rest.endswith(b"\n") and len(rest) > MAX_LINE_BYTES:
            rest = file.readline(MAX_LINE_BYTES + 1)
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield number, raw


def row_of(raw: bytes) -> Row:
    """A row that :class:`~anabranch.training.tasks.chat.Chat` can render."""
    if len(raw) > MAX_LINE_BYTES:
        raise BadRow(f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        row = parse(raw)
    except InvalidRequest as error:
        # Inside one line only the column says anything.
        text = str(error).removeprefix("body: ").replace("(line 1, column", "(column")
        raise BadRow(text) from None
    if not isinstance(row, dict):
        raise BadRow('is not a JSON object such as {"messages": [...]}')
    if "messages" in row:
        _refuse_unknown(row, ("messages",), "")
        _check_messages(row["messages"])
    elif "prompt" in row or "completion" in row:
        _refuse_unknown(row, ("prompt", "completion"), "")
        for key in ("prompt", "completion"):
            _check_text(row.get(key), f"'{key}'")
    else:
        _refuse_unknown(row, ("messages", "prompt", "completion"), "")
        raise BadRow("has no 'messages' (nor 'prompt' and 'completion')")
    try:
        _CHAT.render(row)
    except DataError as error:  # whatever the checks above do not name
        raise BadRow(str(error)) from None
    return row


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list):
        raise BadRow("'messages' is not a list")
    if not messages:
        raise BadRow("'messages' is empty")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRow(f"{where} is not an object such as {{role, content}}")
        _refuse_unknown(message, _MESSAGE_KEYS, where + ".")
        role = message.get("role")
        if role not in ROLES_TAKEN:
            shown = "has no role" if role is None else f"has the unknown role {role!r:.50}"
            raise BadRow(f"{where} {shown}; known: {', '.join(ROLES_TAKEN)}")
        _check_text(message.get("content"), f"{where}.content")
        _check_weight(message, where)
    if messages[-1]["role"] != "assistant":
        raise BadRow(
            f"the last message is by {messages[-1]['role']!r}; it must be the assistant's, "
            f"which is learned"
        )
    answers = [m for m in messages if m["role"] == "assistant"]
    if all(m.get("weight") == 0 for m in answers):
        raise BadRow("every assistant message has weight 0: there is nothing to learn")


def _check_weight(message: Mapping[str, Any], where: str) -> None:
    weight = message.get("weight")
    if weight is None:
        return
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f"{where}.weight is {weight!r:.50}; it must be 0 or 1")
    if message["role"] != "assistant":
        raise BadRow(f"{where}.weight: only the assistant's messages have one")


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        shown = "missing" if value is None else f"not text but {type(value).__name__}"
        raise BadRow(f"{where} is {shown}")


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known)
            raise BadRow(f"unknown key '{where}{key[:50]}'{hint}; known here: {', '.join(known)}")


assert set(ROLES_TAKEN) <= set(ROLES)
