"""The conversation that a client sends: its turns, and which results answer which calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from anabranch.api.fields import Content, Strict, Text, Unsupported, joined
from anabranch.api.tools.schemas import Call
from anabranch.errors import InvalidRequest, did_you_mean
from anabranch.models.protocol import Message

SpeakerName = Annotated[
    str | None, Field(description="Given to the chat template, if it reads names.")
]


class SystemMessage(Strict):
    """Instructions."""

    role: Literal["system", "developer"] = Field(description="developer is treated as system.")
    content: Content
    name: SpeakerName = None


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: SpeakerName = None


class AssistantMessage(Strict):
    """An earlier answer. Its fields may be sent back as they came."""

    role: Literal["assistant"]
    content: Content | None = Field(None, description="May be null if there are tool_calls.")
    name: SpeakerName = None
    tool_calls: Annotated[list[Call], Field(min_length=1)] | None = None
    parsed: Any = Field(None, description="Accepted; what OpenAI's client made of the content.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="Accepted when empty."
    )
    refusal: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None


class ToolMessage(Strict):
    """The result of a call of the assistant's last turn."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def conversation(messages: Sequence[ChatMessage]) -> list[Message]:
    """The turns as a model takes them.

    Raises :class:`InvalidRequest` if an assistant's turn says nothing, or if its calls and the
    results behind it are not one to one.
    """
    turns: list[Message] = []
    waiting: dict[str, str] = {}  # id -> function, of calls whose result has not come yet
    called = 0  # the turn they are from
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, ToolMessage):
            turns.append(_result(message, waiting, where))
            continue
        _require_results(waiting, called)
        if isinstance(message, AssistantMessage):
            turns.append(_answer(message, where))
            waiting, called = _names(message, where), i
        else:
            turns.append(_turn(message.role, message.content, message.name))
    _require_results(waiting, called)
    return turns


def _turn(role: str, content: Any, name: str | None) -> dict[str, Any]:
    role = "system" if role == "developer" else role
    turn = {"role": role, "content": "" if content is None else joined(content)}
    return turn if name is None else {**turn, "name": name}


def _answer(message: AssistantMessage, where: str) -> Message:
    if message.content is None and message.tool_calls is None:
        raise InvalidRequest(f"{where}.content", "is required where there are no tool_calls")
    turn = _turn(message.role, message.content, message.name)
    if message.tool_calls is None:
        return turn
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": _arguments(call.function.arguments),
            },
        }
        for call in message.tool_calls
    ]
    return {**turn, "tool_calls": calls}


def _result(message: ToolMessage, waiting: dict[str, str], where: str) -> Message:
    name = waiting.pop(message.tool_call_id, None)
    if name is None:
        raise InvalidRequest(
            f"{where}.tool_call_id",
            f"{message.tool_call_id[:80]!r} is not among the unanswered calls of the assistant's "
            f"turn before it{did_you_mean(message.tool_call_id, waiting)}",
        )
    turn = _turn(message.role, message.content, name)
    return {**turn, "tool_call_id": message.tool_call_id}


def _names(message: AssistantMessage, where: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for j, call in enumerate(message.tool_calls or []):
        if call.id in names:
            raise InvalidRequest(f"{where}.tool_calls[{j}].id", f"{call.id[:80]!r} is there twice")
        names[call.id] = call.function.name
    return names


def _require_results(waiting: dict[str, str], called: int) -> None:
    if waiting:
        ids = ", ".join(repr(call[:80]) for call in waiting)
        raise InvalidRequest(
            f"messages[{called}].tool_calls",
            f"the result of {ids} is missing: each call needs a message of role 'tool' right "
            "behind the turn",
        )


def _arguments(text: str) -> Any:
    """The object that templates want, or the text itself if the model wrote none."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text
