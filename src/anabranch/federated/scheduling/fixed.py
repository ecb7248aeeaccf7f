"""Versions at fixed times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from anabranch.errors import ConfigurationError
from anabranch.federated.events import (
    Action,
    Commit,
    Committed,
    Event,
    Failed,
    Joined,
    Left,
    Replied,
    RoundEmpty,
    Send,
    SetTimer,
    Started,
    Stop,
    TimerFired,
)
from anabranch.federated.messages import UNSPECIFIED, Work
from anabranch.federated.scheduling.base import Schedule, View

MARGIN = 1.05
"""Of a measured window over the median: one just below many equal times would miss them all."""
NEW = 0.3
"""Share of a new measurement in a client's mean duration."""
MEASURED_EVERY = 20
"""Windows after which a measured length is measured again."""


@dataclass
class FixedWindows(Schedule):
    """A commit every ``seconds`` of the run, of whoever has replied by then (FedFix).

    A client that has replied waits for the window to end, and starts again from the new version; so
    does one that failed. A window in which nobody replied makes no version. Window n ends at
    exactly ``n * seconds``.

    ``seconds`` None: 1.05 times the median duration of a task. The first window then ends when half
    of the clients have replied, and the length is measured again every 20 windows.
    """

    versions: int
    seconds: float | None = None
    work: Work = UNSPECIFIED
    durations: dict[str, float] = field(default_factory=dict, init=False)
    """Seconds of each client's task, a moving mean."""
    length: float | None = field(default=None, init=False)
    """Of the present window; None: it is not known yet, or nobody is there."""
    origin: float = field(default=0.0, init=False)
    """When the first window of this length began."""
    windows: int = field(default=0, init=False)
    """Windows of this length, the present one included."""

    def __post_init__(self) -> None:
        if self.versions < 1:
            raise ConfigurationError(f"versions is at least 1, not {self.versions}")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ConfigurationError(f"seconds is above 0 and finite, not {self.seconds}")

    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """Timers end windows; everything else only says who is idle."""
        match event:
            case Started():
                return [*self._restart(fed), *self._open(fed)]
            case Replied(client=client, sent=sent):
                taken = fed.now() - sent
                before = self.durations.get(client, taken)
                self.durations[client] = (1 - NEW) * before + NEW * taken
                return self._open(fed)
            case Joined(client=client) if not fed.busy(client):
                return [Send(client, work=self.work), *self._open(fed)]
            case Left(client=client):
                self.durations.pop(client, None)
                return self._open(fed)
            case Failed(client=client) if self.length is None and client in fed.clients:
                return [Send(client, work=self.work)]  # there is no window to wait for
            case TimerFired() if fed.held():
                return [Commit()]
            case Committed(version=version) if version >= self.versions:
                return [Stop()]
            case TimerFired() | Committed() | RoundEmpty():
                return [*self._restart(fed), *self._next(fed)]
        return []

    def _restart(self, fed: View) -> list[Action]:
        """Tasks for whoever is idle."""
        return [Send(name, work=self.work) for name in fed.clients if not fed.busy(name)]

    def _open(self, fed: View) -> list[Action]:
        """Begin the first window of a length, if it is not running and the length is known."""
        if self.length is not None or not fed.clients:
            return []
        if self.seconds is None and 2 * len(self.durations) < len(fed.clients):
            return []
        # What was measured up to now belongs to the first window.
        first = self.seconds is None and fed.version == 0
        self.origin = 0.0 if first else fed.now()
        self.length = self.seconds or MARGIN * self._median(len(fed.clients))
        self.windows = 1
        return [SetTimer(self.origin + self.length, "window")]

    def _median(self, clients: int) -> float:
        """The lower median duration of so many clients; those not measured yet are slower."""
        return sorted(self.durations.values())[(clients - 1) // 2]

    def _next(self, fed: View) -> list[Action]:
        """The window after the present one, which ends now."""
        assert self.length is not None
        if not fed.clients:
            self.length = None  # the first to join opens the next
            return []
        if self.seconds is None and self.windows >= MEASURED_EVERY:
            self.length = None
            return self._open(fed)
        self.windows += 1
        return [SetTimer(self.origin + self.windows * self.length, "window")]
