"""DNS rebinding: who may call a server without keys by which name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from anabranch.addresses import is_loopback
from anabranch.api.middleware import AllowedHosts

from .conftest import EchoModel, LiveServer

LOOPBACK = ["127.0.0.1", "127.0.0.1:80", "127.3.2.1", "localhost", "LOCALHOST:8000", "localhost.",
            "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]", "me.localhost"]  # fmt: skip
FOREIGN = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example",
           "192.168.0.7", "[2001:db8::1]", "0.0.0.0", "", ":80", "[::1", "a b", "127.0.0.1@evil",
           "notlocalhost", "\N{LATIN SMALL LETTER E WITH ACUTE}.example"]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(EchoModel()) as live:
        yield live


def reached(host: str, *, server: str = "127.0.0.1", kind: str = "http", **options: Any) -> Any:
    """The status of the middleware's own answer; None if the request got through."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        return

    async def collect(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "method": "GET", "path": "/", "server": (server, 80),
             "headers": [(b"host", host.encode("utf-8"))]}  # fmt: skip
    guard = AllowedHosts(app, options.get("allowed", ()), options.get("has_keys", False))
    asyncio.run(guard(scope, None, collect))  # type: ignore[arg-type]
    return (sent[0].get("status") or sent[0]["type"]) if sent else None


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_names_pass(host: str) -> None:
    assert reached(host) is None


@pytest.mark.parametrize("host", FOREIGN)
def test_others_are_refused_also_as_web_sockets(host: str) -> None:
    assert reached(host) == 421
    assert reached(host, server="::1") == 421
    assert reached(host, server="::ffff:127.0.0.1") == 421
    assert reached(host, kind="websocket") == "websocket.close"


def test_only_where_it_is_needed_unless_names_were_given() -> None:
    assert reached("models.example", server="192.168.0.7") is None
    assert reached("models.example", has_keys=True) is None
    allowed = {"allowed": ["Models.Example"]}
    for host in ("models.example", "models.example:8000", "localhost"):
        assert reached(host, **allowed) is None
    for options in ({"server": "192.168.0.7"}, {"has_keys": True}, {}):
        assert reached("evil.example", **allowed, **options) == 421


def test_a_server_says_what_to_do(server: LiveServer) -> None:
    assert httpx.get(f"{server.url}/v1/models").status_code == 200
    refused = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"})
    error = refused.json()["error"]
    assert refused.status_code == 421 and error["code"] == "host_not_allowed"
    assert "'evil.example'" in error["message"] and "--allowed-host" in error["message"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("::ffff:10.0.0.1", False), ("", False), ("host", False)],
)  # fmt: skip
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
