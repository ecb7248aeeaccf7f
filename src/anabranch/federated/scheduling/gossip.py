"""Rounds without a server: everyone works, then averages with the neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from anabranch.errors import ConfigurationError
from anabranch.federated.events import Send
from anabranch.federated.scheduling.base import View
from anabranch.federated.scheduling.sync import Sync


@dataclass
class Gossip(Sync):
    """``rounds`` times: all clients ``train``, then ``mixing_steps`` times all clients ``mix``.

    Each of these is a commit, in which the relay files what everyone sent; so which comes next
    follows from the version.
    """

    mixing_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixing_steps < 1:
            raise ConfigurationError(f"mixing_steps is at least 1, not {self.mixing_steps}")

    @property
    def versions(self) -> int:
        """Commits of the whole run."""
        return self.rounds * (1 + self.mixing_steps)

    def send(self, client: str, fed: View) -> Send:
        """Training comes first in a round."""
        kind = "mix" if fed.version % (1 + self.mixing_steps) else "train"
        return replace(super().send(client, fed), kind=kind)
