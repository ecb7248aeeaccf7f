"""What the claims on clients with different data share: digits, split unevenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
    """A finished run, and what was seen of every version.

    ``losses`` are means over the clients of their loss, ``gradient_norms`` the lengths of that
    mean's gradient.
    """

    result: RunResult
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]

    @property
    def objective(self) -> float:
        """Mean over the clients of their loss at the end."""
        return self.losses[-1]

    @property
    def settled_loss(self) -> float:
        """Mean of the last ten versions' losses: one version of few clients says little."""
        return sum(self.losses[-10:]) / len(self.losses[-10:])

    @property
    def final(self) -> float:
        """Mean accuracy of the last ten versions."""
        last = self.accuracies[-10:]
        return sum(last) / len(last)

    def rounds_to(self, accuracy: float, smoothed: int = 1) -> int | None:
        """The first version, from 1, at which the mean of ``smoothed`` accuracies is so high."""
        return _first([-x for x in self.accuracies], -accuracy, smoothed)

    def rounds_to_gradient(self, norm: float, smoothed: int = 1) -> int | None:
        """The first version, from 1, at which the mean of ``smoothed`` norms is so small."""
        return _first(self.gradient_norms, norm, smoothed)

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

    def watch(coordinator: Coordinator) -> dict[str, float]:
        with lent(model, coordinator.server.tensors):  # type: ignore[attr-defined]
            loss, norm = objective(model, sites)
            return {"accuracy": digits.accuracy(model), "loss": loss, "gradient_norm": norm}

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
    curves = {
        key: tuple(row[key] for row in result.history)
        for key in ("accuracy", "loss", "gradient_norm")
    }
    return Outcome(result, curves["accuracy"], curves["loss"], curves["gradient_norm"])


def objective(model: torch.nn.Module, sites: Sequence[Site]) -> tuple[float, float]:
    """Mean over the clients of their loss, all weighing the same, and the norm of its gradient."""
    train, _ = digits.images()
    examples = torch.cat([torch.tensor(site.data) for site in sites])
    share = torch.cat(
        [torch.full((len(site.data),), 1 / (len(sites) * len(site.data))) for site in sites]
    )
    with torch.enable_grad():
        scores = model(train.pixels[examples])
        loss = share @ F.cross_entropy(scores, train.labels[examples], reduction="none")
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), math.sqrt(sum(float(g.square().sum()) for g in gradients))


def _first(curve: Sequence[float], level: float, smoothed: int) -> int | None:
    """Where the mean of the last ``smoothed`` values is first at most the level, from 1."""
    for version in range(smoothed, len(curve) + 1):
        if sum(curve[version - smoothed : version]) / smoothed <= level:
            return version
    return None
