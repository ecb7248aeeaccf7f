"""FedAsync: every update is a version."""

from __future__ import annotations

from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.federated.scheduling import Buffered, Sampler, Schedule
from anabranch.federated.strategies.fedavg import FedAvg


class FedAsync(FedAvg):
    """Nobody waits for anybody: the model moves with each reply (Xie et al. 2019, algorithm 1).

    Use it where devices are of very different speed and a rough model soon is worth more than a
    steady one. It drifts towards fast clients, and jitters; FedFix does neither.

    A reply that is u versions late moves the model by ``alpha (1 + u) ** -staleness`` of the
    client's own difference, so that a late one does not undo the versions in between, as mixing
    with the client's model (the paper's update) would. ``rounds`` are replies.
    """

    name = "fedasync"

    def __init__(self, alpha: float = 0.9, staleness: float = 0.5) -> None:
        if not 0 < alpha <= 1:
            raise ConfigurationError(f"alpha is above 0 and at most 1, not {alpha}")
        super().__init__(weighting="uniform", server_lr=alpha, staleness=staleness)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """A commit for each reply."""
        require_all(self.name, sampler)
        return Buffered(rounds, size=1)


def require_all(strategy: str, sampler: Any) -> None:
    """Without a barrier there are no rounds to sample clients for."""
    if sampler is not None:
        raise ConfigurationError(f"{strategy} has no rounds and so no sampler: everyone works")
