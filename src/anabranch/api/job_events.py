"""What happens to a job, as Server-Sent Events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from anabranch.api.chunks import DONE
from anabranch.api.service import Service
from anabranch.api.streaming import PING
from anabranch.jobs import FINISHED, Event, JobStore

POLL_SECONDS = 0.2
"""How often a stream looks at the store, which other servers may write to."""

_PAGE = 1000


def event_stream(
    service: Service,
    store: JobStore,
    job_id: str,
    after: int,
    shown: Callable[[Event], dict[str, Any]],
) -> StreamingResponse:
    """Events behind ``after``, oldest first, until the job is finished, and then ``[DONE]``.

    It ends without one when the server drains: ask again, from the last event on.
    """
    return StreamingResponse(
        _events(service, store, job_id, after, shown),
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        media_type="text/event-stream",
    )


async def _events(
    service: Service,
    store: JobStore,
    job_id: str,
    after: int,
    shown: Callable[[Event], dict[str, Any]],
) -> AsyncIterator[bytes]:
    sent = time.monotonic()

    def look() -> tuple[bool, list[Event]]:
        # In this order: what a finished job has to say is complete.
        finished = store.get(job_id).state in FINISHED
        return finished, list(store.events(job_id, after=after, limit=_PAGE).items)

    while True:
        finished, events = await run_in_threadpool(look)
        for event in events:
            yield f"data: {json.dumps(shown(event), allow_nan=False)}\n\n".encode("ascii")
            after, sent = event.sequence, time.monotonic()
        if finished and not events:
            yield DONE
            return
        if service.draining:
            return
        if time.monotonic() - sent >= service.options.ping_seconds:
            yield PING
            sent = time.monotonic()
        if not events:
            await asyncio.sleep(POLL_SECONDS)
