"""Rounds of which the first asks everyone."""

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

    def begin(self, fed: View) -> Sequence[Action]:
        """Everyone at version 0, the sampler's choice after it."""
        if fed.version or len(fed.clients) < self.sampler.needs(len(fed.clients)):
            return super().begin(fed)
        self.waiting_since = None
        return [self.send(name, fed) for name in fed.clients]
