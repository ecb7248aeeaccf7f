"""Refuses large bodies before they are read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anabranch.api.errors import BodyTooLarge, error_response


class BodyLimit:
    """413 above ``max_bytes``: at once if the length is announced, else when it is passed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass and count its bytes, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            message = self._message(f"has {announced[:20]} bytes")
            response = error_response(BodyTooLarge.status, message, code=BodyTooLarge.code)
            await response(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise BodyTooLarge(self._message(f"has {received} bytes so far"))
            return message

        await self._app(scope, limited, send)

    def _message(self, size: str) -> str:
        return f"the request's body {size}; this server accepts at most {self._max_bytes}"
