"""Tools by the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from ..conftest import LiveServer
from ..scripted import ScriptedModel
from ..test_openai_client import USER, client_of
from .functions import CLOCK, WEATHER, call_text, function

TEXT = f"Hm.\n{call_text('weather', {'city': 'Zürich 🙂'})}\n{call_text('clock', {})}"


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel(TEXT, size=1)


@pytest.fixture(scope="module")
def client(model: ScriptedModel) -> Iterator[openai.OpenAI]:
    with LiveServer(model) as live:
        yield client_of(live)


OPTIONS: dict[str, Any] = {"model": "echo", "messages": USER, "tools": [WEATHER, CLOCK]}
MADE = [("weather", {"city": "Zürich 🙂"}), ("clock", {})]


def made(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_whole(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**OPTIONS).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Hm."
    assert made(choice.message.tool_calls) == MADE


def test_streamed_calls_are_assembled(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**OPTIONS) as stream:
        kinds = [event.type for event in stream]
        (choice,) = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Hm."
    assert made(choice.message.tool_calls) == MADE
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") > 10


def test_a_conversation_goes_on_with_the_results(
    client: openai.OpenAI, model: ScriptedModel
) -> None:
    message = client.chat.completions.create(**OPTIONS).choices[0].message
    assert message.tool_calls is not None
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in message.tool_calls
    ]
    for turn in (message, message.model_dump()):
        client.chat.completions.create(**{**OPTIONS, "messages": [*USER, turn, *results]})
        assert model.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Zürich 🙂"}
        assert [m["role"] for m in model.messages[2:]] == ["tool", "tool"]


class Weather(pydantic.BaseModel):
    city: str


def test_arguments_are_parsed_into_a_class(client: openai.OpenAI, model: ScriptedModel) -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")
    options = {**OPTIONS, "tools": [tool, function("clock", strict=True)]}
    answer = client.chat.completions.parse(**options)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == Weather(city="Zürich 🙂")
    # The parsed message can be sent back as it is.
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fine"} for call in calls]
    turns = [*USER, answer.choices[0].message, *results]
    client.chat.completions.parse(**{**options, "messages": turns})


def test_refusals_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    forced = {"type": "function", "function": {"name": "wether"}}
    with pytest.raises(openai.BadRequestError, match="did you mean 'weather'") as refused:
        client.chat.completions.create(**OPTIONS, tool_choice=forced)
    assert refused.value.param == "tool_choice.function.name"
