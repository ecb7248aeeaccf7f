"""Sends an answer as server-sent events, or collects it, and aborts it when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anabranch.api.answer import Answer
from anabranch.api.chunks import DONE, Chunks
from anabranch.api.errors import CUT_OFF, describe, error_object
from anabranch.errors import AnabranchError, Draining
from anabranch.models.protocol import FinishReason, TokenLogprob

logger = logging.getLogger("anabranch.api")

Result = TypeVar("Result")

PING = b": ping\n\n"


class ClientGone(Exception):
    """The client closed the connection before it had its answer. Nobody reads what follows."""


class CollectedChoice:
    """A finished choice of an answer that is not streamed."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)


async def collect(request: Request, answer: Answer) -> list[CollectedChoice]:
    """Wait for the whole answer. Raises :class:`ClientGone`, after aborting it."""

    async def read() -> list[CollectedChoice]:
        choices = [CollectedChoice() for _ in range(answer.choices)]
        async for index, delta in answer:
            choices[index].parts.append(delta.text)
            choices[index].logprobs.extend(delta.logprobs)
            choices[index].finish_reason = delta.finish_reason
        return choices

    try:
        return await unless_disconnected(request, read())
    except ClientGone:
        answer.timer.aborted()
        raise
    finally:
        await answer.aclose()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled if the client leaves first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancel(task, gone)


class EventStream(Response):
    """A streamed answer. Its status is 200: what can be refused was refused before.

    The connection is kept alive by a comment when it is silent for ``ping_seconds``. An error on
    the way is sent as ``data: {"error": ...}`` and ends the stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self, answer: Answer, chunks: Chunks, include_usage: bool, ping_seconds: float
    ) -> None:
        self.status_code = 200
        self.background = None
        # No proxy may hold back what is meant to be read token by token.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._chunks = chunks
        self._include_usage = include_usage
        self._ping_seconds = ping_seconds
        self._lock = asyncio.Lock()  # a ping must not follow the last byte
        self._last_sent = time.monotonic()
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer until it ends or the client leaves."""
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            while True:
                silence = time.monotonic() - self._last_sent
                await asyncio.wait(
                    {pump, gone},
                    timeout=max(0.01, self._ping_seconds - silence),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if pump.done():
                    await pump
                    return
                if gone.done():
                    self._answer.timer.aborted()
                    return
                silence = time.monotonic() - self._last_sent
                idle = self._started and not self._lock.locked()
                if idle and silence >= self._ping_seconds:
                    await self._send(send, PING)
        except asyncio.CancelledError:
            # Only a server that stops without waiting any longer cancels a request.
            if pump.done() or not self._started:
                raise
            await _cancel(pump)
            await self._send(send, _error_event(*describe(Draining(CUT_OFF))))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancel(pump, gone)
            await self._answer.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._started = True
        try:
            async for event in self._events():
                await self._send(send, event)
        except AnabranchError as error:
            await self._send(send, _error_event(*describe(error)))
        except Exception:
            logger.exception("a stream failed")
            message = "the server failed while answering; see its log"
            await self._send(send, _error_event(500, message, None, "internal_error"))
        async with self._lock:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        chunks = self._chunks
        opening = "".join(chunks.first(choice) for choice in range(self._answer.choices))
        if opening:
            yield opening.encode("ascii")
        async for choice, delta in self._answer:
            event = chunks.delta(choice, delta)
            if event:
                yield event.encode("ascii")
        if self._include_usage:
            yield chunks.usage(self._answer.usage()).encode("ascii")
        yield DONE

    async def _send(self, send: Send, body: bytes) -> None:
        async with self._lock:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        self._last_sent = time.monotonic()


def _error_event(status: int, message: str, param: str | None, code: str | None) -> bytes:
    return f"data: {json.dumps(error_object(status, message, param, code))}\n\n".encode("ascii")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
