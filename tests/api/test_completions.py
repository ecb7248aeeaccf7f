from __future__ import annotations

from typing import Any

import pytest

from anabranch.api.chunks import LogprobColumns
from anabranch.api.responses import Completion
from anabranch.models.protocol import TokenLogprob

from .conftest import Api, EchoModel, events, make


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a b", ["a b "]),
        ([1, 2], ["<1> <2> "]),
        (["a", "b"], ["a ", "b "]),
        ([[1], [2, 3]], ["<1> ", "<2> <3> "]),
    ],
)
def test_prompt_forms(api: Api, prompt: Any, texts: list[str]) -> None:
    response = api.complete(prompt)
    assert response.status_code == 200, response.text
    answer = Completion.model_validate(response.json(), strict=True)
    assert [choice.text for choice in answer.choices] == texts


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(api: Api) -> None:
    choices = api.complete(["a", "b", "c"], n=2).json()["choices"]
    assert [c["index"] for c in choices] == list(range(6))
    assert [c["text"] for c in choices] == ["a ", "a ", "b ", "b ", "c ", "c "]


def test_several_prompts_stream_together() -> None:
    api = make(EchoModel(delay=0.01))
    *chunks, done = events(
        api.complete(["a b", "c d"], stream=True, n=2, stream_options={"include_usage": True})
    )
    texts = [""] * 4
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["a b ", "a b ", "c d ", "c d "]
    # The first tokens of both prompts come before the last of either: they run side by side.
    assert {c["choices"][0]["index"] for c in chunks[:4]} == {0, 1, 2, 3}
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert done == "[DONE]"


def test_default_of_16_tokens(api: Api) -> None:
    choice = api.complete("x " * 20).json()["choices"][0]
    assert choice["text"] == "x " * 16
    assert choice["finish_reason"] == "length"


def test_logprobs_have_offsets(api: Api) -> None:
    logprobs = api.complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["one ", "two ", "three "],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{t: -0.5, "alt0": -9999.0} for t in ("one ", "two ", "three ")],
        "text_offset": [0, 4, 8],
    }
    streamed = [
        offset
        for chunk in events(api.complete(logprobs=0, stream=True))[:-1]
        for offset in chunk["choices"][0]["logprobs"]["text_offset"]
    ]
    assert streamed == [0, 4, 8]


def test_offsets_count_characters_not_tokens() -> None:
    pieces = [b"a", "é".encode()[:1], "é".encode()[1:], b"b"]
    tokens = [TokenLogprob(i, "?", piece, -1.0) for i, piece in enumerate(pieces)]
    assert LogprobColumns().columns(tokens)["text_offset"] == [0, 1, 1, 2]


def test_echo(api: Api) -> None:
    assert api.complete("a b", echo=True).json()["choices"][0]["text"] == "a ba b "
    chunks = events(api.complete(["a", "b"], echo=True, stream=True))[:-1]
    assert [c["choices"][0]["text"] for c in chunks[:2]] == ["a", "b"]
    assert api.complete("a", echo=True, logprobs=0).json()["error"]["param"] == "echo"
    assert api.complete([1], echo=True).json()["error"]["param"] == "echo"


def test_one_prompt_too_many_aborts_the_others() -> None:
    model = EchoModel(capacity=2, delay=10)
    response = make(model).complete(["a", "b", "c"])
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert len(model.generations) == 2
    assert all(generation.closed.is_set() for generation in model.generations)


def test_failure_of_one_prompt_fails_the_request_and_closes_all() -> None:
    model = EchoModel(fail_after=0)
    assert make(model).complete(["a", "b"]).status_code == 500
    assert all(generation.closed.is_set() for generation in model.generations)
