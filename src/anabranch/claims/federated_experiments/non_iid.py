"""What the claims on clients with different data share: digits, split unevenly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.evaluation.testbeds import digits
from anabranch.federated import Site, splits
from anabranch.federated.codecs import Codec
from anabranch.federated.coordinator import Coordinator
from anabranch.federated.local import LocalTraining
from anabranch.federated.result import RunResult
from anabranch.federated.scheduling import Sampler
from anabranch.federated.shared import lent
from anabranch.federated.strategies import Strategy


@dataclass(frozen=True)
class Outcome:
    """A finished run: mean over the clients of their loss (``objective``), and of what was seen."""

    result: RunResult
    objective: float
    accuracies: tuple[float, ...]

    @property
    def final(self) -> float:
        """Mean accuracy of the last ten versions."""
        last = self.accuracies[-10:]
        return sum(last) / len(last)

    def rounds_to(self, accuracy: float) -> int | None:
        """The first version that is so accurate, from 1; None if none is."""
        for version, found in enumerate(self.accuracies, 1):
            if found >= accuracy:
                return version
        return None

    @property
    def uplink(self) -> int:
        """Bytes of payload that clients sent."""
        return self.result.ledger.total(direction="up").payload


def dirichlet(clients: int, seed: int, alpha: float = 0.1) -> list[Site]:
    """Clients of few labels."""
    labels = digits.images()[0].labels.tolist()
    return digits.sites(splits.dirichlet(labels, clients, alpha, min_size=2, seed=seed))


def run(
    strategy: Strategy,
    local: LocalTraining,
    sites: list[Site],
    rounds: int,
    seed: int,
    sampler: Sampler | None = None,
    codec: Codec | None = None,
) -> Outcome:
    """Train, and look at every version."""
    model = digits.perceptron(seed)
    objective = 0.0

    def watch(coordinator: Coordinator) -> dict[str, float]:
        nonlocal objective
        with lent(model, coordinator.server.tensors):  # type: ignore[attr-defined]
            if coordinator.version == rounds:
                objective = mean_loss(model, sites)
            return {"accuracy": digits.accuracy(model)}

    federation = strategy.simulate(
        model,
        local,
        sites,
        schedule=strategy.schedule(rounds, sampler),
        watch=watch,
        seed=seed,
        codec=codec,
    )
    result = federation.run()
    return Outcome(result, objective, tuple(row["accuracy"] for row in result.history))


@torch.no_grad()
def mean_loss(model: torch.nn.Module, sites: list[Site]) -> float:
    """The objective of methods in which all clients weigh the same."""
    train, _ = digits.images()
    losses: list[Tensor] = [
        F.cross_entropy(model(train.pixels[site.data]), train.labels[site.data]) for site in sites
    ]
    return float(torch.stack(losses).mean())
