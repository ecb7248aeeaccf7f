"""Tools and schemas on the engine: what becomes part of the prompt, and what a real model says."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pydantic
import pytest

from anabranch.errors import InvalidRequest, RequestTooLong
from anabranch.models.protocol import SamplingParameters
from anabranch.models.tools import describe
from anabranch.serving import EngineModel
from tests import tiny

from ..conftest import CARD, LiveServer
from ..fake_trainer import TEMPLATE
from ..test_openai_client import client_of
from .functions import CLOCK, WEATHER

USER = {"role": "user", "content": "Weather in Bern?"}


@pytest.fixture(scope="module")
def random_model() -> EngineModel:
    tokenizer = copy.deepcopy(tiny.byte_tokenizer())
    tokenizer.chat_template = TEMPLATE
    engine = tiny.engine(200, tokenizer=tokenizer)
    return EngineModel("base", replace(CARD, name="base"), tokenizer, engine)


def prompt_tokens(model: EngineModel, *messages: Any, **options: Any) -> int:
    async def ask() -> int:
        await model.start()
        try:
            generation = await model.chat(messages, SamplingParameters(max_tokens=1), **options)
            return generation.prompt_tokens
        finally:
            await model.close()

    return asyncio.run(ask())


def test_tools_and_the_opening_belong_to_the_prompt(random_model: EngineModel) -> None:
    plain = prompt_tokens(random_model, USER)
    assert prompt_tokens(random_model, USER, opening="<tool_call>é") == plain + 13
    tools = [WEATHER]
    described = len(f"<system>{describe(tools)}</system>".encode())
    assert prompt_tokens(random_model, USER, tools=tools) == plain + described


def test_tools_that_do_not_fit(random_model: EngineModel) -> None:
    long = {**WEATHER["function"], "description": "x" * 100_000}
    with pytest.raises(RequestTooLong):
        prompt_tokens(random_model, USER, tools=[{"type": "function", "function": long}])


def test_tools_that_the_template_cannot_write(random_model: EngineModel) -> None:
    with pytest.raises(InvalidRequest, match="the chat template refuses them"):
        prompt_tokens(random_model, USER, tools=[{"type": "function", "function": object()}])


class Answer(pydantic.BaseModel):
    country: str
    capital: str
    population: int


class Weather(pydantic.BaseModel):
    city: str


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with LiveServer(EngineModel.load()) as live:
        yield client_of(live)


OPTIONS: dict[str, Any] = {"model": "smollm2", "temperature": 0, "max_tokens": 100}


@pytest.mark.slow
def test_the_real_model_keeps_to_a_schema(client: openai.OpenAI) -> None:
    question = "Give country, capital and population of France as JSON."
    options = {**OPTIONS, "messages": [{"role": "user", "content": question}]}
    answer = client.chat.completions.parse(**options, response_format=Answer)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.parsed is not None
    assert "Paris" in choice.message.parsed.capital
    with client.chat.completions.stream(**options, response_format=Answer) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == choice.message.content
    pattern = {"type": "regex", "pattern": r"The capital of France is (Bern|Paris|Rome)\."}
    constrained = client.chat.completions.create(**options, extra_body={"constraint": pattern})
    assert constrained.choices[0].message.content == "The capital of France is Paris."
    cut = client.chat.completions.create(
        **{**options, "max_tokens": 5}, response_format={"type": "json_object"}
    ).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.content is not None
    assert cut.message.content.startswith("{")


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["named", "required"])
def test_the_real_model_calls_when_it_must(client: openai.OpenAI, choice: str) -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")
    named = {"type": "function", "function": {"name": "weather"}}
    options = {
        **OPTIONS,
        "messages": [{"role": "user", "content": "What is the weather like in Bern?"}],
        "tools": [tool, CLOCK],
        "tool_choice": named if choice == "named" else choice,
        "parallel_tool_calls": False,
    }
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls or []
    assert call.function.name == "weather"
    assert "Bern" in Weather.model_validate_json(call.function.arguments).city
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    # The conversation goes on with the result.
    result = {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"sky": "rain"})}
    messages = [*options["messages"], answer.message, result]
    options = {**options, "messages": messages, "tool_choice": "none"}
    after = client.chat.completions.create(**options).choices[0].message
    assert after.tool_calls is None
    assert after.content


@pytest.mark.slow
def test_the_real_model_may_answer_with_text(client: openai.OpenAI) -> None:
    options = {**OPTIONS, "messages": [USER], "tools": [WEATHER], "max_tokens": 20}
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.message.content
    assert "<tool_call>" not in choice.message.content


@pytest.mark.slow
def test_what_cannot_be_honoured_is_named(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="#/properties/a/not") as refused:
        client.chat.completions.create(**OPTIONS, messages=[USER], response_format=wanted)
    assert refused.value.code == "unsupported_constraint"
    assert refused.value.param == "response_format.json_schema.schema"
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="#/properties/a/not") as refused:
        client.chat.completions.create(**OPTIONS, messages=[USER], tools=[WEATHER, strict])
    assert refused.value.param == "tools[1].function.parameters"
