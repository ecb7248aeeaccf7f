"""Rules on the sorted values of each coordinate (Yin et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation.base import Aggregate, Rule


class Median(Rule):
    """The median of each coordinate, for an even number of updates the mean of the middle two.

    Ignores weights: a claimed number of examples would be a way in.
    """

    name = "median"

    def combine(self, rows: Tensor, weights: Tensor) -> Aggregate:
        """[p, d] -> [d]."""
        ordered = rows.sort(dim=0).values
        middle = ordered[(len(rows) - 1) // 2 : len(rows) // 2 + 1]
        return Aggregate(middle.to(torch.float64).mean(0).to(rows.dtype))


class TrimmedMean(Rule):
    """The mean of each coordinate without its ``bad`` smallest and ``bad`` largest values.

    Ignores weights.
    """

    name = "trimmed_mean"

    def __init__(self, bad: int = 1) -> None:
        if bad < 0:
            raise ConfigurationError(f"bad is the number of bad updates, not {bad}")
        self.bad = bad

    @property
    def minimum(self) -> int:
        """One value must be left."""
        return 2 * self.bad + 1

    @property
    def tolerates(self) -> int:
        """``bad``."""
        return self.bad

    def combine(self, rows: Tensor, weights: Tensor) -> Aggregate:
        """[p, d] -> [d]."""
        ordered = rows.sort(dim=0).values[self.bad : len(rows) - self.bad]
        return Aggregate(ordered.to(torch.float64).mean(0).to(rows.dtype))
