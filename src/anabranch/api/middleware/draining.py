"""Refuses new work while the server shuts down."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from anabranch.api.errors import error_response
from anabranch.api.service import Service
from anabranch.errors import Draining


class RefuseWhileDraining:
    """503 for whatever is not a read. What was let in before goes on undisturbed."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 503."""
        draining = scope["type"] == "http" and self._service.draining
        if not draining or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        message = "the server is shutting down and takes no new requests"
        # A kept-alive connection would only lead back to this server.
        headers = {"connection": "close"}
        response = error_response(Draining.status, message, code=Draining.code, headers=headers)
        await response(scope, receive, send)
