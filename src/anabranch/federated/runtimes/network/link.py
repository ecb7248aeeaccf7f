"""A site's connection to its coordinator, which it opens itself and opens again when it breaks."""

from __future__ import annotations

import json
import logging
import random
import ssl
import time
from collections.abc import Mapping
from typing import Any

import httpx

from anabranch.federated.messages import Reply, Task
from anabranch.federated.runtimes.network.certificate import pinned
from anabranch.federated.runtimes.network.errors import (
    CoordinatorGone,
    NameTaken,
    NotAllowed,
    NotKnown,
    Refused,
)
from anabranch.federated.runtimes.network.invitation import require_safe
from anabranch.federated.runtimes.network.outgoing import BYTES, Outgoing

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
LONGEST_PAUSE_READY_S = 1.0
"""While the coordinator answers, but not yet with what was asked for."""
SLOWEST_ANSWER_S = 60.0
"""Longer than a long poll is held open."""
_BUSY = {429, 502, 503, 504}
_NOT_ALLOWED = {401: NotKnown, 403: NotAllowed, 409: NameTaken}


class Over(Exception):
    """The run is over for good; the text says why."""


class Link:
    """Asks, and asks again for ``patience`` seconds if nobody answers.

    Whatever a site asks can be asked twice: tasks and replies have numbers. Raises
    :class:`NotAllowed` if the coordinator refuses, :class:`CoordinatorGone` if it is away for
    longer, :class:`Over` when the run is over. ``max_bytes`` is the largest task that is taken.
    """

    def __init__(
        self,
        address: str,
        fingerprint: str,
        token: str,
        *,
        insecure: bool = False,
        patience: float = 600.0,
        max_bytes: int = 1 << 32,
    ) -> None:
        require_safe(address, insecure)
        self.address = address
        self._fingerprint = fingerprint
        self._token = token
        self._patience = patience
        self._max_bytes = max_bytes
        self._client: httpx.Client | None = None

    def plan(self) -> dict[str, Any]:
        """What the coordinator says will be run."""
        found: dict[str, Any] = json.loads(self._ask("GET", "/federation/plan")[1])
        return found

    def join(self, name: str, key: str, examples: int) -> str:
        """Become a member, and under which name; the token is an invitation's secret."""
        form = json.dumps({"name": name, "key": key, "examples": examples}).encode()
        return str(json.loads(self._ask("POST", "/federation/join", form)[1])["name"])

    def agreement(self) -> dict[str, Any]:
        """What both sides must have alike; waits until the run has begun."""
        while True:
            try:
                found: dict[str, Any] = json.loads(self._ask("GET", "/federation/agreement")[1])
            except CoordinatorGone as error:
                # It may wait for other sites for as long as it likes.
                if not isinstance(error.__cause__, _NotReady):
                    raise
            else:
                return found

    def next_task(self) -> Task:
        """Wait for the next task."""
        while True:
            status, data = self._ask("GET", "/federation/task")
            if status == 200:
                return Task.from_bytes(data)

    def send(self, reply: Reply) -> None:
        """Hand in a reply. Raises :class:`Refused` if it is too large or unreadable there."""
        self._ask("POST", f"/federation/tasks/{reply.task}/reply", Outgoing(reply))

    def alive(self) -> None:
        """Be heard of; whether that worked does not matter."""
        self._once("POST", "/federation/alive", b"")

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()

    def _ask(self, method: str, path: str, body: bytes | Outgoing = b"") -> tuple[int, bytes]:
        until, pause = time.monotonic() + self._patience, FIRST_PAUSE_S
        while True:
            try:
                return self._once(method, path, body)
            except (httpx.TransportError, OSError, _NotReady) as error:
                if time.monotonic() + pause > until:
                    raise CoordinatorGone(
                        f"{self.address} did not answer for {self._patience:g} s: {error}; the "
                        f"same command goes on when it does"
                    ) from error
                if isinstance(error, httpx.ConnectError):
                    self._client = None  # its certificate is looked at again, and named if wrong
                if isinstance(error, _NotReady):
                    pause = min(pause, LONGEST_PAUSE_READY_S)
                logger.info("%s: %s; trying again in %.1f s", self.address, error, pause)
                # Sites that lost a coordinator together must not all come back together.
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _once(self, method: str, path: str, body: bytes | Outgoing) -> tuple[int, bytes]:
        headers = {"authorization": f"Bearer {self._token}", "content-type": BYTES}
        if isinstance(body, Outgoing):
            headers |= body.headers
        content = body if isinstance(body, bytes) else iter(body)
        with self._connected().stream(method, path, content=content, headers=headers) as answer:
            data = bytearray()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > self._max_bytes:
                    raise Refused(f"{path} answers with over {self._max_bytes} bytes", 413)
        status = answer.status_code
        if status in (200, 204):
            return status, bytes(data)
        text = _text(data)
        if status == 410:
            if "finished" in text:
                raise Over(text["finished"])
            return status, bytes(data)  # nobody waits for this reply any more
        message = text.get("error", {}).get("message") or f"{path}: status {status}"
        if status in _BUSY:
            raise _NotReady(message)
        if status in _NOT_ALLOWED:
            raise _NOT_ALLOWED[status](message)
        raise Refused(message, status)

    def _connected(self) -> httpx.Client:
        if self._client is None:
            verify: ssl.SSLContext | bool = True
            if self._fingerprint:
                verify = pinned(self.address, self._fingerprint)
            self._client = httpx.Client(
                base_url=self.address,
                verify=verify,
                timeout=httpx.Timeout(SLOWEST_ANSWER_S, connect=10.0),
                trust_env=False,
            )
        return self._client


class _NotReady(Exception):
    """The coordinator is there, but not yet, or no longer."""


def _text(data: bytes | bytearray) -> Mapping[str, Any]:
    try:
        found = json.loads(bytes(data))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
