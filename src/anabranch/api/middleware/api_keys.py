"""Bearer tokens, when the server has a list of them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from anabranch.api.errors import error_response

OPEN_PATHS = {"/health", "/metrics"}

OWNER = "anabranch.owner"
"""Where a request's scope has the digest of its key: what a client makes belongs to its key."""


class ApiKeys:
    """Answers 401 unless the request carries one of ``keys``; without keys it lets all pass.

    Behind it the scope has the key's SHA-256 digest under :data:`OWNER`.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 401."""
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._knows(token.strip()):
            await self._app({**scope, OWNER: _digest(token.strip()).hex()}, receive, send)
            return
        if scheme:
            message = "the API key in the authorization header is not one of this server's"
        else:
            message = "this server needs an API key: send the header 'authorization: Bearer KEY'"
        headers = {"www-authenticate": 'Bearer realm="anabranch"'}
        response = error_response(401, message, code="invalid_api_key", headers=headers)
        await response(scope, receive, send)

    def _knows(self, token: str) -> bool:
        # Digests of equal length, all of them compared: the time taken tells nothing.
        digest = _digest(token)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("latin-1")).digest()
