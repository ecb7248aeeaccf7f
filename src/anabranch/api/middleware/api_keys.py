"""Bearer tokens, when the server has a list of them."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from anabranch.api.errors import error_response

OPEN_PATHS = {"/", "/health", "/metrics"}
CONSOLE = "/console"
"""The path below which the web page lies, which asks for keys in its own way."""

OWNER = "anabranch.owner"
"""Where a request's scope has the digest of its key: what a client makes belongs to its key."""


class KeyRing:
    """The keys that a server accepts, as digests. Empty (false): it needs none."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str) -> str | None:
        """The digest under which a key's files and jobs are kept; None for one that is not ours."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        # Digests of equal length, all of them compared: the time taken tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if any(matches) else None


class ApiKeys:
    """Answers 401 unless the request carries one of ``keys``; without keys it lets all pass.

    Behind it the scope has the key's SHA-256 digest under :data:`OWNER`.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = KeyRing(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or answer 401."""
        if scope["type"] != "http" or not self._keys or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        owner = self._keys.owner(token.strip()) if scheme.lower() == "bearer" else None
        if owner is not None:
            await self._app({**scope, OWNER: owner}, receive, send)
            return
        if scheme:
            message = "the API key in the authorization header is not one of this server's"
        else:
            message = "this server needs an API key: send the header 'authorization: Bearer KEY'"
        headers = {"www-authenticate": 'Bearer realm="anabranch"'}
        response = error_response(401, message, code="invalid_api_key", headers=headers)
        await response(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path == CONSOLE or path.startswith(f"{CONSOLE}/")
