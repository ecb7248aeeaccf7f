"""The outermost middleware: request id, count, log line, and the last resort for errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anabranch.api.errors import CUT_OFF, error_response
from anabranch.api.service import Service
from anabranch.errors import Draining

logger = logging.getLogger("anabranch.api")

_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_ENDPOINTS = {
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/files",
    "/v1/fine_tuning/jobs",
    "/v1/jobs",
    "/v1/adapters",
    "/health",
    "/metrics",
    "/openapi.json",
}
_PREFIXES = {
    "/v1/models/": "/v1/models/{model}",
    "/v1/files/": "/v1/files/{file}",
    "/v1/fine_tuning/jobs/": "/v1/fine_tuning/jobs/{job}",
    "/v1/jobs/": "/v1/jobs/{job}",
    "/v1/adapters/": "/v1/adapters/{model}",
}


class RequestContext:
    """Gives each request an id (the client's own ``x-request-id`` if it is a plain word)."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; count and log it when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _ACCEPTABLE_ID.fullmatch(request_id):
            request_id = f"req_{uuid.uuid4().hex}"
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", request_id.encode("ascii"))
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        self._service.active += 1
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # Only a server that stops without waiting any longer cancels a request.
            if status:
                raise
            response = error_response(Draining.status, CUT_OFF, code=Draining.code)
            await response(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise  # too late for a status: the connection is cut, so that nobody is misled
            message = f"the server failed; its log has the reason under request id {request_id}"
            response = error_response(500, message, code="internal_error")
            await response(scope, receive, send_with_id)
        finally:
            self._service.active -= 1
            path, seconds = scope["path"], time.perf_counter() - started
            self._service.metrics.requests.labels(_endpoint(path), str(status or 499)).inc()
            logger.info("%s %r %d %.3fs %s", scope["method"], path, status, seconds, request_id)


def _endpoint(path: str) -> str:
    """A label of bounded variety: clients must not be able to invent new ones."""
    if path in _ENDPOINTS:
        return path
    for prefix, label in _PREFIXES.items():
        if path.startswith(prefix):
            return label
    return "other"
