"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64

import numpy
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api import openapi
from anabranch.api.body import read
from anabranch.api.responses import EmbeddingList
from anabranch.api.routes.common import json_response, service_of
from anabranch.api.routes.completions import split
from anabranch.api.schemas import EmbeddingRequest
from anabranch.api.streaming import ClientGone, unless_disconnected
from anabranch.errors import InvalidRequest

router = APIRouter()


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingList,
    responses=openapi.errors(400, 401, 404, 413, 415, 429, 500, 503),
    openapi_extra=openapi.request_body(EmbeddingRequest),
)
async def create_embeddings(request: Request) -> Response:
    """One vector for each input, in order."""
    service = service_of(request)
    body = await read(request, EmbeddingRequest)
    model = service.model(body.model)
    try:
        embeddings = await unless_disconnected(request, model.embed(split(body.input)))
    except ClientGone:
        service.metrics.aborted.labels(model.name).inc()
        raise
    size = len(embeddings[0].vector)
    if body.dimensions is not None and body.dimensions != size:
        message = f"is {body.dimensions}; {model.name!r} has vectors of {size} numbers only"
        raise InvalidRequest("dimensions", message)
    as_text = body.encoding_format == "base64"
    tokens = sum(embedding.tokens for embedding in embeddings)
    return json_response(
        {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": _base64(embedding.vector) if as_text else embedding.vector,
                }
                for i, embedding in enumerate(embeddings)
            ],
            "model": model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _base64(vector: list[float]) -> str:
    return base64.b64encode(numpy.asarray(vector, dtype="<f4").tobytes()).decode("ascii")
