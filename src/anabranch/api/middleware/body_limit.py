"""Refuses large bodies before they are read."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anabranch.api.errors import BodyTooLarge, error_response


class BodyLimit:
    """413 above ``max_bytes``: at once if the length is announced, else when it is passed.

    ``uploads`` gives paths whose bodies are read piece by piece a limit of their own; one that
    ends in a slash stands for all below it.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, uploads: Mapping[str, int] | None = None
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._uploads = uploads or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass and count its bytes, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            message = _message(f"has {announced[:20]} bytes", limit)
            response = error_response(BodyTooLarge.status, message, code=BodyTooLarge.code)
            await response(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise BodyTooLarge(_message(f"has {received} bytes so far", limit))
            return message

        await self._app(scope, limited, send)

    def _limit(self, path: str) -> int:
        for upload, max_bytes in self._uploads.items():
            if path == upload or (upload.endswith("/") and path.startswith(upload)):
                return max_bytes
        return self._max_bytes


def _message(size: str, limit: int) -> str:
    return f"the request's body {size}; this server accepts at most {limit}"
