"""The coordinator's side over HTTP: six routes, all of them for members only.

=========================================  =====================================================
``GET /federation/plan``                   what will be run; also for the holder of an invitation
``POST /federation/join``                  an invitation's secret for membership
``GET /federation/agreement``              what both sides must have alike; once the run began
``GET /federation/task``                   the next task, when there is one: a long poll
``POST /federation/tasks/{task}/reply``    its reply
``POST /federation/alive``                 a sign of life during a long task
=========================================  =====================================================

Sites open all connections. 204 means ask again, 410 that there is nothing more to ask for, 503 that
the coordinator is starting or stopping. What is refused never reaches the run.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from anabranch.api.errors import (
    BodyTooLarge,
    error_response,
    handle_anabranch_error,
    handle_http_exception,
)
from anabranch.errors import AnabranchError, InvalidRequest
from anabranch.federated.errors import PayloadError
from anabranch.federated.messages import Reply
from anabranch.federated.runtimes.base import Arrived, Input, Lost
from anabranch.federated.runtimes.network.desk import Desk
from anabranch.federated.runtimes.network.errors import NotAllowed, NotKnown
from anabranch.federated.runtimes.network.outgoing import BYTES, Outgoing
from anabranch.federated.runtimes.network.roster import Member, Roster

logger = logging.getLogger(__name__)

LARGEST_FORM = 1 << 16
MOST_EXAMPLES = 1 << 48


class NotReady(AnabranchError):
    """The run has not begun, or is stopping; it may be there soon."""

    status = 503
    code = "not_ready"


@dataclass
class Office:
    """What the routes need. ``report`` takes what happened, in any thread.

    ``agreement`` is None until the run began; ``closing`` is set when it stops for now.
    """

    roster: Roster
    desk: Desk
    plan: Mapping[str, Any]
    report: Callable[[Input], None]
    max_bytes: int
    poll_s: float
    agreement: Mapping[str, Any] | None = None
    closing: bool = False
    _bells: dict[asyncio.Event, str] = field(default_factory=dict)

    def ring(self, site: str | None = None) -> None:
        """Wake a site's long polls, or all; only in the server's own thread."""
        for bell, owner in self._bells.items():
            if site in (None, owner):
                bell.set()

    async def wait(self, site: str, seconds: float, ready: Callable[[], bool]) -> None:
        """Until ``ready()``, asked again at each ring, or for so long."""
        bell = asyncio.Event()
        self._bells[bell] = site  # first, so that no ring is missed
        try:
            async with asyncio.timeout(seconds):
                while not ready():
                    await bell.wait()
                    bell.clear()
        except TimeoutError:
            pass
        finally:
            del self._bells[bell]


def create_app(office: Office) -> FastAPI:
    """An ASGI application. ``app.state.office`` is what it was given."""
    app = FastAPI(
        title="Anabranch federation",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            AnabranchError: handle_anabranch_error,
            HTTPException: handle_http_exception,
            ClientDisconnect: _cut_off,
        },
    )
    app.state.office = office
    app.get("/federation/plan")(_plan)
    app.post("/federation/join")(_join)
    app.get("/federation/agreement")(_agreement)
    app.get("/federation/task")(_task)
    app.post("/federation/tasks/{task}/reply")(_reply)
    app.post("/federation/alive")(_alive)
    return app


async def _plan(request: Request) -> Response:
    office = _office(request)
    if not office.roster.invited(_token(request)):
        _member(request)
    return JSONResponse(dict(office.plan))


async def _join(request: Request) -> Response:
    """``{"name", "key", "examples"}``; the key is the site's own choice."""
    office = _office(request)
    secret = _token(request)
    try:
        form = json.loads(await _body(request, LARGEST_FORM))
        name, key, examples = form["name"], form["key"], form["examples"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidRequest("body", f"is no form with name, key and examples: {error}") from None
    if not (isinstance(name, str) and isinstance(key, str) and len(key) >= 32):
        raise InvalidRequest("key", "name and key are texts, the key of at least 32 characters")
    if type(examples) is not int or not 0 <= examples < MOST_EXAMPLES:
        raise InvalidRequest("examples", f"is a number of examples, not {str(examples)[:40]}")
    member = office.roster.join(secret, key, name, examples)
    logger.info("%s joined with %d examples", member.name, member.examples)
    office.desk.hear(member.name)
    return JSONResponse({"name": member.name, "examples": member.examples})


async def _agreement(request: Request) -> Response:
    office = _office(request)
    office.desk.hear(_member(request).name)
    return JSONResponse(dict(_begun(office)))


async def _alive(request: Request) -> Response:
    office = _office(request)
    name = _member(request).name
    office.desk.hear(name)
    return _ended(office, name) or Response(status_code=204)


async def _task(request: Request) -> Response:
    office = _office(request)
    desk, name = office.desk, _member(request).name
    desk.hear(name)

    def ready() -> bool:
        there = desk.next_task(name) is not None
        return there or desk.finished is not None or office.closing

    await office.wait(name, office.poll_s, ready)
    if ended := _ended(office, name):
        return ended
    if office.closing:
        raise NotReady("the coordinator is stopping; ask again")
    task = desk.next_task(name)
    desk.hear(name)
    if task is None:
        return Response(status_code=204)
    message = Outgoing(task)
    return StreamingResponse(
        _pieces(message, lambda: desk.hear(name)), headers=message.headers, media_type=BYTES
    )


async def _reply(request: Request, task: int) -> Response:
    office = _office(request)
    desk, name = office.desk, _member(request).name
    desk.hear(name)
    _begun(office)
    sent = desk.sent(task)
    if sent is None:
        return error_response(410, f"nobody waits for a reply to task {task}", code="over")
    if sent.client != name:
        raise NotAllowed(f"task {task} is not one of {name}")
    data = await _body(request, office.max_bytes, lambda: desk.hear(name))
    try:
        reply = Reply.from_bytes(data)
        if (reply.task, reply.kind, reply.version) != (task, sent.kind, sent.version):
            raise PayloadError(
                f"it says that it is for task {reply.task}, {reply.kind[:80]!r} of version "
                f"{reply.version}; task {task} is {sent.kind!r} of version {sent.version}"
            )
    except PayloadError as error:
        reason = f"the reply of {name} to task {task} cannot be read: {error}"
        office.report(Lost(task, reason))
        desk.done(sent)
        raise InvalidRequest("body", reason) from None
    if reply.client != name:
        raise NotAllowed(f"{name} cannot reply for another site")
    # Before the site is told: if nobody writes it down, the task is given again after the restart.
    office.report(Arrived(reply))
    desk.done(sent)
    return Response(status_code=204)


def _office(request: Request) -> Office:
    office: Office = request.app.state.office
    return office


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise NotKnown("send the header 'authorization: Bearer KEY'")
    return token.strip()


def _member(request: Request) -> Member:
    return _office(request).roster.member(_token(request))


def _begun(office: Office) -> Mapping[str, Any]:
    if office.agreement is None or office.closing:
        raise NotReady("the run has not begun; ask again")
    return office.agreement


def _ended(office: Office, name: str) -> Response | None:
    reason = office.desk.tell_end(name)
    return None if reason is None else JSONResponse({"finished": reason}, 410)


async def _body(request: Request, limit: int, heard: Callable[[], None] = lambda: None) -> bytes:
    """All of it, counted while it comes. Raises :class:`BodyTooLarge`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise BodyTooLarge(f"the message has {announced[:20]} bytes; at most {limit} are taken")
    data = bytearray()
    async for piece in request.stream():
        data += piece
        heard()
        if len(data) > limit:
            raise BodyTooLarge(f"the message has more than {limit} bytes")
    return bytes(data)


async def _pieces(message: Outgoing, heard: Callable[[], None]) -> AsyncIterator[bytes]:
    for piece in message:
        yield piece
        heard()


async def _cut_off(request: Request, error: Exception) -> Response:
    """The site hung up half-way, and will send it again."""
    logger.info("a message to %s was cut off", request.url.path)
    return Response(status_code=499)
