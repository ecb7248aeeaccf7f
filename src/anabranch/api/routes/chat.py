"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api import openapi
from anabranch.api.answer import Answer
from anabranch.api.body import read
from anabranch.api.chunks import ChatChunks, chat_logprobs
from anabranch.api.fields import joined
from anabranch.api.guidance import admit, guidance
from anabranch.api.messages import conversation
from anabranch.api.responses import ChatCompletion
from anabranch.api.routes.common import (
    head,
    include_usage,
    json_response,
    sampling_parameters,
    service_of,
)
from anabranch.api.schemas import ChatCompletionRequest
from anabranch.api.service import Service
from anabranch.api.streaming import CollectedChoice, EventStream, collect
from anabranch.api.tools.chunks import CallChunks
from anabranch.api.tools.plan import CallPlan, plan
from anabranch.api.tools.reader import CallReader, whole
from anabranch.errors import InvalidRequest
from anabranch.models.constraint import OutputConstraint
from anabranch.models.protocol import Generation, Model, SamplingParameters

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {"content": openapi.event_stream()},
        **openapi.errors(400, 401, 404, 413, 415, 429, 500, 503),
    },
    openapi_extra=openapi.request_body(ChatCompletionRequest),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, whole or streamed."""
    started = time.perf_counter()
    service = service_of(request)
    body = await read(request, ChatCompletionRequest)
    # Awaited before any response exists, so that a refusal still has its own status.
    model, calls, answer = await admit_chat(service, body, started)
    readers = [calls.reader() for _ in range(answer.choices)] if calls else []
    if body.stream:
        usage = include_usage(body)
        opening = head("chatcmpl", "chat.completion.chunk", model)
        chunks = CallChunks(opening, usage, readers) if readers else ChatChunks(opening, usage)
        return EventStream(answer, chunks, usage, service.options.ping_seconds)
    choices = await collect(request, answer)
    return json_response(
        {
            **head("chatcmpl", "chat.completion", model),
            "choices": [
                _choice(i, choice, readers[i] if readers else None, bool(body.logprobs))
                for i, choice in enumerate(choices)
            ],
            "usage": answer.usage(),
        }
    )


async def admit_chat(
    service: Service, body: ChatCompletionRequest, started: float
) -> tuple[Model, CallPlan | None, Answer]:
    """Begin to answer a request that arrived at ``started`` (perf_counter); the caller closes it.

    Raises an :class:`AnabranchError` if it is refused.
    """
    model = service.model(body.model)
    sampling = replace(
        sampling_parameters(body, _max_tokens(body), _logprobs(body)), prediction=_prediction(body)
    )
    calls = plan(body.tools, body.tool_choice, body.parallel_tool_calls is not False)
    timer = service.metrics.timer(model.name, started)
    answer = await Answer.admit([_start(model, body, sampling, calls)], sampling.n, timer)
    return model, calls, answer


def _start(
    model: Model, body: ChatCompletionRequest, sampling: SamplingParameters, calls: CallPlan | None
) -> Awaitable[Generation]:
    messages = conversation(body.messages)
    asked = guidance(
        body.response_format,
        body.constraint,
        calls.guidance if calls else None,
        ignore_eos=bool(body.ignore_eos),
    )

    def start(constraint: OutputConstraint | None) -> Awaitable[Generation]:
        guided = replace(sampling, constraint=constraint)
        if calls is None:
            return model.chat(messages, guided)
        return model.chat(messages, guided, tools=calls.tools, opening=calls.opening)

    return admit(start, asked)


def _choice(
    index: int, choice: CollectedChoice, reader: CallReader | None, logprobs: bool
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    reason: str | None = choice.finish_reason
    if reader is not None and choice.finish_reason is not None:
        message["content"], calls = whole(reader, choice.text)
        if calls:
            message["tool_calls"] = calls
        reason = reader.finish_reason(choice.finish_reason)
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(choice.logprobs) if logprobs else None,
        "finish_reason": reason,
    }


def _prediction(body: ChatCompletionRequest) -> str | None:
    return joined(body.prediction.content) or None if body.prediction else None


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest("max_tokens", f"is {old}, but max_completion_tokens is {new}")
    return old if new is None else new


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs is not None:
        raise InvalidRequest("top_logprobs", "needs logprobs: true")
    return None
