"""What the coordinator and its sites leave for each other, and who is there. No I/O; any thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from anabranch.federated.messages import Task
from anabranch.federated.runtimes.base import ClientJoined, ClientLeft

REMEMBERED = 64
"""Tasks of each site; a reply that comes again to one of them is counted as a duplicate."""


class Desk:
    """Tasks wait here until their reply is there: a site that died finds its task again.

    A site is there while something was heard of it in the last ``absent_after`` seconds.
    """

    def __init__(self, absent_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.absent_after = absent_after
        self.finished: str | None = None
        """Why the run is over for good, once it is."""
        self._clock = clock
        self._lock = threading.Lock()
        self._heard: dict[str, float] = {}
        self._counted: set[str] = set()
        """Who is there as far as the coordinator has been told."""
        self._told_end: set[str] = set()
        self._waiting: dict[str, dict[int, Task]] = {}
        self._sent: dict[int, Task] = {}
        """Without their bodies: those without a reply, and the last ones of each site."""
        self._sent_to: dict[str, deque[int]] = {}

    # Who is there

    def hear(self, site: str) -> None:
        """A sign of life."""
        with self._lock:
            self._heard[site] = self._clock()

    def count(self, members: Mapping[str, int]) -> dict[str, int]:
        """The members that are there now; the coordinator is told so at once."""
        with self._lock:
            self._counted = self._present(members)
            return {name: members[name] for name in sorted(self._counted)}

    def changes(self, members: Mapping[str, int]) -> list[ClientJoined | ClientLeft]:
        """Who came and went since :meth:`count` or the last call."""
        with self._lock:
            present = self._present(members)
            came, went = sorted(present - self._counted), sorted(self._counted - present)
            self._counted = present
            for name in (*came, *went):
                self._waiting.pop(name, None)  # whatever it was, it is over for the coordinator
            return [ClientJoined(name, members[name]) for name in came] + [
                ClientLeft(name) for name in went
            ]

    def _present(self, members: Mapping[str, int]) -> set[str]:
        limit = self._clock() - self.absent_after
        return {name for name, at in self._heard.items() if name in members and at >= limit}

    # Tasks

    def give(self, task: Task) -> None:
        """A task waits to be fetched."""
        with self._lock:
            self._waiting.setdefault(task.client, {})[task.id] = task
            self._sent[task.id] = replace(task, body=b"")
            own = self._sent_to.setdefault(task.client, deque())
            own.append(task.id)
            while len(own) > REMEMBERED and own[0] < task.settled:
                self._sent.pop(own.popleft(), None)

    def next_task(self, site: str) -> Task | None:
        """The oldest task of a site that has no reply yet."""
        with self._lock:
            waiting = self._waiting.get(site)
            return waiting[min(waiting)] if waiting else None

    def sent(self, number: int) -> Task | None:
        """A task that was given, without its body; None for one of long ago, or never given."""
        with self._lock:
            return self._sent.get(number)

    def done(self, task: Task) -> None:
        """It need not be fetched again."""
        with self._lock:
            self._waiting.get(task.client, {}).pop(task.id, None)

    # The end

    def finish(self, reason: str) -> None:
        """The run is over for good."""
        with self._lock:
            self.finished = reason

    def tell_end(self, site: str) -> str | None:
        """Why the run is over, after which this site knows; None if it is not."""
        with self._lock:
            if self.finished is not None:
                self._told_end.add(site)
            return self.finished

    def unaware(self) -> set[str]:
        """Sites that are there and do not know yet that the run is over."""
        with self._lock:
            return self._counted - self._told_end
