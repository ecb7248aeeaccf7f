"""Where updates come into a node: checked once, stored once, then only keys go on.

A client on the same machine is told where to write its values, so that none of them goes through a
socket. Any other sends them, straight from the socket into the store. While the store is full a
client waits for the answer to its offer.

On the wire every frame is its length (4 bytes) and JSON::

    offer   {"token", "client", "examples", "header", "size", "local"}
    answer  {"path"} or {"send": true} or {"error"}
    then    the values are written to the path and {"written": true} is sent, or they are sent
    answer  {"done": true} or {"error"}
"""

from __future__ import annotations

import contextlib
import hmac
import json
import mmap
import secrets
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from anabranch.federated.aggregation.tree.aggregator import map_file
from anabranch.federated.aggregation.tree.store import SharedStore
from anabranch.federated.errors import FederationError, PayloadError, ReplyRefused
from anabranch.federated.runtimes.processes.segments import write_all

_LENGTH = struct.Struct("<I")
_LONGEST_FRAME = 1 << 26

Address = str | tuple[str, int]
"""The path of a Unix socket, or host and port."""


class Desk(Protocol):
    """Who decides about what comes in: a round."""

    def check(self, offer: dict[str, Any]) -> int:
        """Bytes of the values of an acceptable offer; otherwise raises."""

    def take(self, offer: dict[str, Any], key: bytes) -> None:
        """The values are in the store. Raises if they cannot be used; the key is then freed."""

    def refuse(self, offer: dict[str, Any], error: Exception) -> None:
        """Nothing will come of this offer."""


