"""LightGCN: vectors averaged over several steps of neighbourhood smoothing.

He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation"
(SIGIR 2020).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.graphs.graph import Graph
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.interactions import Interactions
from anabranch.graphs.recommend.losses import bpr, squared
from anabranch.graphs.recommend.model import FactorModel, Table, every
from anabranch.graphs.recommend.trained import TrainedRecommender, at_least_zero


@dataclass(kw_only=True, eq=False, repr=False)
class LightGCN(TrainedRecommender):
    """Scores with the mean of E, AE, AAE, ...: A is the graph's D^-1/2 A D^-1/2, E is trained.

    ``layers`` is the highest power. ``l2`` weighs half the squared *trained* vectors of each
    step's pairs and negatives, divided by the step's pairs. Every step smooths all vectors.
    """

    layers: int = 3
    l2: float = 1e-4

    def _check(self) -> None:
        super()._check()
        at_least_zero(self, "l2")
        if self.layers < 0:
            raise RecommendError(f"layers = {self.layers}: 0 is matrix factorisation, not less")

    def _model(self, train: Interactions, users: Table, items: Table) -> FactorModel:
        return _Smoothed(users, items, normalised_adjacency(train), self.layers, self.l2)


class _Smoothed(FactorModel):
    def __init__(
        self, users: Table, items: Table, adjacency: Tensor, layers: int, l2: float
    ) -> None:
        super().__init__(users, items)
        self._adjacency = adjacency
        self._layers, self._l2 = layers, l2

    def factors(self) -> tuple[Tensor, Tensor]:
        """The smoothed vectors."""
        users, items = every(self.users), every(self.items)
        smooth: Any = _Smooth.apply(torch.cat([users, items]), self._adjacency, self._layers)
        return smooth[: len(users)], smooth[len(users) :]

    def pair_loss(self, user: Tensor, item: Tensor, negatives: Tensor, batch: int) -> Tensor:
        users, items = self.factors()
        negative = negatives[:, 0]
        u, i, j = users[user], items[item], items[negative]
        trained = self.users(user), self.items(item), self.items(negative)
        loss = bpr((u * i).sum(dim=1), (u * j).sum(dim=1))
        return (loss + self._l2 * squared(*trained)) / batch

    @property
    def stores_tables(self) -> bool:
        """Smoothed vectors differ even where the trained ones are shared."""
        return False


class _Smooth(torch.autograd.Function):
    """x -> (x + Ax + ... + A^K x) / (K + 1) for a symmetric A: its own adjoint.

    The backward pass is the same function of the gradient, with the same matrix: nothing is
    stored between the layers and no transpose is made.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, adjacency: Tensor, layers: int) -> Tensor:
        ctx.adjacency, ctx.layers = adjacency, layers
        return smooth(vectors, adjacency, layers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return smooth(gradients[0], ctx.adjacency, ctx.layers), None, None


def smooth(vectors: Tensor, adjacency: Tensor, layers: int) -> Tensor:
    """The mean of the first ``layers`` powers of ``adjacency`` times ``vectors`` [n, dim]."""
    total, power = vectors.clone(), vectors
    for _ in range(layers):
        power = adjacency @ power
        total += power
    return total / (layers + 1)


def normalised_adjacency(train: Interactions) -> Tensor:
    """D^-1/2 A D^-1/2 [users + items, users + items] as a sparse tensor, users first."""
    matrix = Graph.bipartite(train.csr()).adjacency().astype(np.float32)
    degree = np.diff(matrix.indptr).astype(np.float32)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    values = np.repeat(scale, np.diff(matrix.indptr)) * scale[matrix.indices]
    indptr, indices = (
        torch.from_numpy(a.astype(np.int64)) for a in (matrix.indptr, matrix.indices)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            indptr, indices, torch.from_numpy(values), matrix.shape, check_invariants=True
        )
