"""GraphHash: ids that interact alike share a row.

"GraphHash: Graph Clustering Enables Parameter Efficiency in
Recommender Systems" (WWW 2025). Users and items are clustered once, before training.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.hashing.clustering import (
    Clustering,
    louvain,
    modularity,
    resolution_for,
)
from anabranch.graphs.recommend.hashing.mappers import IdMapper, check_budget
from anabranch.graphs.recommend.hashing.rows import (
    RowAssignment,
    largest_of_rows,
    modulo_rows,
    universal_hash,
)
from anabranch.graphs.recommend.interactions import Interactions, as_interactions


@dataclass(eq=False, repr=False)
class GraphHash(IdMapper):
    """A row for each cluster of users and each cluster of items.

    When to use it: the embedding tables are what is too large, and the interactions have
    communities. Known problems: on small data that popularity rules, :class:`Frequency` is as good
    or better (docs/graphs.md); an id without interactions is a cluster of its own and uses up the
    budget silently (``fit`` warns), unless ``merge_isolated`` gives it a row by modulo.

    Give either ``budget``, the share of rows to keep at most, from which the resolution is found by
    about 20 clusterings, or ``resolution``, larger for more clusters (the authors': 5 for
    MovieLens-1M, 200 for Gowalla). ``budget`` 1 is a row for each id.

    Fitted: ``users_``, ``items_``; ``resolution_``, ``modularity_`` (at resolution 1), and the
    clusters ``user_clusters_`` [users] and ``item_clusters_`` [items], numbered together.
    """

    budget: float | None = None
    resolution: float | None = None
    merge_isolated: bool = False
    shuffle: bool = False
    seed: int = 0

    def extended(self, interactions: Any) -> Self:
        """A mapper for more ids, none of which moves a fitted one.

        ``interactions`` has the fitted ids as its first ones and may have more of both. A new id
        gets the row of the cluster most of its fitted neighbours are in (equal counts: of the
        larger cluster), a new id without any the row id mod rows.
        """
        self._check_fitted()
        more = as_interactions(interactions)
        users, items = len(self.user_clusters_), len(self.item_clusters_)
        if more.num_users < users or more.num_items < items:
            raise RecommendError(
                f"{more.num_users} users and {more.num_items} items are fewer than the fitted "
                f"{users} and {items}: new ids come after the known ones"
            )
        matrix = more.csr()
        new_users = _majority(matrix[users:, :items], self.item_clusters_, self._rows_of[0])
        new_items = _majority(
            matrix[:users, items:].T.tocsr(), self.user_clusters_, self._rows_of[1]
        )
        found = copy.copy(self)
        found.user_clusters_ = np.concatenate([self.user_clusters_, new_users])
        found.item_clusters_ = np.concatenate([self.item_clusters_, new_items])
        found.users_ = found._side(0, found.user_clusters_)
        found.items_ = found._side(1, found.item_clusters_)
        return found

    def _check(self) -> None:
        if (self.budget is None) == (self.resolution is None):
            raise RecommendError(f"{type(self).__name__} needs either budget or resolution")
        if self.budget is not None:
            check_budget(self.budget)

    def _assign(self, interactions: Interactions) -> tuple[RowAssignment, RowAssignment]:
        matrix = interactions.csr()
        users, items = self._clusters(interactions, matrix)
        self.user_clusters_, self.item_clusters_ = users, items
        count = int(max(users.max(), items.max())) + 1
        self._rows_of = _numbered(users, count), _numbered(items, count)
        inside = matrix[users >= 0][:, items >= 0]
        self.modularity_ = modularity(inside, users[users >= 0], items[items >= 0])
        return self._side(0, users), self._side(1, items)

    def _clusters(
        self, interactions: Interactions, matrix: sparse.csr_array
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cluster of each user and item; -1 for one that is folded by modulo."""
        users, items = matrix.shape
        if self.budget == 1:
            self.resolution_ = float("inf")
            return np.arange(users), users + np.arange(items)
        linked = interactions.user_degree > 0, interactions.popularity() > 0
        isolated = users + items - int(sum(side.sum() for side in linked))
        if isolated and not self.merge_isolated:
            warnings.warn(
                f"{isolated} ids have no interaction and take up a row each; "
                f"merge_isolated=True lets them share",
                stacklevel=5,
            )
            linked = np.ones(users, bool), np.ones(items, bool)
        found = self._clustering(matrix[linked[0]][:, linked[1]], users + items)
        self.resolution_ = found.resolution
        all_users, all_items = np.full(users, -1, np.int64), np.full(items, -1, np.int64)
        all_users[linked[0]], all_items[linked[1]] = found.users, found.items
        return all_users, all_items

    def _clustering(self, matrix: sparse.csr_array, ids: int) -> Clustering:
        order: dict[str, Any] = {"shuffle": self.shuffle, "seed": self.seed}
        if self.resolution is not None:
            return louvain(matrix, self.resolution, **order)
        assert self.budget is not None
        return resolution_for(matrix, self.budget, ids=ids, **order)

    def _side(self, side: int, clusters: NDArray[np.int64]) -> RowAssignment:
        """Rows of the users (side 0) or items (side 1) by their clusters."""
        rows_of = self._rows_of[side]
        count = int(rows_of.max()) + 1
        rows = np.where(clusters >= 0, rows_of[clusters], -1)
        without = np.flatnonzero(rows < 0)
        rows[without] = modulo_rows(len(rows), count)[without]
        return RowAssignment.single(rows, count)


@dataclass(eq=False, repr=False)
class DoubleGraphHash(GraphHash):
    """A cluster's row plus a universal hash's row of the same table.

    Ids of one cluster are told apart, at no more rows.
    """

    def _side(self, side: int, clusters: NDArray[np.int64]) -> RowAssignment:
        single = super()._side(side, clusters)
        # A generator of its own for each side: the hash of an id does not depend on how many
        # ids there are.
        generator = np.random.default_rng([self.seed, side])
        hashed = universal_hash(len(clusters), single.num_rows, generator)
        return RowAssignment(np.column_stack([hashed, single.rows]), single.num_rows)


def _numbered(clusters: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Row of each cluster on one side [count], -1 if it has no member there."""
    present = np.unique(clusters[clusters >= 0])
    rows = np.full(count, -1, np.int64)
    rows[present] = np.arange(len(present))
    return rows


def _majority(
    neighbours: sparse.csr_array, clusters: NDArray[np.int64], rows_of: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The commonest cluster among each row's ``neighbours`` [new, fitted] that has a table row.

    -1 for none. Clusters are numbered by falling size: the lowest number wins a tie.
    """
    counts = (clusters >= 0) & (rows_of[clusters] >= 0)
    members = sparse.csr_array(
        (np.ones(int(counts.sum())), (np.flatnonzero(counts), clusters[counts])),
        shape=(len(clusters), len(rows_of)),
    )
    return largest_of_rows(neighbours @ members)
