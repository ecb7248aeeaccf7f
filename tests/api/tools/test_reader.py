"""Calls read from text: the same ones however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.api.tools.reader import (
    ArgumentsPiece,
    CallPiece,
    CallReader,
    Piece,
    TextPiece,
    whole,
)

from .functions import call_text

NAMES = {"f", "weather"}


def read(text: str, forced: str | None = None) -> tuple[str | None, list[tuple[str, str]]]:
    content, calls = whole(CallReader(NAMES, forced), text)
    return content, [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


def pieces_of(parts: list[str], forced: str | None = None) -> list[Piece]:
    reader = CallReader(NAMES, forced)
    return [*(piece for part in parts for piece in reader.feed(part)), *reader.end()]


BERN = call_text("weather", {"city": "Bern"})
BERN_ARGUMENTS = '{"city": "Bern"}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        ("  \n", "  \n", []),
        ("hello ", "hello ", []),
        ("a < b <tool", "a < b <tool", []),
        (BERN, None, [("weather", BERN_ARGUMENTS)]),
        ("\n\n" + BERN + "\n", None, [("weather", BERN_ARGUMENTS)]),
        (f"Let me see.\n\n{BERN}", "Let me see.", [("weather", BERN_ARGUMENTS)]),
        (f"{BERN}\n{call_text('f', {})}", None, [("weather", BERN_ARGUMENTS), ("f", "{}")]),
        (f"{BERN}\nDone.", "\nDone.", [("weather", BERN_ARGUMENTS)]),
        # Marks, braces and escapes inside of strings are text.
        (
            call_text("f", {"a": '</tool_call>}{"\\', "b": [{}, []]}),
            None,
            [("f", json.dumps({"a": '</tool_call>}{"\\', "b": [{}, []]}))],
        ),
        # Not as the convention has it, but meant as a call.
        ('<tool_call>{"name":"f","arguments":{ }}</tool_call>', None, [("f", "{ }")]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', None, [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', None, [("f", '{"a": 1}')]),
        # No calls.
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
        ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', ..., []),
        ('<tool_call>{"name": "f", "arguments": 5}</tool_call>', ..., []),
        ('<tool_call>["f"]</tool_call>', ..., []),
        ("<tool_call>" + "[" * 5000, ..., []),
        # Cut off.
        ('<tool_call>\n{"na', ..., []),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "b', None, [("f", '{"a": "b')]),
    ],
)
def test_texts(text: str, content: Any, calls: list[tuple[str, str]]) -> None:
    assert read(text) == (text if content is ... else content, calls)


def test_a_forced_call_begins_with_its_arguments() -> None:
    assert read('{"city": "Bern"}', forced="weather") == (None, [("weather", BERN_ARGUMENTS)])
    assert read("", forced="f") == (None, [("f", "")])


@pytest.mark.parametrize(
    ("text", "reason", "wanted"),
    [
        (BERN, "stop", "tool_calls"),
        (BERN.removesuffix("\n</tool_call>"), "stop", "tool_calls"),
        (BERN, "length", "length"),
        ("text", "stop", "stop"),
        # A stop string of the client's ended it: there is nothing to be called yet.
        ('<tool_call>\n{"name": "f", "arguments": {"a": ', "stop", "stop"),
    ],
)
def test_finish_reason(text: str, reason: Any, wanted: str) -> None:
    reader = CallReader(NAMES)
    whole(reader, text)
    assert reader.finish_reason(reason) == wanted


def test_arguments_come_as_they_are_generated() -> None:
    text = 'Hm|m |<tool|_call>\n|{"name": "f",| "arguments": {"|é|": 1|}}'
    parts = text.split("|")
    reader = CallReader(NAMES)
    assert [reader.feed(part) for part in parts] == [
        [TextPiece("Hm")],
        [TextPiece("m")],
        [],
        [],
        [],
        [CallPiece(0, "f"), ArgumentsPiece(0, '{"')],
        [ArgumentsPiece(0, "é")],
        [ArgumentsPiece(0, '": 1')],
        [ArgumentsPiece(0, "}")],
    ]
    assert reader.end() == []


def test_every_call_has_its_own_id() -> None:
    calls = [p for p in pieces_of([BERN, BERN]) if isinstance(p, CallPiece)]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") for call in calls)


def merged(pieces: list[Piece]) -> list[Any]:
    """Pieces of one kind that follow each other as one."""
    result: list[Any] = []
    for piece in pieces:
        kind = (type(piece), getattr(piece, "index", None))
        text = piece.name if isinstance(piece, CallPiece) else piece.text
        if result and result[-1][0] == kind and not isinstance(piece, CallPiece):
            result[-1][1] += text
        else:
            result.append([kind, text])
    return result


fragments = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": ',
        '{"name": "g", "arguments": ',
        '{"a": "x\\"}"}',
        "{}",
        "}",
        "\n",
        " ",
        "<tool_",
        "é",
        "text",
        BERN,
    ]
)


@given(st.lists(fragments, max_size=10), st.lists(st.integers(1, 7), max_size=40), st.booleans())
def test_the_cut_does_not_matter(texts: list[str], sizes: list[int], forced: bool) -> None:
    text = "".join(texts)
    parts, rest = [], text
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    name = "f" if forced else None
    assert merged(pieces_of([*parts, rest], name)) == merged(pieces_of([text], name))


@given(st.lists(fragments, max_size=8))
def test_without_a_call_the_text_is_untouched(texts: list[str]) -> None:
    text = "".join(texts)
    content, calls = read(text)
    if not calls:
        assert content == text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.text(), values, max_size=3), min_size=1, max_size=3))
def test_calls_come_back_as_they_were_written(arguments: list[dict[str, Any]]) -> None:
    text = "\n".join(call_text("f", each) for each in arguments)
    content, calls = read(text)
    assert content is None
    assert [json.loads(written) for _, written in calls] == arguments
