"""UltraGCN: the limit of infinitely many graph convolutions as a loss, without convolutions.

Mao et al., "UltraGCN: Ultra Simplification of Graph Convolutional Networks for Recommendation"
(CIKM 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import UnknownName
from anabranch.graphs.recommend.cooccurrence import cooccurrence_neighbours, limit_weights
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.interactions import Interactions
from anabranch.graphs.recommend.losses import squared, weighted_bce
from anabranch.graphs.recommend.model import FactorModel, Table, every
from anabranch.graphs.recommend.picked import picked_scores
from anabranch.graphs.recommend.sampler import NegativeSampler
from anabranch.graphs.recommend.trained import TrainedRecommender, at_least_zero

BLOCK_ITEMS = 30
"""Up to so many items for each score that a pair needs, it is faster to score all and pick."""


@dataclass(kw_only=True, eq=False, repr=False)
class UltraGCN(TrainedRecommender):
    """Matrix factorisation whose loss is weighted by the graph.

    For each positive pair (u, i) with ``negatives`` drawn items j, softplus s, beta of
    :func:`limit_weights`, omega and S of :func:`cooccurrence_neighbours`::

        (w1 + w2 beta(u,i)) s(-e_u.e_i)                                  the pair
        + negative_weight * mean_j (w3 + w4 beta(u,j)) s(e_u.e_j)        its negatives
        + item_weight * sum_{j in S(i)} omega(i,j) s(-e_u.e_j)           items like i

    summed over the step's pairs, and once a step ``l2`` / 2 times the squares of all parameters.

    When to use it: in the place of LightGCN, on large graphs. Known problem: with a small ``init``
    and a large ``negative_weight`` training stays at the popularity ranking for many epochs,
    which ``patience`` must outlast. The defaults are for small data; :meth:`preset` has the
    authors' for six data sets. ``scoring`` "gather" computes only the scores it needs, "block" all
    of a pair's user; "auto" chooses the first for more than 30 items for each score.

    Example::

        train, test = read_interactions("ratings.csv").split()
        model = UltraGCN().fit(train)
        items, scores = model.recommend([0, 1], k=10)
    """

    patience: int | None = 25
    w1: float = 1e-7
    w2: float = 1.0
    w3: float = 1e-7
    w4: float = 1.0
    negatives: int = 100
    negative_weight: float = 10.0
    exclude_positive: bool = False
    l2: float = 1e-4
    item_weight: float = 1e-3
    neighbours: int = 10
    exclude_self: bool = False
    scoring: Literal["auto", "block", "gather"] = "auto"
    cache: Path | str | None = None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The authors' settings for a data set, one of :data:`PRESETS`."""
        if name not in PRESETS:
            raise UnknownName("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    def _check(self) -> None:
        super()._check()
        weights = ("w1", "w2", "w3", "w4", "negative_weight", "item_weight", "l2")
        at_least_zero(self, *weights)
        if self.neighbours < 1:
            raise RecommendError(f"neighbours = {self.neighbours}: at least one is needed")
        if self.scoring not in ("auto", "block", "gather"):
            raise RecommendError(f"scoring = {self.scoring!r}: choose 'auto', 'block' or 'gather'")

    def _sampler(self, train: Interactions, generator: torch.Generator) -> NegativeSampler:
        return NegativeSampler(train, self.negatives, self.exclude_positive, generator)

    def _width(self, train: Interactions) -> int:
        if self._in_blocks(train):
            return train.num_items
        return (self.negatives + self.neighbours + 2) * self.dim

    def _in_blocks(self, train: Interactions) -> bool:
        if self.scoring == "auto":
            return train.num_items <= BLOCK_ITEMS * (1 + self.negatives + self.neighbours)
        return self.scoring == "block"

    def _model(self, train: Interactions, users: Table, items: Table) -> FactorModel:
        return ConstraintModel(self, train, users, items)


class ConstraintModel(FactorModel):
    """The loss of :class:`UltraGCN` on given tables."""

    def __init__(self, settings: UltraGCN, train: Interactions, users: Table, items: Table) -> None:
        super().__init__(users, items)
        self._settings = settings
        self._in_blocks = settings._in_blocks(train)
        self._of_users, self._of_items = map(torch.from_numpy, limit_weights(train))
        cache = None if settings.cache is None else Path(settings.cache)
        found = cooccurrence_neighbours(
            train, settings.neighbours, exclude_self=settings.exclude_self, cache=cache
        )
        self._neighbours, self._omega = map(torch.from_numpy, found)

    def pair_loss(self, user: Tensor, item: Tensor, negatives: Tensor, batch: int) -> Tensor:
        """The three sums of :class:`UltraGCN`, and these pairs' share of the penalty."""
        s = self._settings
        neighbours = self._neighbours[item]  # [b, K]
        columns = torch.cat([item[:, None], negatives, neighbours], dim=1)
        scores = self._scores(user, columns)
        positive, negative, near = scores.split([1, negatives.shape[1], neighbours.shape[1]], dim=1)
        of_user = self._of_users[user]
        pairs = weighted_bce(
            positive[:, 0],
            negative,
            s.w1 + s.w2 * of_user * self._of_items[item],
            s.negative_weight * (s.w3 + s.w4 * of_user[:, None] * self._of_items[negatives]),
        )
        alike = (self._omega[item] * F.softplus(-near)).sum()
        penalty = squared(self.users.weight, self.items.weight) * (len(user) / batch)
        return pairs + s.item_weight * alike + s.l2 * penalty

    def _scores(self, user: Tensor, columns: Tensor) -> Tensor:
        """Scores [b, c] of the users [b] with the items [b, c]."""
        vectors = self.users(user)
        if self._in_blocks:
            return (vectors @ every(self.items).T).gather(1, columns)
        return picked_scores(vectors, every(self.items), columns)


_COMMON: dict[str, Any] = {"dim": 64, "lr": 1e-3, "batch": 1024, "init": 1e-4, "neighbours": 10}


def _preset(
    negatives: int,
    negative_weight: float,
    l2: float,
    item_weight: float,
    w: tuple[float, float, float, float],
    patience: int,
    **others: Any,
) -> dict[str, Any]:
    return {
        **_COMMON,
        "negatives": negatives,
        "negative_weight": negative_weight,
        "l2": l2,
        "item_weight": item_weight,
        **dict(zip(("w1", "w2", "w3", "w4"), w, strict=True)),
        "patience": patience,
        "epochs": 2000,
        **others,
    }


_LIMIT7 = (1e-7, 1.0, 1e-7, 1.0)
_LIMIT6 = (1e-6, 1.0, 1e-6, 1.0)
_LIMIT8 = (1e-8, 1.0, 1e-8, 1.0)
PRESETS: dict[str, dict[str, Any]] = {
    "ml-1m": _preset(200, 200, 1e-4, 1e-3, _LIMIT7, 50, dim=128, init=1e-3),
    "amazon-electronics": _preset(
        75, 75, 5e-5, 1e-7, _LIMIT7, 250, batch=2048, init=1e-3, exclude_positive=True
    ),
    "amazon-cds": _preset(1000, 1000, 1e-4, 1.0, _LIMIT7, 15),
    "gowalla": _preset(1500, 300, 1e-4, 5e-4, _LIMIT6, 150, lr=1e-4, batch=512),
    "yelp2018": _preset(800, 300, 1e-4, 5e-4, _LIMIT8, 15),
    "amazon-books": _preset(500, 500, 1e-4, 2.75, (1e-8, 1.0, 1.0, 1e-8), 15),
}
"""The authors' settings. They select the epoch on the test set; here validation does."""
