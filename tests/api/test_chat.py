from __future__ import annotations

import pytest

from anabranch.api.responses import ChatCompletion

from .conftest import Api, EchoModel, events, make


def test_answer(api: Api) -> None:
    response = api.chat()
    assert response.status_code == 200, response.text
    answer = ChatCompletion.model_validate(response.json(), strict=True)
    assert answer.choices[0].message.content == "one two three "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.system_fingerprint == "fp_0123456789abcdef"
    assert answer.usage.model_dump() == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert response.headers["x-request-id"].startswith("req_")


def test_request_id_of_the_client_is_kept_if_it_is_a_word(api: Api) -> None:
    path = "/v1/models"
    assert api.get(path, headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    assert api.get(path, headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_parts_roles_and_names_reach_the_model() -> None:
    model = EchoModel()
    make(model).post(
        "/v1/chat/completions",
        {
            "model": "echo",
            "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "assistant", "content": "hi", "refusal": None, "annotations": []},
                {
                    "role": "user",
                    "name": "ann",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
            ],
        },
    )
    assert model.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "ab", "name": "ann"},
    ]


def test_every_sampling_field_reaches_the_model() -> None:
    model = EchoModel()
    response = make(model).chat(
        max_completion_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        seed=-(2**63),
        stop="x",
        stop_token_ids=[7],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        logit_bias={"5": -100, "0": 1.5},
        n=2,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
    )
    assert response.status_code == 200, response.text
    s = model.sampling
    assert s is not None
    assert (s.max_tokens, s.temperature, s.top_p, s.top_k, s.min_p) == (2, 0, 0.5, 3, 0.1)
    assert (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) == (1.1, 0.2, 0.3)
    assert (s.seed, s.stop, s.stop_token_ids, s.ignore_eos) == (-(2**63), ("x",), (7,), True)
    assert (s.logprobs, s.logit_bias, s.n) == (2, {5: -100, 0: 1.5}, 2)
    assert [c["finish_reason"] for c in response.json()["choices"]] == ["length", "length"]


def test_logprobs(api: Api) -> None:
    content = api.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["one ", "two ", "three "]
    assert content[0]["bytes"] == list(b"one ")
    assert content[0]["logprob"] == -0.5
    # Minus infinity is not JSON.
    assert [t["logprob"] for t in content[0]["top_logprobs"]] == [-9999.0, -2.0]
    assert (
        api.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    )
    assert api.chat().json()["choices"][0]["logprobs"] is None


def test_stream(api: Api) -> None:
    response = api.chat("grüß\u2028 dich", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in response.headers
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == "grüß dich "
    assert [c["choices"][0]["finish_reason"] for c in chunks[-2:]] == [None, "stop"]
    assert "usage" not in chunks[0]


def test_stream_with_usage_logprobs_and_two_choices(api: Api) -> None:
    *chunks, _ = events(
        api.chat(stream=True, n=2, logprobs=True, stream_options={"include_usage": True})
    )
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    order = [c["choices"][0]["index"] for c in chunks[2:-1] if c["choices"][0]["delta"]]
    assert order == [0, 1] * 3
    assert chunks[2]["choices"][0]["logprobs"]["content"][0]["token"] == "one "


def test_error_in_mid_stream_is_an_event_and_ends_the_stream() -> None:
    found = events(make(EchoModel(fail_after=1)).chat(stream=True))
    assert found[-1]["error"]["message"] == "the echo broke"
    assert found[-1]["error"]["code"] == "request_failed"


def test_crash_in_mid_stream_leaks_nothing() -> None:
    response = make(EchoModel(fail_after=1, crash=True)).chat(stream=True)
    assert events(response)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text


@pytest.mark.parametrize(("crash", "code"), [(False, "request_failed"), (True, "internal_error")])
def test_failure_without_stream_is_a_500(crash: bool, code: str) -> None:
    response = make(EchoModel(fail_after=1, crash=crash)).chat()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text
    if crash:
        assert response.headers["x-request-id"] in response.json()["error"]["message"]


def test_silent_stream_is_kept_alive() -> None:
    response = make(EchoModel(delay=0.1), ping_seconds=0.03).chat("a b", stream=True)
    assert response.text.count(": ping\n\n") >= 2
    assert events(response)[-1] == "[DONE]"
