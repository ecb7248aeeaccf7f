"""Rounds that wait only so long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anabranch.errors import ConfigurationError
from anabranch.federated.events import (
    Action,
    Cancel,
    Commit,
    Event,
    Replied,
    SetTimer,
    TimerFired,
)
from anabranch.federated.scheduling.base import View
from anabranch.federated.scheduling.sync import Sync


@dataclass
class Deadline(Sync):
    """A round of :class:`Sync` that ends ``seconds`` after it began, or with ``enough`` replies.

    Whoever is late is cancelled. If nobody replied in time the round begins again. Sample more
    clients than you need (over-selection) and set ``enough`` to what you need.
    """

    seconds: float = 60.0
    enough: int | None = None
    round_id: int = field(default=0, init=False)
    """Counts the rounds that were begun, so that the timer of an earlier one is known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seconds > 0:
            raise ConfigurationError(f"seconds is above 0, not {self.seconds}")
        if self.enough is not None and self.enough < 1:
            raise ConfigurationError(f"enough is at least 1, not {self.enough}")

    def begin(self, fed: View) -> Sequence[Action]:
        """As without a deadline, and set the timer."""
        actions = super().begin(fed)
        if self.waiting_since is not None or fed.version >= self.versions:
            return actions
        self.round_id += 1
        return [*actions, SetTimer(fed.now() + self.seconds, f"round {self.round_id}")]

    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """Commit early, or when the time is up."""
        up = isinstance(event, TimerFired) and event.tag == f"round {self.round_id}"
        enough = isinstance(event, Replied) and self.enough and fed.held() >= self.enough
        if fed.in_flight and (up or enough):
            return [*(Cancel(task) for task in fed.in_flight), Commit()]
        return super().on(event, fed)
