"""What the two generating routes share: sampling parameters and the head of an answer."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from anabranch.api.middleware.api_keys import OWNER
from anabranch.api.schemas import Generate
from anabranch.api.service import Service
from anabranch.errors import InvalidRequest
from anabranch.models.protocol import ContrastParameters, Model, SamplingParameters


def service_of(request: Request) -> Service:
    """The server's shared state."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str | None:
    """Whose files and jobs the request may see: its key's. None without keys: everybody's."""
    owner: str | None = request.scope.get(OWNER)
    return owner


def sampling_parameters(
    body: Generate, max_tokens: int | None, logprobs: int | None
) -> SamplingParameters:
    """The request's fields, with OpenAI's defaults for what is absent or null.

    A constraint is not among them: it is chosen when the model admits the request.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "is only possible with stream: true")
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "ignore_eos": body.ignore_eos,
        "n": body.n,
    }
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return SamplingParameters(
        max_tokens=max_tokens,
        seed=body.seed,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        contrast=ContrastParameters(**body.contrast.model_dump()) if body.contrast else None,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def include_usage(body: Generate) -> bool:
    """Whether a stream ends with the token counts."""
    return bool(body.stream_options and body.stream_options.include_usage)


def head(prefix: str, kind: str, model: Model) -> dict[str, Any]:
    """The fields with which every answer and chunk begins."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": f"fp_{model.card.fingerprint[:16]}",
    }


def json_response(content: dict[str, Any]) -> Response:
    """A 200; numbers that JSON does not have are a bug and raise."""
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")
