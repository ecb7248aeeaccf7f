"""The official client against a real server."""

from __future__ import annotations

import openai
import pytest

from .conftest import EchoModel, LiveServer

USER = [{"role": "user", "content": "one two three"}]


def client_of(server: LiveServer, **options: object) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client(live: LiveServer) -> openai.OpenAI:
    return client_of(live)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="echo", messages=USER, n=2, logprobs=True, top_logprobs=1, seed=1, user="u"
    )
    assert [choice.message.content for choice in answer.choices] == ["one two three "] * 2
    assert answer.choices[0].logprobs.content[1].token == "two "
    assert answer.choices[0].logprobs.content[1].top_logprobs[0].token == "alt0"
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer._request_id


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    message = client.chat.completions.create(model="echo", messages=USER).choices[0].message
    for turn in (message, message.model_dump()):
        again = client.chat.completions.create(model="echo", messages=[*USER, turn, *USER])
        assert again.choices[0].message.content == "one two three "


def test_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="echo", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "one two three "
    assert chunks[-1].usage.total_tokens == 6


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="echo", messages=USER, n=2) as stream:
        final = stream.get_final_completion()
    assert [c.message.content for c in final.choices] == ["one two three "] * 2


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=["a b", "c"], logprobs=1, max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["a b ", "c "]
    assert answer.choices[0].logprobs.text_offset == [0, 2]
    stream = client.completions.create(model="echo", prompt=[1, 2], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "<1> <2> "


def test_embeddings(client: openai.OpenAI) -> None:
    # The client asks for base64 and decodes it, unless told otherwise.
    default = client.embeddings.create(model="echo", input=["a", "bc"])
    assert default.data[1].embedding == pytest.approx([0.6, -0.8, 0.0])
    assert default.usage.prompt_tokens == 3
    plain = client.embeddings.create(
        model="echo", input=[1, 2], encoding_format="float", dimensions=3
    )
    assert plain.data[0].embedding == [0.6, -0.8, 0.0]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "anabranch"


def test_errors_are_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=USER)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model="echo", messages=USER, functions=[{"name": "f"}], function_call="auto"
        )
    assert bad.value.param == "functions"
    with pytest.raises(openai.BadRequestError, match="did you mean 'top_k'"):
        client.chat.completions.create(model="echo", messages=USER, extra_body={"topk": 1})


def test_other_errors() -> None:
    with LiveServer(EchoModel(capacity=0), api_keys=("k",)) as server:
        with pytest.raises(openai.AuthenticationError):
            client_of(server).models.list()
        with pytest.raises(openai.RateLimitError):
            client_of(server, api_key="k").chat.completions.create(model="echo", messages=USER)
    with LiveServer(EchoModel(fail_after=1)) as server:
        client = client_of(server)
        with pytest.raises(openai.InternalServerError, match="the echo broke"):
            client.chat.completions.create(model="echo", messages=USER)
        with pytest.raises(openai.APIError, match="the echo broke"):
            list(client.chat.completions.create(model="echo", messages=USER, stream=True))
