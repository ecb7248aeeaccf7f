"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api import openapi
from anabranch.api.answer import Answer
from anabranch.api.body import read
from anabranch.api.chunks import CompletionChunks, LogprobColumns
from anabranch.api.guidance import admit, guidance
from anabranch.api.responses import Completion
from anabranch.api.routes.common import (
    head,
    include_usage,
    json_response,
    sampling_parameters,
    service_of,
)
from anabranch.api.schemas import CompletionRequest
from anabranch.api.streaming import CollectedChoice, EventStream, collect
from anabranch.errors import InvalidRequest
from anabranch.models.constraint import OutputConstraint
from anabranch.models.protocol import Generation

router = APIRouter()

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for completions only."""


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses={
        200: {"content": openapi.event_stream()},
        **openapi.errors(400, 401, 404, 413, 415, 429, 500, 503),
    },
    openapi_extra=openapi.request_body(CompletionRequest),
)
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts, which run side by side."""
    started = time.perf_counter()
    service = service_of(request)
    body = await read(request, CompletionRequest)
    model = service.model(body.model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of", f"is only supported when it equals n ({body.n or 1})")
    sampling = sampling_parameters(body, body.max_tokens or DEFAULT_MAX_TOKENS, body.logprobs)
    prompts = split(body.prompt)
    echoes = _echoes(body, prompts, sampling.n)
    asked = guidance(None, body.constraint, ignore_eos=bool(body.ignore_eos))
    timer = service.metrics.timer(model.name, started)

    def start(
        prompt: str | list[int], constraint: OutputConstraint | None
    ) -> Awaitable[Generation]:
        return model.complete(prompt, replace(sampling, constraint=constraint))

    starts = [admit(partial(start, prompt), asked) for prompt in prompts]
    answer = await Answer.admit(starts, sampling.n, timer)
    if body.stream:
        usage = include_usage(body)
        opening = head("cmpl", "text_completion", model)
        chunks = CompletionChunks(opening, usage, answer.choices, echoes)
        return EventStream(answer, chunks, usage, service.options.ping_seconds)
    choices = await collect(request, answer)
    return json_response(
        {
            **head("cmpl", "text_completion", model),
            "choices": [
                _choice(i, choice, echoes[i] if echoes else "", body.logprobs is not None)
                for i, choice in enumerate(choices)
            ],
            "usage": answer.usage(),
        }
    )


def split(prompt: str | list[Any]) -> list[str | list[int]]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _choice(index: int, choice: CollectedChoice, echo: str, logprobs: bool) -> dict[str, Any]:
    return {
        "index": index,
        "text": echo + choice.text,
        "logprobs": LogprobColumns().columns(choice.logprobs) if logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def _echoes(body: CompletionRequest, prompts: list[str | list[int]], n: int) -> list[str]:
    """What is put before each choice; nothing without ``echo``."""
    if not body.echo:
        return []
    if body.logprobs is not None:
        raise InvalidRequest("echo", "is not supported together with logprobs")
    echoes: list[str] = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InvalidRequest("echo", "is not supported for prompts of token ids")
        echoes.extend([prompt] * n)
    return echoes
