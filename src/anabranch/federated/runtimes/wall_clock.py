"""What runtimes share whose clients work elsewhere, in real time: one inbox, and timers."""

from __future__ import annotations

import heapq
import math
import queue
import time
from abc import abstractmethod
from collections.abc import Sequence

from anabranch.errors import ConfigurationError
from anabranch.federated.node import Agreement
from anabranch.federated.runtimes.base import Fired, Input, Runtime, Timed
from anabranch.federated.runtimes.simulation import Site

LOOK_AROUND_S = 0.5
"""How often a runtime that waits asks whether anything can still happen."""


def by_name(sites: Sequence[Site]) -> dict[str, Site]:
    """The sites of such a runtime; :class:`ConfigurationError` if they need virtual time."""
    found = {site.name: site for site in sites}
    if len(found) != len(sites):
        raise ConfigurationError("two sites have the same name")
    for site in sites:
        if site.joins or site.leaves != math.inf:
            raise ConfigurationError(
                f"site {site.name} joins or leaves at a virtual time; use Simulation for that"
            )
    return found


class WallClock(Runtime):
    """Time is that of the clock on the wall, without the pauses between a crash and its resumption.

    A subclass sends tasks away in :meth:`submit` and calls :meth:`report`, from any thread, with
    what comes back.
    """

    def open(self, agreement: Agreement, resumed: float | None = None) -> None:
        """The run goes on at ``resumed`` seconds."""
        self._agreement = agreement
        self._last = resumed or 0.0
        self._began = time.monotonic() - self._last
        self._inbox: queue.SimpleQueue[Input] = queue.SimpleQueue()
        self._timers: list[tuple[float, int]] = []

    def now(self) -> float:
        """Seconds of the run; never less than those of the last input."""
        return max(self._last, time.monotonic() - self._began)

    def report(self, happened: Input) -> None:
        """Something happened; may be called by any thread."""
        self._inbox.put(happened)

    def set_timer(self, at: float, timer: int) -> None:
        """Timers that are due at one time fire in the order of their numbers."""
        heapq.heappush(self._timers, (at, timer))

    def next_input(self) -> Timed | None:
        """The oldest of what came, or a timer that is due before anything comes."""
        while True:
            due = self._timers[0][0] - self.now() if self._timers else LOOK_AROUND_S
            try:
                happened = self._inbox.get(timeout=min(max(due, 0.0), LOOK_AROUND_S))
            except queue.Empty:
                if self._timers and self._timers[0][0] <= self.now():
                    happened = Fired(heapq.heappop(self._timers)[1])
                elif self._timers or self.alive():
                    continue
                else:
                    return None
            self._last = self.now()
            return Timed(self._last, happened)

    @abstractmethod
    def alive(self) -> bool:
        """Whether anything may still happen if no timer is set."""
