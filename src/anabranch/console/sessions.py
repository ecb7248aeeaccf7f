"""Who looks at the console: a cookie in the browser, a digest of the API key on the server.

The key itself is never kept, neither in the cookie nor here. Sessions live in memory: whoever
signed in does so again after a restart.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from anabranch.api.middleware.api_keys import KeyRing

COOKIE = "anabranch_console"
MOST_SESSIONS = 10_000


@dataclass(frozen=True)
class Visitor:
    """Whose files and jobs a page may show. ``owner`` None: everybody's, the server has no keys."""

    owner: str | None = None


class Sessions:
    """Signed-in browsers. Without ``keys`` everybody is let in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = KeyRing(keys)
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()

    @property
    def needs_key(self) -> bool:
        """Whether one has to sign in."""
        return bool(self._keys)

    def sign_in(self, key: str) -> str | None:
        """A new cookie for a valid key, else None."""
        owner = self._keys.owner(key.strip())
        if owner is None:
            return None
        cookie = secrets.token_urlsafe(32)
        self._visitors[cookie] = Visitor(owner)
        while len(self._visitors) > MOST_SESSIONS:
            self._visitors.popitem(last=False)
        return cookie

    def sign_out(self, request: Request) -> None:
        """Forget the browser."""
        self._visitors.pop(request.cookies.get(COOKIE, ""), None)

    def visitor(self, request: Request) -> Visitor | None:
        """Who sent the request; None if they have to sign in first."""
        if not self.needs_key:
            return Visitor()
        return self._visitors.get(request.cookies.get(COOKIE, ""))
