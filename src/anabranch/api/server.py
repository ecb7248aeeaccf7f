"""Runs the app under uvicorn and drains it on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from anabranch.api.service import Service
from anabranch.errors import AnabranchError, ConfigurationError

logger = logging.getLogger("anabranch.api")


class PortInUse(ConfigurationError):
    """Another program listens on the address."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"port {port} on {host} is in use by another program; "
            "choose another one with --port, or 0 for any free one"
        )


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address (port 0: any free one) without answering on it yet.

    Done before a model is loaded: whoever mistypes the port should learn it at once. Clients are
    refused until :func:`serve`. Raises :class:`ConfigurationError`.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"cannot resolve the host {host!r}: {error}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(host, port) from error
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def serve(
    app: FastAPI,
    listener: socket.socket,
    drain_timeout: float = 30.0,
    on_listening: Callable[[str], None] | None = None,
) -> int:
    """Serve until a signal ends it; returns the exit status.

    The first signal drains: running requests finish, new ones get 503, for at most
    ``drain_timeout`` seconds; status 0 if all finished, 1 if some were cut off. The second signal
    cuts them off at once. ``on_listening`` is called with the address once clients can connect.
    """
    server = DrainingServer(app, drain_timeout, on_listening)
    host, port = listener.getsockname()[:2]

    def not_twice(record: logging.LogRecord) -> bool:
        """A model that fails to start is reported by an exception, not also in the log."""
        return not isinstance(server.service.startup_error, AnabranchError)

    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.addFilter(not_twice)
    try:
        server.run(sockets=[listener])
    except SystemExit:
        if isinstance(server.service.startup_error, AnabranchError):
            raise server.service.startup_error from None
        raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:  # another server reserved the same port meanwhile
            raise PortInUse(host, port) from error
        raise
    finally:
        uvicorn_log.removeFilter(not_twice)
        listener.close()
    return 1 if server.cut_off else 0


class DrainingServer(uvicorn.Server):
    """A uvicorn server whose first signal stops new requests, not running ones.

    The listening socket stays open while draining, so that clients and load balancers read a 503
    instead of a refused connection. ``cut_off`` is the number of requests that did not finish.
    """

    def __init__(
        self,
        app: FastAPI,
        drain_timeout: float,
        on_listening: Callable[[str], None] | None = None,
    ) -> None:
        # After the drain only the last bytes of finished answers are still under way.
        config = uvicorn.Config(
            app,
            lifespan="on",
            # The same with every extra: uvloop, which one brings, hides that a port is taken.
            loop="asyncio",
            http="h11",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
            ws_per_message_deflate=False,  # the console's messages are short; time is the engine's
        )
        super().__init__(config)
        self.service: Service = app.state.service
        self.cut_off = 0
        self._drain_timeout = drain_timeout
        self._deadline = float("inf")
        self._on_listening = on_listening
        self._announced = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the models, listen, and only then say so."""
        await super().startup(sockets)
        if self.started and self._on_listening is not None:
            listener = self.servers[0].sockets[0]
            host, port = listener.getsockname()[:2]
            self._on_listening(
                f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cut off what still runs, and let it free its memory, before the models are closed."""
        tasks = list(self.server_state.tasks)
        for task in tasks if self.cut_off else ():
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: stop now. (uvicorn would re-raise them at the end.)"""
        if not self.service.draining:
            self._deadline = time.monotonic() + self._drain_timeout
            self.service.draining = True
        elif not self.should_exit:
            self._deadline = 0.0
        else:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is the drain over?"""
        late = time.monotonic() >= self._deadline
        if self.service.draining and self.service.active and not self._announced:
            self._announced = True
            message = (
                "shutting down when %d running requests are done; signal again to cut them off"
            )
            logger.warning(message, self.service.active)
        if self.service.draining and (late or not self.service.active):
            self.cut_off = self.service.active
            if self.cut_off:
                logger.warning("%d requests did not finish in time", self.cut_off)
            self.should_exit = True
        return await super().on_tick(counter)
