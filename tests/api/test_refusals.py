"""Bad input: always a 4xx in OpenAI's shape, with the field, never a 5xx."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.api.body import parse, validate
from anabranch.api.responses import ErrorResponse
from anabranch.api.schemas import ChatCompletionRequest
from anabranch.errors import InvalidRequest
from anabranch.models.protocol import Model

from .conftest import Api, EchoModel, make

USER = {"role": "user", "content": "hi"}


def check(response: Any, status: int, param: str | None = None, *words: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = ErrorResponse.model_validate(response.json(), strict=True).error
    if param is not None:
        assert error.param == param, error
    for word in words:
        assert word in error.message, error.message
    return error.model_dump()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("max_tokens", 0),
        ("max_tokens", 2**80),
        ("max_completion_tokens", -1),
        ("n", 0),
        ("n", 129),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stop", 5),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("logprobs", 1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("functions", [{"name": "f"}]),
        ("audio", {"voice": "x", "format": "wav"}),
        ("reasoning_effort", "low"),
        ("messages", []),
        ("messages", "hi"),
        ("messages", None),
        ("model", 5),
        ("logit_bias", [1]),
        ("modalities", ["text", "audio"]),
    ],
)
def test_chat_field(api: Api, field: str, value: Any) -> None:
    error = check(api.chat(**{field: value}), 400)
    assert error["param"].split(".")[0].split("[")[0] == field
    assert error["message"].startswith(error["param"])
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "critic", "content": "x"}, "messages[1].role"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": "x", "weight": 1}, "messages[1].weight"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[1].content[0].type",
        ),
        ({"role": "user", "content": "x", "tool_calls": None}, "messages[1].tool_calls"),
        ("hi", "messages[1]"),
    ],
)
def test_message(api: Api, message: Any, param: str) -> None:
    check(api.chat(messages=[USER, message]), 400, param)


@pytest.mark.parametrize("key", ["x", "-1", "1.5", "01", "", "99999999999", "\u0661"])
def test_logit_bias_key(api: Api, key: str) -> None:
    check(api.chat(logit_bias={key: 1}), 400, f"logit_bias.{key}" if key else None)


def test_logit_bias_value(api: Api) -> None:
    check(api.chat(logit_bias={"5": 101}), 400, "logit_bias.5")
    check(api.chat(logit_bias={"500": 1}), 400, "logit_bias", "vocabulary of 500")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", ""]),
        ("prompt", ["a", 1]),
        ("prompt", [-1]),
        ("prompt", [1.5]),
        ("prompt", [2**31]),
        ("prompt", None),
        ("prompt", {"a": 1}),
        ("prompt", ["x"] * 257),
        ("logprobs", True),
        ("logprobs", 21),
        ("best_of", 3),
        ("suffix", "x"),
        ("echo", 1),
    ],
)
def test_completion_field(api: Api, field: str, value: Any) -> None:
    error = check(api.complete(**{field: value}), 400)
    assert error["param"].split("[")[0] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", ""),
        ("input", []),
        ("input", [[]]),
        ("input", [1, "a"]),
        ("input", None),
        ("encoding_format", "hex"),
        ("dimensions", 5),
        ("dimensions", 0),
    ],
)
def test_embedding_field(api: Api, field: str, value: Any) -> None:
    body = {"model": "echo", "input": "a", field: value}
    error = check(api.post("/v1/embeddings", body), 400)
    assert error["param"].split("[")[0] == field


def test_unknown_field_has_a_hint(api: Api) -> None:
    check(api.chat(temprature=1), 400, "temprature", "did you mean 'temperature'?")
    check(api.chat(messages=[{**USER, "contents": 1}]), 400, "messages[0].contents", "'content'")


def test_missing_field(api: Api) -> None:
    check(api.post("/v1/chat/completions", {"model": "echo"}), 400, "messages", "is required")


def test_conflicting_limits(api: Api) -> None:
    check(api.chat(max_tokens=1, max_completion_tokens=2), 400, "max_tokens")
    assert api.chat(max_tokens=2, max_completion_tokens=2).status_code == 200


def test_unknown_model(api: Api) -> None:
    error = check(api.chat(model="ecko"), 404, "model", "did you mean 'echo'?")
    assert error["code"] == "model_not_found"
    check(api.get("/v1/models/some/ecko"), 404, "model")
    assert api.get("/v1/models/echo").json()["card"]["context_length"] == 1000


def test_too_long_has_both_numbers(api: Api) -> None:
    error = check(api.chat("x " * 1001), 400, "messages", "1001", "1000")
    assert error["code"] == "context_length_exceeded"
    check(api.complete("x " * 1001, stream=True), 400, "prompt", "1001", "1000")


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue(stream: bool) -> None:
    response = make(EchoModel(capacity=0)).chat(stream=stream)
    error = check(response, 429)
    assert error["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b"\xef\xbb\xbf{}",
    b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"\\ud800": 1}',
    b'{"model": "\\udfff", "messages": [{"role": "user", "content": "x"}]}',
    b'{"temperature": NaN}',
    b'{"temperature": Infinity}',
    b'{"temperature": -Infinity}',
    b'{"temperature": 1e999}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    b'{"prediction": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    b'{"model": "\x00"',
]


@pytest.mark.parametrize("raw", BODIES, ids=lambda raw: repr(raw[:30]))
@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings"])
def test_body(api: Api, path: str, raw: bytes) -> None:
    check(api.raw(f"/v1/{path}", raw), 400)


def test_where_in_the_body(api: Api) -> None:
    check(api.raw("/v1/completions", b'{"a": 1,\n "b" 2}'), 400, "body", "line 2, column 6")
    raw = b'{"model": "echo", "messages": [{"role": "user", "content": "a\\ud800"}]}'
    check(api.raw("/v1/chat/completions", raw), 400, "messages[0].content", "surrogate")
    pair = raw.replace(b"a\\ud800", b"\\ud83d\\ude00")
    assert api.raw("/v1/chat/completions", pair).status_code == 200


def test_content_type_must_be_json(api: Api) -> None:
    raw = b'{"model": "echo", "messages": [{"role": "user", "content": "a"}]}'
    path = "/v1/chat/completions"
    check(api.post(path, content=raw, headers={"content-type": "text/plain"}), 415)
    check(api.post(path, content=raw), 415)
    headers = {"content-type": "application/json; charset=utf-8"}
    assert api.post(path, content=raw, headers=headers).status_code == 200


def test_large_body_is_refused_unread() -> None:
    api = make(max_body_bytes=1000)
    read = 0

    async def chunks() -> Any:
        nonlocal read
        for _ in range(1000):
            read += 500
            yield b" " * 500

    error = check(api.chat("x" * 2000), 413, None, "1000")
    assert error["code"] == "body_too_large"
    headers = {"content-type": "application/json"}
    response = api.post("/v1/completions", content=chunks(), headers=headers)
    check(response, 413, None, "1500", "1000")
    assert response.headers["connection"] == "close"
    assert read == 1500


def test_router_errors(api: Api) -> None:
    assert check(api.get("/v1/nothing"), 404)["code"] == "unknown_url"
    response = api.get("/v1/chat/completions")
    check(response, 405, None, "POST")
    assert response.headers["allow"] == "POST"
    check(api.post("/v1/models/"), 405)
    check(api.get("/v1/models/%ff%00"), 404)


def test_a_model_that_cannot(api: Api) -> None:
    class Mute(EchoModel):
        embed = Model.embed
        chat = Model.chat

    check(make(Mute()).chat(), 400, "model", "cannot chat")
    check(make(Mute()).post("/v1/embeddings", {"model": "echo", "input": "a"}), 400, "model")


KEYS = {"api_keys": ("secret-1", "secret-2")}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "secret-1", "Bearer s\u00e9"])
def test_api_keys_refuse(header: str | None) -> None:
    headers = {"authorization": header.encode("latin-1")} if header else {}
    for path in ("/v1/models", "/nothing", "/openapi.json"):
        response = make(**KEYS).get(path, headers=headers)
        error = check(response, 401)
        assert error["type"] == "authentication_error"
        assert response.headers["www-authenticate"].startswith("Bearer")


def test_api_keys_let_pass() -> None:
    api = make(**KEYS)
    assert api.get("/v1/models", headers={"authorization": "Bearer secret-2"}).status_code == 200
    assert api.get("/health").status_code == 200
    assert api.get("/metrics").status_code == 200


def test_draining() -> None:
    api = make()
    api.app.state.service.draining = True
    response = api.chat()
    assert check(response, 503)["code"] == "draining"
    assert response.headers["retry-after"]
    assert api.get("/health").status_code == 503
    assert api.get("/health").json() == {"status": "draining"}
    assert api.get("/metrics").status_code == 200


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.sampled_from(["user", "text", "echo", "type", "role"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5"]), children)
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(ChatCompletionRequest.model_fields)), json_values))
def test_any_json_is_a_request_or_a_refusal(value: dict[str, Any]) -> None:
    try:
        validate(parse(json.dumps(value).encode()), ChatCompletionRequest)
    except InvalidRequest as error:
        error.field.encode("utf-8")
        assert error.field
