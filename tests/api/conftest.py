"""A deterministic model: it answers with the words of the last message, one token a word."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from anabranch.api import ServerOptions, bind, create_app
from anabranch.api.server import DrainingServer
from anabranch.errors import InvalidRequest, QueueFull, RequestTooLong
from anabranch.models.card import ModelCard
from anabranch.models.protocol import (
    Embedding,
    Generation,
    Message,
    Model,
    ModelStatistics,
    OutputDelta,
    SamplingParameters,
    TokenLogprob,
)
from anabranch.models.tools import Tool

CARD = ModelCard(
    name="echo",
    architecture="Echo",
    parameters=0,
    context_length=1000,
    dtype="none",
    licence="Apache-2.0",
    provenance="tests",
    fingerprint="0123456789abcdef" * 4,
    size_bytes=0,
)
CONTEXT = 1000


class EchoGeneration:
    """Each choice repeats the words; ``delay`` seconds pass before each token."""

    def __init__(
        self, model: EchoModel, words: list[str], prompt_tokens: int, sampling: SamplingParameters
    ) -> None:
        self.id = str(next(model.ids))
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = prompt_tokens // 2
        self.closed = asyncio.Event()
        self.finished = False
        self._model = model
        self._words = words
        self._sampling = sampling

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        model, sampling = self._model, self._sampling
        limit = sampling.max_tokens or len(self._words)
        words = self._words[:limit]
        model.running += 1
        try:
            for i, word in enumerate(words):
                await asyncio.sleep(model.delay)
                if self.closed.is_set():
                    return
                if model.fail_after is not None and i >= model.fail_after:
                    if model.crash:
                        raise RuntimeError("secret internals")
                    yield OutputDelta(0, finish_reason="error", error="the echo broke")
                    return
                last = i == len(words) - 1
                reason = ("length" if limit < len(self._words) else "stop") if last else None
                for choice in range(sampling.n):
                    model.generated += 1
                    yield OutputDelta(
                        choice, word, (i,), self._logprobs(word, i), finish_reason=reason
                    )
            self.finished = True
        finally:
            model.running -= 1

    async def aclose(self) -> None:
        self.closed.set()

    def _logprobs(self, word: str, i: int) -> tuple[TokenLogprob, ...]:
        if self._sampling.logprobs is None:
            return ()
        top = tuple(
            TokenLogprob(100 + k, f"alt{k}", f"alt{k}".encode(), -1.0 - k if k else -float("inf"))
            for k in range(self._sampling.logprobs)
        )
        return (TokenLogprob(i, word, word.encode(), -0.5, top),)


class EchoModel(Model):
    def __init__(
        self,
        name: str = "echo",
        *,
        delay: float = 0.0,
        fail_after: int | None = None,
        crash: bool = False,
        capacity: int | None = None,
        broken_start: Exception | None = None,
    ) -> None:
        self.name = name
        self.card = CARD
        self.delay = delay
        self.fail_after = fail_after
        self.crash = crash
        self.capacity = capacity
        self.broken_start = broken_start
        self.ids = itertools.count()
        self.generations: list[EchoGeneration] = []
        self.messages: list[Message] = []
        self.sampling: SamplingParameters | None = None
        self.running = 0
        self.generated = 0
        self.prompted = 0
        self.started = self.was_closed = False

    async def start(self) -> None:
        if self.broken_start:
            raise self.broken_start
        self.started = True

    async def close(self) -> None:
        self.was_closed = True

    def statistics(self) -> ModelStatistics:
        return ModelStatistics(
            running=self.running,
            cache_usage=0.25,
            prompt_tokens=self.prompted,
            cached_prompt_tokens=self.prompted // 2,
            generated_tokens=self.generated,
        )

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        *,
        tools: Sequence[Tool] = (),
        opening: str = "",
    ) -> Generation:
        self.messages = list(messages)
        return self._admit("messages", messages[-1]["content"], sampling)

    async def complete(
        self, prompt: str | Sequence[int], sampling: SamplingParameters
    ) -> Generation:
        text = prompt if isinstance(prompt, str) else " ".join(f"<{token}>" for token in prompt)
        return self._admit("prompt", text, sampling)

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> list[Embedding]:
        await asyncio.sleep(self.delay)
        return [Embedding([0.6, -0.8, 0.0], len(text)) for text in texts]

    def _admit(self, field: str, text: str, sampling: SamplingParameters) -> EchoGeneration:
        self.sampling = sampling
        words = [w + " " for w in text.split()] or ["... "]
        if len(words) > CONTEXT:
            raise RequestTooLong(field, f"has {len(words)} tokens; the context holds {CONTEXT}")
        if any(token >= 500 for token in sampling.logit_bias):
            raise InvalidRequest("logit_bias", "has a token id outside the vocabulary of 500")
        active = sum(not g.finished and not g.closed.is_set() for g in self.generations)
        if self.capacity is not None and active >= self.capacity:
            raise QueueFull(f"{active} requests are waiting; the limit is {self.capacity}")
        generation = EchoGeneration(self, words, len(words), sampling)
        self.prompted += len(words)
        self.generations.append(generation)
        return generation


class Api:
    """An in-process client: ``post`` and ``get`` without sockets."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self.request("POST", path, **options)

    def raw(self, path: str, content: bytes) -> httpx.Response:
        return self.post(path, content=content, headers={"content-type": "application/json"})

    def chat(self, text: str = "one two three", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": "echo", "messages": messages, **fields})

    def complete(self, prompt: Any = "one two three", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "echo", "prompt": prompt, **fields})


def make(*models: Model, **options: Any) -> Api:
    return Api(create_app(models or (EchoModel(),), ServerOptions(**options)))


def events(response: httpx.Response) -> list[Any]:
    """The data of each server-sent event; comments are left out."""
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    return [x if (x := line[6:]) == "[DONE]" else json.loads(x) for line in lines]


class LiveServer:
    """A real server in a thread, on a free loopback port."""

    def __init__(self, *models: Model, drain_timeout: float = 5.0, **options: Any) -> None:
        self.app = app = create_app(models, ServerOptions(**options))
        self._listener = bind("127.0.0.1", 0)
        self._listening = threading.Event()
        self.url = ""
        self.server = DrainingServer(app, drain_timeout, self._on_listening)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.signal()
        self.signal()
        self.join()

    def signal(self) -> None:
        self.server.handle_exit(15, None)

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self.server.run(sockets=[self._listener])

    def _on_listening(self, url: str) -> None:
        self.url = url
        self._listening.set()


@pytest.fixture
def api() -> Api:
    return make()


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with LiveServer(EchoModel()) as server:
        yield server
