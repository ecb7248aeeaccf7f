"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api import openapi
from anabranch.api.answer import Answer
from anabranch.api.body import read
from anabranch.api.chunks import ChatChunks, chat_logprobs
from anabranch.api.responses import ChatCompletion
from anabranch.api.routes.common import (
    head,
    include_usage,
    json_response,
    sampling_parameters,
    service_of,
)
from anabranch.api.schemas import ChatCompletionRequest, ChatMessage
from anabranch.api.streaming import CollectedChoice, EventStream, collect
from anabranch.errors import InvalidRequest

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
    model = service.model(body.model)
    sampling = sampling_parameters(body, _max_tokens(body), _logprobs(body))
    timer = service.metrics.timer(model.name, started)
    # Awaited before any response exists, so that a refusal still has its own status.
    messages = [_message(message) for message in body.messages]
    answer = await Answer.admit([model.chat(messages, sampling)], sampling.n, timer)
    if body.stream:
        usage = include_usage(body)
        chunks = ChatChunks(head("chatcmpl", "chat.completion.chunk", model), usage)
        return EventStream(answer, chunks, usage, service.options.ping_seconds)
    choices = await collect(request, answer)
    return json_response(
        {
            **head("chatcmpl", "chat.completion", model),
            "choices": [
                _choice(i, choice, sampling.logprobs is not None)
                for i, choice in enumerate(choices)
            ],
            "usage": answer.usage(),
        }
    )


def _choice(index: int, choice: CollectedChoice, logprobs: bool) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(choice.logprobs) if logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def _message(message: ChatMessage) -> dict[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": text}
    if message.name is not None:
        turn["name"] = message.name
    return turn


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
