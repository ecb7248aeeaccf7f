"""``response_format`` and ``constraint``: what reaches the model, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pydantic
import pytest

from anabranch.api.guidance import schema_constraint
from anabranch.api.responses import ChatCompletion
from anabranch.errors import (
    ConstraintTooComplex,
    InvalidConstraint,
    InvalidRequest,
    UnsatisfiableConstraint,
    UnsupportedConstraint,
)
from anabranch.models.constraint import OutputConstraint

from .conftest import Api, LiveServer, make
from .scripted import ScriptedModel
from .test_openai_client import USER, client_of
from .test_refusals import check

POINT = {
    "type": "object",
    "properties": {"y": {"type": "integer"}, "x": {"type": "integer"}},
    "required": ["y", "x"],
    "additionalProperties": False,
}
POINT_FORMAT = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}

CONSTRAINTS = [
    ({"type": "regex", "pattern": "a+"}, OutputConstraint.regex("a+")),
    ({"type": "grammar", "grammar": 'start: "a"'}, OutputConstraint.grammar('start: "a"')),
    ({"type": "choice", "choices": ["a", "b"]}, OutputConstraint.choice(["a", "b"])),
    ({"type": "json_schema", "schema": POINT}, OutputConstraint.json_schema(POINT)),
    ({"type": "json_object"}, OutputConstraint.json_object()),
]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"type": "text"}, None),
        (None, None),
        ({"type": "json_object"}, OutputConstraint.json_object()),
        (POINT_FORMAT, OutputConstraint.json_schema(POINT)),
        (
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "point-2_D",
                    "description": "d",
                    "schema": POINT,
                    "strict": False,
                },
            },
            OutputConstraint.json_schema(POINT),
        ),
    ],
)
def test_response_format(given: Any, wanted: OutputConstraint | None) -> None:
    model = ScriptedModel('{"y": 1, "x": 2}')
    response = make(model).chat(response_format=given)
    assert response.status_code == 200, response.text
    answer = ChatCompletion.model_validate(response.json(), strict=True)
    assert answer.choices[0].message.content == '{"y": 1, "x": 2}'
    assert model.constraint == wanted


@pytest.mark.parametrize(("given", "wanted"), CONSTRAINTS, ids=[c[0]["type"] for c in CONSTRAINTS])
def test_constraint(given: Any, wanted: OutputConstraint) -> None:
    model = ScriptedModel("a")
    assert make(model).chat(constraint=given, response_format={"type": "text"}).status_code == 200
    assert make(model).complete(["p", "q"], constraint=given, n=2).status_code == 200
    assert make(model).complete("p").status_code == 200
    assert model.tried == [wanted, wanted, wanted, None]


def test_the_order_of_keys_is_kept() -> None:
    model = ScriptedModel("{}")
    make(model).chat(response_format=POINT_FORMAT)
    assert model.constraint is not None
    assert list(json.loads(model.constraint.text)["properties"]) == ["y", "x"]


def test_an_answer_that_is_cut_says_so() -> None:
    api = make(ScriptedModel('{"y": 1, "x": 2}', size=4))
    (choice,) = api.chat(response_format=POINT_FORMAT, max_tokens=2).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"y": 1,', "length")


def schema(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": {}} | more}


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ({"type": "json"}, "response_format.type", "'json_schema'"),
        ({"type": 5}, "response_format.type", ""),
        ({}, "response_format.type", "given"),
        ("json_object", "response_format", ""),
        ({"type": "json_object", "schema": {}}, "response_format.schema", "unknown"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        (schema(schema=None), "response_format.json_schema.schema", ""),
        (schema(schema=[]), "response_format.json_schema.schema", ""),
        (schema(name="a b"), "response_format.json_schema.name", "pattern"),
        (schema(name="x" * 65), "response_format.json_schema.name", "pattern"),
        (schema(strict="yes"), "response_format.json_schema.strict", ""),
        (schema(stict=True), "response_format.json_schema.stict", "did you mean 'strict'"),
    ],
)
def test_bad_formats(api: Api, value: Any, param: str, words: str) -> None:
    check(api.chat(response_format=value), 400, param, words)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"type": "regexp", "pattern": "a"}, "constraint.type"),
        ({"type": "regex"}, "constraint.pattern"),
        ({"type": "regex", "pattern": ""}, "constraint.pattern"),
        ({"type": "regex", "pattern": "a", "flags": "i"}, "constraint.flags"),
        ({"type": "grammar", "grammar": 5}, "constraint.grammar"),
        ({"type": "choice", "choices": []}, "constraint.choices"),
        ({"type": "choice", "choices": [""]}, "constraint.choices[0]"),
        ({"type": "json_schema", "schema": True}, "constraint.schema"),
    ],
)
def test_bad_constraints(api: Api, value: Any, param: str) -> None:
    check(api.chat(constraint=value), 400, param)
    check(api.complete(constraint=value), 400, param)


def test_a_schema_that_is_nested_too_deeply() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    with pytest.raises(InvalidRequest, match=r"^constraint\.schema: is nested too deeply"):
        schema_constraint(schema, "constraint.schema")


def test_only_one_of_them(api: Api) -> None:
    choice = {"type": "choice", "choices": ["a"]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    check(
        api.chat(constraint=choice, response_format=POINT_FORMAT),
        400,
        "constraint",
        "response_format",
    )
    check(api.chat(constraint=choice, tools=tools), 400, "constraint", "tools")
    check(api.chat(response_format=POINT_FORMAT, tools=tools), 400, "response_format", "tools")
    check(api.chat(constraint=choice, ignore_eos=True), 400, "ignore_eos", "constraint")
    check(api.complete(constraint=choice, ignore_eos=True), 400, "ignore_eos")
    # Tools that cannot be called are in nobody's way.
    body = {"response_format": POINT_FORMAT, "tools": tools, "tool_choice": "none"}
    assert api.chat(**body).status_code == 200
    check(api.complete(response_format=POINT_FORMAT), 400, "response_format", "unknown")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error",
    [InvalidConstraint, UnsupportedConstraint, UnsatisfiableConstraint, ConstraintTooComplex],
)
def test_a_models_refusal_names_the_clients_field(
    error: type[InvalidConstraint], stream: bool
) -> None:
    model = ScriptedModel(refusal=lambda constraint: error("#/properties/y", "has no 'foo'"))
    found = check(
        make(model).chat(response_format=POINT_FORMAT, stream=stream),
        400,
        "response_format.json_schema.schema",
        "schema: #/properties/y: has no 'foo'",
    )
    assert found["code"] == error.code
    other = ScriptedModel(refusal=lambda constraint: error("response_format", "is bad"))
    body = {"constraint": {"type": "regex", "pattern": "("}, "stream": stream}
    found = check(make(other).complete(["a", "b"], **body), 400, "constraint.pattern")
    assert found["message"] == "constraint.pattern: is bad"


class Point(pydantic.BaseModel):
    y: int
    x: int


def test_the_official_client_parses_a_class() -> None:
    model = ScriptedModel('{"y": 1, "x": 2}')
    with LiveServer(model) as live:
        client = client_of(live)
        options: dict[str, Any] = {"model": "echo", "messages": USER, "response_format": Point}
        answer = client.chat.completions.parse(**options)
        assert answer.choices[0].message.parsed == Point(y=1, x=2)
        with client.chat.completions.stream(**options) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == Point(y=1, x=2)
        # What was parsed can be sent back.
        turn = answer.choices[0].message
        again = client.chat.completions.parse(**{**options, "messages": [*USER, turn, *USER]})
        assert again.choices[0].message.parsed == Point(y=1, x=2)
    assert model.constraint is not None
    assert json.loads(model.constraint.text)["required"] == ["y", "x"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a b", "a b"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ("", None),
    ],
)
def test_prediction_reaches_the_model(given: Any, wanted: str | None) -> None:
    model = ScriptedModel("a")
    assert make(model).chat(prediction={"type": "content", "content": given}).status_code == 200
    assert model.sampling is not None
    assert model.sampling.prediction == wanted


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"content": "a"}, "prediction.type"),
        ({"type": "tokens", "content": "a"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": []}, "prediction.content"),
        ({"type": "content", "content": "a", "n": 1}, "prediction.n"),
        ("a", "prediction"),
    ],
)
def test_bad_predictions(api: Api, value: Any, param: str) -> None:
    check(api.chat(prediction=value), 400, param)
