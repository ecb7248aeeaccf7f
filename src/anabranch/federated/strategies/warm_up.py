"""Rounds of which the first, or some, ask everyone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.federated.events import Action
from anabranch.federated.scheduling import Everyone, Sampler, Sync
from anabranch.federated.scheduling.base import View


@dataclass
class WarmUp(Sync):
    """:class:`Sync`, but everyone who is there takes part in the first round."""

    @classmethod
    def of(cls, rounds: int, sampler: Sampler | None = None) -> WarmUp:
        """So many rounds, the first included."""
        return cls(rounds, sampler or Everyone())

    def asks_everyone(self, fed: View) -> bool:
        """Whether the present round is such a one."""
        return not fed.version

    def begin(self, fed: View) -> Sequence[Action]:
        """Everyone, or the sampler's choice."""
        over = fed.version >= self.versions
        if over or len(fed.clients) < self.sampler.needs(len(fed.clients)):
            return super().begin(fed)
        if not self.asks_everyone(fed):
            return super().begin(fed)
        self.waiting_since = None
        return [self.send(name, fed) for name in fed.clients]
