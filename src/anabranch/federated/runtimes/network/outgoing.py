"""A message on its way out: the bytes of :mod:`anabranch.federated.messages`, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from anabranch.federated.messages import Reply, Task

BYTES = "application/octet-stream"
PIECE = 1 << 20
"""Bytes that are sent at a time."""


class Outgoing:
    """May be iterated again, should the first time be cut off. The body is never copied whole."""

    def __init__(self, message: Task | Reply) -> None:
        self._head = replace(message, body=b"").to_bytes()
        self._body = memoryview(message.body)
        self.headers = {"content-length": str(len(self._head) + len(self._body))}

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        for start in range(0, len(self._body), PIECE):
            yield bytes(self._body[start : start + PIECE])
