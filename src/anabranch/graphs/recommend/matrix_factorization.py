"""Matrix factorisation with the pairwise loss of BPR (Rendle et al., UAI 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anabranch.graphs.recommend.interactions import Interactions
from anabranch.graphs.recommend.losses import bpr, squared
from anabranch.graphs.recommend.model import FactorModel, Table
from anabranch.graphs.recommend.trained import TrainedRecommender, at_least_zero


@dataclass(kw_only=True, eq=False, repr=False)
class MatrixFactorization(TrainedRecommender):
    """A vector for each user and item, so that bought items score above random ones.

    ``l2`` weighs half the squared vectors of each step's pairs and negatives, divided by the
    step's pairs, as LightGCN's authors do.
    """

    l2: float = 1e-4

    def _check(self) -> None:
        super()._check()
        at_least_zero(self, "l2")

    def _model(self, train: Interactions, users: Table, items: Table) -> FactorModel:
        return _Pairwise(users, items, self.l2)


class _Pairwise(FactorModel):
    def __init__(self, users: Table, items: Table, l2: float) -> None:
        super().__init__(users, items)
        self._l2 = l2

    def pair_loss(self, user: Tensor, item: Tensor, negatives: Tensor, batch: int) -> Tensor:
        u, i, j = self.users(user), self.items(item), self.items(negatives[:, 0])
        loss = bpr((u * i).sum(dim=1), (u * j).sum(dim=1))
        return (loss + self._l2 * squared(u, i, j)) / batch
