"""Earlier calls and their results in a conversation."""

from __future__ import annotations

from typing import Any

import pytest

from ..conftest import make
from ..scripted import ScriptedModel
from ..test_refusals import check

USER = {"role": "user", "content": "hi"}


def call(id: str, name: str = "f", arguments: str = "{}") -> dict[str, Any]:  # noqa: A002
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(made), **more}


def result(id: str, content: Any = "ok") -> dict[str, Any]:  # noqa: A002
    return {"role": "tool", "tool_call_id": id, "content": content}


def test_calls_and_results_reach_the_model() -> None:
    model = ScriptedModel("done")
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]
    messages = [
        USER,
        calls(call("a", "f", '{"x": [1, "é"]}'), call("b", "g", "no JSON"), refusal=None),
        result("b", parts),  # in any order
        result("a"),
        {"role": "assistant", "content": "well"},
        calls(call("a", "f", "[]"), content="again"),
        result("a"),
    ]
    response = make(model).chat(messages=messages)
    assert response.status_code == 200, response.text
    assert model.messages == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "f", "arguments": {"x": [1, "é"]}},
                },
                {
                    "id": "b",
                    "type": "function",
                    "function": {"name": "g", "arguments": "no JSON"},
                },
            ],
        },
        {"role": "tool", "content": "12", "name": "g", "tool_call_id": "b"},
        {"role": "tool", "content": "ok", "name": "f", "tool_call_id": "a"},
        {"role": "assistant", "content": "well"},
        {
            "role": "assistant",
            "content": "again",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[]"}}
            ],
        },
        {"role": "tool", "content": "ok", "name": "f", "tool_call_id": "a"},
    ]


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        ([result("a")], "messages[0].tool_call_id", "'a'"),
        ([USER, result("a"), USER], "messages[1].tool_call_id", "not among"),
        (
            [calls(call("call_1")), result("call_2")],
            "messages[1].tool_call_id",
            "did you mean 'call_1'",
        ),
        ([calls(call("a")), result("a"), result("a")], "messages[2].tool_call_id", "not among"),
        ([calls(call("a")), result("a"), USER, result("a")], "messages[3].tool_call_id", ""),
        ([USER, calls(call("a"), call("b")), result("a"), USER], "messages[1].tool_calls", "'b'"),
        ([USER, calls(call("a"), call("b"))], "messages[1].tool_calls", "'a', 'b'"),
        ([calls(call("a")), calls(call("b")), result("b")], "messages[0].tool_calls", "'a'"),
        ([calls(call("a"), call("a")), result("a")], "messages[0].tool_calls[1].id", "twice"),
        ([calls()], "messages[0].tool_calls", "at least 1"),
        ([calls({"id": "a"})], "messages[0].tool_calls[0].type", "required"),
        ([calls(call("a", ""))], "messages[0].tool_calls[0].function.name", ""),
        ([calls({**call("a"), "index": 0})], "messages[0].tool_calls[0].index", "unknown"),
        ([{"role": "assistant"}], "messages[0].content", "tool_calls"),
        ([{"role": "assistant", "content": None}], "messages[0].content", "tool_calls"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id", "required"),
        ([{**result("a"), "name": "f"}], "messages[0].name", "unknown"),
        ([result("a", None)], "messages[0].content", ""),
        ([{"role": "function", "name": "f", "content": "x"}], "messages[0].role", "'tool'"),
    ],
)
def test_bad_histories(messages: list[Any], param: str, words: str) -> None:
    check(make(ScriptedModel("x")).chat(messages=messages), 400, param, words)
