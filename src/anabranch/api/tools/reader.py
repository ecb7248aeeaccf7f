"""Reads calls from an answer while it is generated.

Text is passed on as it comes, except for what may turn out to be the beginning of a call. Of a
call the name comes first, then the arguments piece by piece. What looks like a call but is none
(no JSON, or no function that was offered) is passed on as text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from anabranch.models.protocol import FinishReason
from anabranch.models.tools import CALL_CLOSE, CALL_OPEN

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST_HEAD = 1000


@dataclass(frozen=True)
class TextPiece:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class CallPiece:
    """A call begins."""

    index: int
    name: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}", compare=False)


@dataclass(frozen=True)
class ArgumentsPiece:
    """More of a call's arguments, which are JSON text."""

    index: int
    text: str


Piece = TextPiece | CallPiece | ArgumentsPiece


class CallReader:
    """The reader of one choice. The pieces do not depend on how the text was cut.

    ``forced`` names a function if the answer begins with its arguments.
    """

    def __init__(self, names: Collection[str], forced: str | None = None) -> None:
        self._names = names
        self._buffer = ""
        self._gap = ""  # white space before a call, which is no text of the answer
        self._calls = 0
        self._scan = _ObjectScan()
        self._pieces: list[Piece] = []
        self._step = self._text
        if forced is not None:
            self._begin(forced)

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after more text."""
        self._buffer += text
        while self._step():
            pass
        return self._take()

    def end(self) -> list[Piece]:
        """What was held back, now that the answer is over."""
        rest, self._buffer = self._buffer, ""
        if self._step == self._head:
            self._whole(rest, closed=False)
        elif self._step == self._text and not (self._calls and rest.isspace()):
            self._say(rest)
        return self._take()

    def finish_reason(self, reason: FinishReason) -> str:
        """The choice's finish reason: an answer that ends with its calls has its own."""
        finished = self._calls > 0 and self._step != self._arguments
        return "tool_calls" if reason == "stop" and finished else reason

    # Each step consumes from the buffer and returns whether the next one can go on.

    def _text(self) -> bool:
        before, opened, after = self._buffer.partition(CALL_OPEN)
        if opened:
            text = before.rstrip()
            self._say(text)
            self._gap = before[len(text) :]
            self._buffer, self._step = after, self._head
            return True
        held = next(n for n in range(len(CALL_OPEN) - 1, -1, -1) if before.endswith(CALL_OPEN[:n]))
        sure = len(before[: len(before) - held].rstrip())
        self._say(before[:sure])
        self._buffer = before[sure:]
        return False

    def _head(self) -> bool:
        match = _HEAD.match(self._buffer[:_LONGEST_HEAD])
        if match and match[1] in self._names:
            self._buffer = self._buffer[match.end() :]
            self._begin(match[1])
            return True
        inside, closed, after = self._buffer.partition(CALL_CLOSE)
        if not closed:
            return False
        self._buffer, self._step = after, self._text
        self._whole(inside, closed=True)
        return True

    def _arguments(self) -> bool:
        end = self._scan.end(self._buffer)
        self._argue(self._buffer[:end])
        if end is None:
            self._buffer = ""
            return False
        self._buffer, self._step = self._buffer[end:], self._tail
        return True

    def _tail(self) -> bool:
        # Keys behind the arguments mean nothing in this convention.
        _, closed, after = self._buffer.partition(CALL_CLOSE)
        if closed:
            self._buffer, self._step = after, self._text
        return bool(closed)

    def _begin(self, name: str) -> None:
        self._pieces.append(CallPiece(self._calls, name))
        self._calls += 1
        self._scan = _ObjectScan()
        self._step = self._arguments

    def _whole(self, inside: str, closed: bool) -> None:
        """A call whose name does not come first, or no call."""
        call = _decoded(inside)
        if call is None or call[0] not in self._names:
            self._say(f"{self._gap}{CALL_OPEN}{inside}{CALL_CLOSE if closed else ''}")
            return
        self._begin(call[0])
        self._argue(json.dumps(call[1], ensure_ascii=False))
        self._step = self._text

    def _argue(self, text: str) -> None:
        if text:
            self._pieces.append(ArgumentsPiece(self._calls - 1, text))

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(TextPiece(text))

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def whole(reader: CallReader, text: str) -> tuple[str | None, list[dict[str, Any]]]:
    """The content and the calls of a finished answer, in OpenAI's shape.

    The content is None if there is nothing but calls.
    """
    content = ""
    calls: list[dict[str, Any]] = []
    for piece in reader.feed(text) + reader.end():
        match piece:
            case TextPiece(more):
                content += more
            case CallPiece(_, name, id):
                function = {"name": name, "arguments": ""}
                calls.append({"id": id, "type": "function", "function": function})
            case ArgumentsPiece(index, more):
                calls[index]["function"]["arguments"] += more
    return (None if calls and not content else content), calls


class _ObjectScan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def end(self, text: str) -> int | None:
        """The position after the object's last brace, or None if it goes on."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


def _decoded(inside: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call in any order of keys; arguments may be JSON in a string."""
    try:
        call = json.loads(inside)
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        name = call.get("name")
    except (ValueError, AttributeError, RecursionError):
        return None
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