class Gateway:
    """The door of a node. ``desk()`` is the round that is under way; it raises if there is none."""

    def __init__(self, store: SharedStore, desk: Callable[[], Desk]) -> None:
        self.store = store
        self.desk = desk
        self.token = secrets.token_hex(16)
        """What a sender must know."""
        self.received = 0
        """Bytes of values that came through a socket."""
        self._servers: list[socketserver.BaseServer] = []
        self._threads: list[threading.Thread] = []

    def put(self, offer: dict[str, Any], values: memoryview) -> None:
        """Take in values that are in this process: one copy."""

        self._take_in(offer, lambda key: write_all(self.store.path(key), values))

    def listen(self) -> str:
        """Also take in what processes of this machine offer; returns the address."""
        path = str(self.store.segments.folder / "gateway")
        self._serve(socketserver.ThreadingUnixStreamServer(path, self._handler()))
        return path

    def listen_tcp(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Also take in what other nodes send; returns the address."""
        server = socketserver.ThreadingTCPServer((host, port), self._handler())
        self._serve(server)
        return server.server_address[0], server.server_address[1]  # type: ignore[return-value]

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def _serve(self, server: socketserver.BaseServer) -> None:
        server.daemon_threads = True  # type: ignore[attr-defined]
        server.block_on_close = False  # type: ignore[attr-defined]
        self._servers.append(server)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.daemon = True
        thread.start()
        self._threads.append(thread)

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        gateway = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                try:
                    while (offer := receive(self.request)) is not None:
                        gateway._answer(self.request, offer)
                except (OSError, PayloadError):
                    pass  # the sender is gone, or is none; the round hears of it by its deadline

        return Handler

    def _answer(self, link: socket.socket, offer: dict[str, Any]) -> None:
        if not hmac.compare_digest(str(offer.get("token")), self.token):
            raise PayloadError("a sender without the token")

        def fetch(key: bytes) -> None:
            if offer["local"]:
                send(link, {"path": str(self.store.path(key))})
                if receive(link) != {"written": True}:
                    raise PayloadError(f"{offer['client']} went away while it wrote")
                return
            send(link, {"send": True})
            size = int(offer["size"])
            _receive_into(link, self.store.path(key), size)
            self.received += size

        try:
            self._take_in(offer, fetch)
        except FederationError as error:
            send(link, {"error": f"{error}"})
        else:
            send(link, {"done": True})

    def _take_in(self, offer: dict[str, Any], write: Callable[[bytes], None]) -> None:
        """``write(key)`` fills an object."""
        desk = self.desk()
        try:
            size = desk.check(offer)
            with self.store.room(size, str(offer["client"])) as key:
                write(key)
            try:
                desk.take(offer, key)
            except BaseException:
                self.store.release(key)
                raise
        except (FederationError, OSError) as error:
            desk.refuse(offer, error)
            raise


class Link:
    """A sender's connection to a gateway, for any number of updates.

    ``local``: the gateway's store is on this machine, and values are written into it.
    """

    def __init__(self, address: Address, token: str, local: bool | None = None) -> None:
        unix = isinstance(address, str)
        self.local = unix if local is None else local
        self._token = token
        self._socket = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        self._socket.connect(address)
        self._mapped: tuple[Path, mmap.mmap] | None = None
        """Where the last update was written: the store gives the same place again if it can."""

    def deliver(self, client: str, examples: int, header: bytes, values: Any, **more: Any) -> None:
        """Send an update; returns when the gateway has it.

        Raises :class:`ReplyRefused` with the gateway's reason.
        """
        view = memoryview(values).cast("B")
        answer = self._offer(client, examples, header, len(view), more)
        if "path" in answer:
            write_all(Path(answer["path"]), view)
            send(self._socket, {"written": True})
        else:
            self._socket.sendall(view)
        self._expect()

    @contextlib.contextmanager
    def writing(self, client: str, examples: int, header: bytes, size: int) -> Iterator[memoryview]:
        """``size`` bytes of the store to write an update into: there is no other copy of it.

        At the end the gateway has it, and nobody may write any more. What is there before does not
        matter. Only where :attr:`local`.
        """
        answer = self._offer(client, examples, header, size, {})
        if "path" not in answer:
            raise FederationError("nobody can write into the store of another machine: deliver")
        path = Path(answer["path"])
        if self._mapped is None or self._mapped[0] != path:
            self._mapped = path, map_file(path, size)
        yield memoryview(self._mapped[1])
        send(self._socket, {"written": True})
        self._expect()

    def _offer(
        self, client: str, examples: int, header: bytes, size: int, more: dict[str, Any]
    ) -> dict[str, Any]:
        offer = {"token": self._token, "client": client, "examples": examples, "size": size}
        send(self._socket, {**offer, "header": header.hex(), "local": self.local, **more})
        return self._expect()

    def close(self) -> None:
        """Hang up."""
        self._mapped = None
        self._socket.close()

    def _expect(self) -> dict[str, Any]:
        answer = receive(self._socket)
        if answer is None:
            raise FederationError("the gateway hung up")
        if "error" in answer:
            raise ReplyRefused(str(answer["error"]))
        return answer


def send(link: socket.socket, frame: dict[str, Any]) -> None:
    """Send a frame."""
    data = json.dumps(frame).encode()
    link.sendall(_LENGTH.pack(len(data)) + data)


def receive(link: socket.socket) -> dict[str, Any] | None:
    """The next frame, or None if the other side hung up; :class:`PayloadError` if it is none."""
    head = _exactly(link, _LENGTH.size)
    if head is None:
        return None
    length = _LENGTH.unpack(head)[0]
    if length > _LONGEST_FRAME:
        raise PayloadError(f"a frame of {length} bytes; the longest has {_LONGEST_FRAME}")
    data = _exactly(link, length)
    try:
        frame = json.loads(data or b"")
    except ValueError as error:
        raise PayloadError(f"a frame is no JSON: {error}") from None
    if not isinstance(frame, dict):
        raise PayloadError("a frame is no JSON object")
    return frame


def _exactly(link: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = link.recv(count - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _receive_into(link: socket.socket, path: Path, size: int) -> None:
    """Straight from the socket into the store's memory."""
    with map_file(path, size) as there, memoryview(there) as view:
        got = 0
        while got < size:
            more = link.recv_into(view[got:])
            if not more:
                raise PayloadError(f"the sender hung up after {got} of {size} bytes")
            got += more
