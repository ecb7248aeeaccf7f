"""FedBuff: a version for every few updates."""

from __future__ import annotations

from anabranch.errors import ConfigurationError
from anabranch.federated.scheduling import Buffered, Sampler, Schedule
from anabranch.federated.strategies.fedasync import require_all
from anabranch.federated.strategies.fedavg import FedAvg


class FedBuff(FedAvg):
    """The model moves by the mean of ``size`` updates, whoever sent them (Nguyen et al. 2022).

    Use it with many devices of different speed; ``size`` between one (FedAsync) and their number
    trades speed for steadiness. Fast clients are in more versions, and count for more.

    An update that is u versions late counts ``(1 + u) ** -staleness`` (algorithm 1 and section 5).
    """

    name = "fedbuff"

    def __init__(self, size: int = 10, server_lr: float = 1.0, staleness: float = 0.5) -> None:
        if size < 1:
            raise ConfigurationError(f"size is at least 1, not {size}")
        super().__init__(weighting="uniform", server_lr=server_lr, staleness=staleness)
        self.size = size

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """A commit for every ``size`` replies."""
        require_all(self.name, sampler)
        return Buffered(rounds, self.size)
