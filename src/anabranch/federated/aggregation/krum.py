"""Krum and Multi-Krum (Blanchard et al. 2017): trust whoever has close neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation.base import Aggregate, Rule
from anabranch.federated.aggregation.gram import gram, squared_distances


class MultiKrum(Rule):
    """The mean of the ``keep`` updates with the closest neighbours (default: p - bad - 2).

    An update's distance is the sum of its p - bad - 2 smallest squared distances to others; the
    score is minus that. Needs ``p >= 2 bad + 3`` for its guarantee. Ignores weights.
    """

    name = "multi_krum"

    def __init__(self, bad: int = 1, keep: int | None = None) -> None:
        if bad < 0:
            raise ConfigurationError(f"bad is the number of bad updates, not {bad}")
        if keep is not None and keep < 1:
            raise ConfigurationError(f"keep is at least 1, not {keep}")
        self.bad, self.keep = bad, keep

    @property
    def minimum(self) -> int:
        """``2 bad + 3``, and no fewer than are kept."""
        return max(2 * self.bad + 3, self.keep or 1)

    @property
    def tolerates(self) -> int:
        """``bad``."""
        return self.bad

    def combine(self, rows: Tensor, weights: Tensor) -> Aggregate:
        """[p, d] -> [d]; of equal scores the first updates count."""
        neighbours = len(rows) - self.bad - 2
        distances = squared_distances(gram(rows))
        # The first of each row is the update itself, at distance 0.
        nearest = distances.fill_diagonal_(-1).sort(dim=1).values[:, 1 : 1 + neighbours]
        scores = -nearest.sum(1)
        chosen = scores.argsort(descending=True, stable=True)[: self.keep or neighbours]
        mean = rows[chosen.sort().values].to(torch.float64).mean(0)
        return Aggregate(mean.to(rows.dtype), scores)


class Krum(MultiKrum):
    """The one update with the closest neighbours, unchanged."""

    name = "krum"

    def __init__(self, bad: int = 1) -> None:
        super().__init__(bad, keep=1)
