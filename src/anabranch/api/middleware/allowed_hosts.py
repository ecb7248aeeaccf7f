"""Refuses requests that a page of another site sent here by a name of its own (DNS rebinding).

A browser lets a page of ``evil.example`` talk to ``evil.example``, whatever address that name has
in the next second: also that of a server which answers this machine only. Its requests are told by
their ``Host`` header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from anabranch.addresses import is_loopback
from anabranch.api.errors import error_response

STATUS = 421
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]*)?")


class AllowedHosts:
    """Answers 421 to a ``Host`` that is neither loopback nor one of ``allowed``.

    It looks at connections to a loopback address of a server that has no API keys: what comes over
    another address needs no trick, and keys are nothing that such a page has. With ``allowed`` it
    looks at every connection. Web sockets are refused before they are accepted.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str], has_keys: bool) -> None:
        self._app = app
        self._allowed = {name.lower().rstrip(".") for name in allowed}
        self._has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass, or refuse it."""
        if scope["type"] not in ("http", "websocket") or not self._looks(scope):
            await self._app(scope, receive, send)
            return
        hosts = Headers(scope=scope).getlist("host")
        if all(map(self._is_allowed, hosts)):  # no browser leaves it out
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "host not allowed"})
        else:
            response = error_response(STATUS, _message(hosts[0]), code="host_not_allowed")
            await response(scope, receive, send)

    def _looks(self, scope: Scope) -> bool:
        if self._allowed:
            return True
        address = (scope.get("server") or ("", None))[0]
        return not self._has_keys and is_loopback(address)

    def _is_allowed(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]").lower().rstrip(".")
        # Nobody can register a name below localhost (RFC 6761, section 6.3).
        return name in self._allowed or is_loopback(name) or name.endswith(".localhost")


def _message(host: str) -> str:
    return (
        f"this server does not answer to the name {host[:100]!r}: a page of another site could "
        f"use it to reach what is meant for this machine only; use 127.0.0.1 or localhost, or "
        f"start the server with --allowed-host NAME if the name is yours"
    )
