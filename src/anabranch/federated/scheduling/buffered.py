"""Versions without a barrier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.errors import ConfigurationError
from anabranch.federated.events import (
    Action,
    Commit,
    Committed,
    Event,
    Failed,
    Joined,
    Replied,
    Send,
    SetTimer,
    Started,
    Stop,
    TimerFired,
)
from anabranch.federated.messages import UNSPECIFIED, Work
from anabranch.federated.scheduling.base import Schedule, View
from anabranch.federated.server import Update


@dataclass
class Buffered(Schedule):
    """Commits whenever ``size`` updates are there (FedBuff, Nguyen et al. 2022); 1 is FedAsync.

    Every client gets its next task as soon as it replied. Updates that are more than
    ``max_staleness`` versions old are dropped; the method weighs the others. A client that fails
    gets another task ``retry_after`` seconds of the run later.
    """

    versions: int
    size: int = 10
    max_staleness: int | None = None
    work: Work = UNSPECIFIED
    retry_after: float = 1.0

    def __post_init__(self) -> None:
        if self.versions < 1 or self.size < 1:
            raise ConfigurationError(
                f"versions and size are at least 1, not {self.versions} and {self.size}"
            )
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ConfigurationError(f"max_staleness is at least 0, not {self.max_staleness}")

    def admits(self, update: Update) -> bool:
        """Whether it is fresh enough."""
        return self.max_staleness is None or update.staleness <= self.max_staleness

    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """Commit first, so that the next task carries the new version."""
        match event:
            case Started():
                return [self.send(name) for name in fed.clients]
            case Replied(client=client):
                commit: list[Action] = [Commit()] if fed.held() >= self.size else []
                return [*commit, self.send(client)]
            case Failed(what="stale", client=client):
                return [self.send(client)]
            case Failed(client=client):
                return [SetTimer(fed.now() + self.retry_after, client)]
            case TimerFired(tag=client) if client in fed.clients and not fed.busy(client):
                return [self.send(client)]
            case Joined(client=client) if not fed.busy(client):
                return [self.send(client)]
            case Committed(version=version) if version >= self.versions:
                return [Stop()]
        return []

    def send(self, client: str) -> Send:
        """The next task of a client."""
        return Send(client, work=self.work)
