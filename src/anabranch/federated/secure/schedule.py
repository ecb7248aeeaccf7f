"""Rounds of four phases with a barrier after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from anabranch.federated.events import Action, Event, Failed, Replied, Send
from anabranch.federated.scheduling import Sync
from anabranch.federated.scheduling.base import View
from anabranch.federated.secure.protocol import PHASES


@dataclass
class SecureSync(Sync):
    """:class:`Sync` for a secure sum: who replied in a phase is asked in the next one.

    A site that fails drops out of its round only.
    """

    phase: int = field(default=0, init=False)
    replied: list[str] = field(default_factory=list, init=False)
    """Who did in this phase."""

    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """The barrier of a phase, and after the last one that of the round."""
        if isinstance(event, Replied):
            self.replied.append(event.client)
        if isinstance(event, Replied | Failed) and not fed.in_flight:
            names = sorted(set(self.replied) & set(fed.clients))
            if names and self.phase < len(PHASES) - 1:
                self.phase, self.replied = self.phase + 1, []
                return [self.send(name, fed) for name in names]
        return super().on(event, fed)

    def begin(self, fed: View) -> Sequence[Action]:
        """A round begins with its first phase."""
        self.phase, self.replied = 0, []
        return super().begin(fed)

    def send(self, client: str, fed: View) -> Send:
        """The task of one site in this phase."""
        return replace(super().send(client, fed), kind=PHASES[self.phase])
