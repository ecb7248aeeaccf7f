"""``GET /health`` and ``GET /metrics``: for whoever runs the server. No key is needed."""

from __future__ import annotations

import json

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from anabranch.api.metrics import CONTENT_TYPE
from anabranch.api.responses import Health
from anabranch.api.routes.common import service_of

router = APIRouter()


@router.get(
    "/health",
    response_model=Health,
    responses={503: {"model": Health, "description": "The server is shutting down."}},
)
async def health(request: Request) -> Response:
    """200 while new requests are taken, 503 while the server drains."""
    draining = service_of(request).draining
    status = "draining" if draining else "ok"
    return Response(
        json.dumps({"status": status}), 503 if draining else 200, media_type="application/json"
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    body = service_of(request).metrics.render()
    return Response(body, headers={"content-type": CONTENT_TYPE})
