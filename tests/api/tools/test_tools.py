"""Tools over HTTP: what the model is shown and may answer, and what the client gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anabranch.api.responses import ChatCompletion
from anabranch.api.tools.plan import plan
from anabranch.api.tools.schemas import FunctionDefinition, FunctionTool, NamedFunction
from anabranch.errors import (
    ConstraintTooComplex,
    InvalidConstraint,
    InvalidRequest,
    UnsatisfiableConstraint,
    UnsupportedConstraint,
)
from anabranch.models.constraint import OutputConstraint

from ..conftest import events, make
from ..scripted import ScriptedModel
from ..test_refusals import check
from .functions import CITY, CLOCK, WEATHER, call_text, function

BERN = call_text("weather", {"city": "Bern"})
NOW = call_text("clock", {})
FORCED = {"type": "function", "function": {"name": "weather"}}


def answer(model: ScriptedModel, **body: Any) -> Any:
    """The only choice."""
    response = make(model).chat(**{"tools": [WEATHER, CLOCK], **body})
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate(response.json(), strict=True)
    (choice,) = response.json()["choices"]
    return choice


def test_calls_are_answered_in_openais_shape() -> None:
    choice = answer(ScriptedModel(f"Let me see.\n{BERN}\n{NOW}"))
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "Let me see.")
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert [(c["type"], c["function"]) for c in message["tool_calls"]] == [
        ("function", {"name": "weather", "arguments": '{"city": "Bern"}'}),
        ("function", {"name": "clock", "arguments": "{}"}),
    ]
    assert choice["finish_reason"] == "tool_calls"


def test_text_is_answered_as_without_tools() -> None:
    with_tools = answer(ScriptedModel("no calls "))
    assert with_tools == answer(ScriptedModel("no calls "), tools=None)
    assert with_tools["message"] == {
        "role": "assistant",
        "content": "no calls ",
        "refusal": None,
    }
    assert with_tools["finish_reason"] == "stop"
    assert answer(ScriptedModel(BERN))["message"]["content"] is None


def test_what_the_model_is_shown() -> None:
    model = ScriptedModel("x")
    answer(model)
    assert model.tools == (
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Today's weather.",
                "parameters": CITY,
            },
        },
        {
            "type": "function",
            "function": {
                "name": "clock",
                "description": "",
                "parameters": {
                    "type": "object",
                    "properties": {},
                    "additionalProperties": False,
                },
            },
        },
    )
    assert model.opening == ""
    answer(model, tool_choice="none")
    assert (model.tools, model.constraint) == ((), None)


@pytest.mark.parametrize("choice", ["auto", None])
def test_auto_is_a_grammar(choice: Any) -> None:
    model = ScriptedModel("x")
    answer(model, tool_choice=choice)
    assert model.constraint is not None
    assert model.constraint.kind == "grammar"


def test_a_forced_call_is_its_arguments() -> None:
    model = ScriptedModel('{"city": "Bern"}')
    choice = answer(model, tool_choice=FORCED)
    assert model.opening == '<tool_call>\n{"name": "weather", "arguments":'
    assert model.constraint == OutputConstraint.json_schema(CITY)
    assert len(model.tools) == 2
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert choice["finish_reason"] == "tool_calls"
    # The only function there is, once, is forced as well.
    answer(model, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    assert model.opening
    answer(model, tools=[WEATHER], tool_choice="required")
    assert not model.opening


def test_a_call_that_is_cut_says_so() -> None:
    choice = answer(ScriptedModel('{"city": "Bern"}', size=4), tool_choice=FORCED, max_tokens=2)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city":'


def test_every_choice_has_its_own_calls() -> None:
    response = make(ScriptedModel(BERN)).chat(tools=[WEATHER], n=2)
    calls = [choice["message"]["tool_calls"] for choice in response.json()["choices"]]
    assert [len(each) for each in calls] == [1, 1]
    assert calls[0][0]["id"] != calls[1][0]["id"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_stream(size: int) -> None:
    body = {"tools": [WEATHER, CLOCK], "stream": True, "logprobs": True}
    text = f"Grüß\n{BERN}\n{NOW}"
    *chunks, done = events(make(ScriptedModel(text, size)).chat(**body))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert "".join(d.get("content") or "" for d in deltas) == "Grüß"
    calls = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    heads = [call for call in calls if "id" in call]
    assert [(h["index"], h["type"], h["function"]) for h in heads] == [
        (0, "function", {"name": "weather", "arguments": ""}),
        (1, "function", {"name": "clock", "arguments": ""}),
    ]
    arguments = ["", ""]
    for call in calls:
        arguments[call["index"]] += call["function"]["arguments"]
    assert arguments == ['{"city": "Bern"}', "{}"]
    if size < 4:
        assert len([c for c in calls if c["index"] == 0]) > 3
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert [r for r in reasons if r] == ["tool_calls"]
    # Every token's log-probability is told once, that of markup too.
    tokens = [
        token["token"]
        for chunk in chunks
        for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert "".join(tokens) == text


def test_a_forced_call_streams_from_its_first_token() -> None:
    model = ScriptedModel('{"city": "Bern"}', size=5)
    *chunks, _ = events(make(model).chat(tools=[WEATHER], tool_choice=FORCED, stream=True))
    calls = [d["tool_calls"][0] for c in chunks if "tool_calls" in (d := c["choices"][0]["delta"])]
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert [c["function"]["arguments"] for c in calls[1:]] == ['{"cit', 'y": "', 'Bern"', "}"]


def refusing(
    error: type[InvalidConstraint], word: str = "uniqueItems", kinds: tuple[str, ...] = ()
) -> ScriptedModel:
    """A model that refuses schemas with a word in them, and constraints of some kinds."""

    def refusal(constraint: OutputConstraint | None) -> InvalidConstraint | None:
        if constraint is None:
            return None
        if constraint.kind in kinds:
            return error("response_format", "grammars are not supported")
        for line in constraint.text.splitlines():
            if word in line:
                rule = line.partition(":")[0] if constraint.kind == "grammar" else "response_format"
                return error(rule, f"#/{word}: cannot be honoured")
        return None

    return ScriptedModel("{}", refusal=refusal)


ODD = {**CITY, "uniqueItems": True}
CHOICES = ["auto", "required", FORCED]


@pytest.mark.parametrize("error", [UnsupportedConstraint, ConstraintTooComplex])
@pytest.mark.parametrize("choice", CHOICES)
def test_what_cannot_be_enforced_is_refused_if_strict(
    error: type[InvalidConstraint], choice: Any
) -> None:
    tools = [CLOCK, function(parameters=ODD, strict=True)]
    found = check(
        make(refusing(error)).chat(tools=tools, tool_choice=choice),
        400,
        "tools[1].function.parameters",
        "parameters: #/uniqueItems: cannot be honoured",
    )
    assert found["code"] == error.code


@pytest.mark.parametrize("choice", CHOICES)
def test_and_only_its_own_arguments_are_any_object_if_not(choice: Any) -> None:
    model = refusing(UnsupportedConstraint)
    tools = [function(parameters=ODD), function("g"), function("h", ODD)]
    answer(model, tools=tools, tool_choice=choice)
    last = model.constraint
    assert last is not None
    assert len(model.tried) == (2 if choice == FORCED else 3)
    if choice == FORCED:
        assert last == OutputConstraint.json_object()
    else:
        rules = [line for line in last.text.splitlines() if "%json" in line]
        assert [json.dumps(CITY["properties"]) in rule for rule in rules] == [False, True, False]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("error", [InvalidConstraint, UnsatisfiableConstraint])
def test_what_is_no_schema_is_refused_in_any_case(
    error: type[InvalidConstraint], choice: Any
) -> None:
    model = refusing(error)
    body = {"tools": [function(parameters=ODD)], "tool_choice": choice}
    check(make(model).chat(**body), 400, "tools[0].function.parameters")
    assert len(model.tried) == 1


@pytest.mark.parametrize("error", [InvalidConstraint, UnsupportedConstraint])
def test_a_model_without_grammars_still_calls(error: type[InvalidConstraint]) -> None:
    model = refusing(error, kinds=("grammar",))
    model.text = BERN
    assert answer(model)["finish_reason"] == "tool_calls"
    assert model.constraint is None
    # But not where it would have to keep to something.
    for body in (
        {"parallel_tool_calls": False},
        {"tool_choice": "required"},
        {"tools": [function(strict=True)]},
    ):
        check(make(model).chat(**{"tools": [WEATHER], **body}), 400, "tools", "grammars")


@pytest.mark.parametrize("choice", ["auto", FORCED])
def test_parameters_that_are_nested_too_deeply(choice: Any) -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    asked = NamedFunction.model_validate(choice) if choice == FORCED else choice
    definition = FunctionDefinition(name="weather").model_copy(update={"parameters": schema})
    tool = FunctionTool(type="function", function=FunctionDefinition(name="weather"))
    deep = tool.model_copy(update={"function": definition})
    with pytest.raises(InvalidRequest, match=r"^tools.* nested too deeply"):
        plan([deep], asked, parallel=True)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": []}, "tools", "at least 1"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "tools", "at most 128"),
        ({"tools": [WEATHER, CLOCK, WEATHER]}, "tools[2].function.name", "tools[0]"),
        ({"tools": [function("a b")]}, "tools[0].function.name", "pattern"),
        ({"tools": [function("é")]}, "tools[0].function.name", "pattern"),
        ({"tools": [function("")]}, "tools[0].function.name", "pattern"),
        ({"tools": [function("a\n")]}, "tools[0].function.name", "pattern"),
        ({"tools": [function("x" * 65)]}, "tools[0].function.name", "pattern"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", ""),
        ({"tools": [function(strict="yes")]}, "tools[0].function.strict", ""),
        ({"tools": [function(stirct=True)]}, "tools[0].function.stirct", "'strict'"),
        (
            {"tools": [function(parameters={"type": "array"})]},
            "tools[0].function.parameters.type",
            '"object", since',
        ),
        (
            {"tools": [function(parameters={"type": ["object", "null"]})]},
            "tools[0].function.parameters.type",
            "object",
        ),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"tool_choice": FORCED}, "tool_choice", "tools"),
        ({"tools": [CLOCK], "tool_choice": "any"}, "tool_choice", ""),
        ({"tools": [CLOCK], "tool_choice": FORCED}, "tool_choice.function.name", "not among"),
        (
            {"tools": [function("wether")], "tool_choice": FORCED},
            "tool_choice.function.name",
            "did you mean 'wether'",
        ),
        ({"tools": [WEATHER], "ignore_eos": True}, "ignore_eos", "tools"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", ""),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"function_call": "auto"}, "function_call", "not supported"),
    ],
)
def test_bad_tools(body: dict[str, Any], param: str, words: str) -> None:
    check(make(ScriptedModel("x")).chat(**body), 400, param, words)
