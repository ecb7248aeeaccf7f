"""What a run gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from anabranch.federated.incidents import Incidents
from anabranch.federated.ledger import Ledger
from anabranch.federated.server import Update
from anabranch.federated.timeline import Timeline

Clock = Literal["virtual", "real"]
"""Whose time the times of a run are: that of simulated devices, or the one on the wall."""


@dataclass(frozen=True)
class RunResult:
    """How a run went.

    ``seconds`` is the time of the run on its ``clock``. ``history`` has a row of figures
    for each version: its ``seconds``, the mean of the clients' metrics weighted by examples, what
    the server's commit said, and what ``watch`` returned. ``timeline`` is the schedule's, if it
    keeps one.
    """

    version: int
    reason: str
    seconds: float
    history: Sequence[Mapping[str, float]]
    ledger: Ledger
    incidents: Incidents
    clock: Clock = "virtual"
    timeline: Timeline | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last version's figures."""
        return self.history[-1] if self.history else {}


def mean_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Each figure's mean over the clients that reported it, weighted by examples if there are any.

    The same in any order of the updates.
    """
    means = {}
    for name in sorted({name for update in updates for name in update.metrics}):
        having = [update for update in updates if name in update.metrics]
        weights = [float(update.examples) for update in having]
        if not any(weights):
            weights = [1.0] * len(having)
        values = [float(update.metrics[name]) for update in having]
        total = math.fsum(w * v for w, v in zip(weights, values, strict=True))
        means[name] = total / math.fsum(weights)
    return means
