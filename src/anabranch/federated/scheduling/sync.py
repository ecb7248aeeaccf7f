"""Rounds with a barrier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import NotEnoughClients
from anabranch.federated.events import (
    Action,
    Commit,
    Committed,
    Event,
    Failed,
    Joined,
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
from anabranch.federated.scheduling.sampling import Everyone, Sampler
from anabranch.training.schedules import Schedule as Decay
from anabranch.training.schedules import lr_factor


@dataclass
class Sync(Schedule):
    """``rounds`` times: send to the sampled clients, wait for all of them, commit.

    A client that fails is not waited for. A round without any usable reply is tried again with
    other clients. With fewer clients than the sampler needs, it waits ``join_timeout`` seconds of
    the run and then raises :class:`NotEnoughClients`.

    ``decay`` lowers the clients' learning rate from round to round: linear or cosine, to zero after
    the last one.
    """

    rounds: int
    sampler: Sampler = field(default_factory=Everyone)
    work: Work = UNSPECIFIED
    join_timeout: float = 60.0
    decay: Decay = "constant"
    attempt: int = field(default=0, init=False)
    """Times that the present round was begun again."""
    waiting_since: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigurationError(f"rounds is at least 1, not {self.rounds}")
        if self.decay not in get_args(Decay):
            raise ConfigurationError(f"decay is {', '.join(get_args(Decay))}, not {self.decay!r}")

    @property
    def versions(self) -> int:
        """Commits of the whole run."""
        return self.rounds

    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """The barrier is the empty set of tasks in flight."""
        match event:
            case Started() | Committed():
                self.attempt = 0
                return self.begin(fed)
            case RoundEmpty():
                self.attempt += 1
                return self.begin(fed)
            case Replied() | Failed() if not fed.in_flight:
                return [Commit()]
            case Joined() if self.waiting_since is not None:
                return self.begin(fed)
            case TimerFired("join") if self.waiting_since is not None:
                return self.give_up(fed)
        return []

    def begin(self, fed: View) -> Sequence[Action]:
        """Send the tasks of a round, if there are enough clients."""
        if fed.version >= self.versions:
            return [Stop()]
        if len(fed.clients) < self.sampler.needs(len(fed.clients)):
            if self.waiting_since is not None:
                return []
            self.waiting_since = fed.now()
            return [SetTimer(fed.now() + self.join_timeout, "join")]
        self.waiting_since = None
        rng = fed.rng("sample", fed.version, self.attempt)
        return [self.send(name, fed) for name in self.sampler.pick(fed.clients, rng)]

    def send(self, client: str, fed: View) -> Send:
        """The task of one client."""
        factor = lr_factor(fed.version, self.versions, 0, self.decay)
        return Send(client, work=replace(self.work, lr_scale=self.work.lr_scale * factor))

    def give_up(self, fed: View) -> Sequence[Action]:
        """Raise, unless the timer is one of an earlier wait."""
        assert self.waiting_since is not None
        if fed.now() < self.waiting_since + self.join_timeout:
            return []
        raise NotEnoughClients(
            f"round {fed.version} needs {self.sampler.needs(len(fed.clients))} clients; after "
            f"{self.join_timeout:g} s there are {len(fed.clients)}: {', '.join(fed.clients)}"
        )
