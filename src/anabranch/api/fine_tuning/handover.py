"""From the engine's thread to the thread that writes to the store: in order, without waiting.

The engine must not wait for a disk. So events pile up here if the store is slow, at most
:data:`MOST_WAITING` of them: beyond that, of a job's consecutive steps only the newest is kept and
the others are counted. States, checkpoints, validations and versions are always kept; there are
few of them.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.serving.coserving.job import JobEvent

MOST_WAITING = 10_000


class Handover:
    """A queue of ``(job id, event)`` that any thread fills and one empties."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._waiting: deque[tuple[str, JobEvent]] = deque()
        self._newest: dict[str, JobEvent] = {}  # steps beyond the limit
        self._skipped: dict[str, int] = {}
        self._changed = threading.Condition()
        self._poked = False

    def put(self, job_id: str, event: JobEvent) -> None:
        """Never blocks, never raises."""
        with self._changed:
            held_back = self._newest.pop(job_id, None)
            if event.kind == "step" and (held_back or len(self._waiting) >= self._most):
                self._newest[job_id] = event
                if held_back is not None:
                    self._skipped[job_id] = self._skipped.get(job_id, 0) + 1
            else:
                if held_back is not None:
                    self._waiting.append((job_id, held_back))
                self._waiting.append((job_id, event))
            self._changed.notify()

    def poke(self) -> None:
        """Let :meth:`take` return, whether or not there is something."""
        with self._changed:
            self._poked = True
            self._changed.notify()

    def take(self, timeout: float) -> tuple[list[tuple[str, JobEvent]], dict[str, int]]:
        """All that waits, in order for each job, and how many steps were skipped for which job.

        Waits up to ``timeout`` seconds for something.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._newest or self._poked, timeout)
            events = [*self._waiting, *self._newest.items()]
            skipped = self._skipped
            self._waiting.clear()
            self._newest, self._skipped, self._poked = {}, {}, False
            return events, skipped
