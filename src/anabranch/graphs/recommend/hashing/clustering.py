"""Clusters of users and items together, by modularity.

Barber, "Modularity and community detection in bipartite networks" (Physical Review E 76, 2007).
Its null model only has edges between the sides; ordinary modularity of the same graph would count
pairs of users, which cannot be linked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.errors import MissingExtra
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.models.progress import Progress, silent

LOWEST, HIGHEST, STEPS = 0.1, 1e4, 20
"""Resolutions that :func:`resolution_for` searches, and how often it halves that range."""
TOLERANCE = 1e-3
"""Louvain moves on while a round gains this much modularity."""


@dataclass(frozen=True, eq=False)
class Clustering:
    """``users`` [users] and ``items`` [items] are cluster numbers; the largest cluster is 0.

    One numbering for both sides: a cluster may have members on one of them only.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    resolution: float

    @property
    def num_rows(self) -> int:
        """Rows of the two tables with one row for each cluster that has members on the side."""
        return len(np.unique(self.users)) + len(np.unique(self.items))


def modularity(
    matrix: Any, users: NDArray[Any], items: NDArray[Any], resolution: float = 1.0
) -> float:
    """Barber's modularity of clusters ``users`` [users] and ``items`` [items].

    ``matrix`` [users, items] sparse with m the sum of its entries:
    (1/m) * sum over pairs (u, i) of one cluster of (matrix_ui - resolution * k_u * d_i / m).
    0 for a matrix without entries.
    """
    block = sparse.coo_array(matrix).astype(np.float64)
    total = float(block.data.sum())
    if not total:
        return 0.0
    row, column = block.coords
    inside = float(block.data[users[row] == items[column]].sum())
    clusters = int(max(users.max(), items.max())) + 1
    of_users = np.bincount(users, np.bincount(row, block.data, len(users)), clusters)
    of_items = np.bincount(items, np.bincount(column, block.data, len(items)), clusters)
    return inside / total - resolution * float(of_users @ of_items) / total**2


def louvain(
    matrix: Any, resolution: float = 1.0, *, shuffle: bool = False, seed: int = 0
) -> Clustering:
    """Clusters that :func:`modularity` is large for, by moving one node at a time (Louvain).

    Blondel et al., "Fast unfolding of communities in large networks" (2008), by scikit-network on
    the graph of edges from users to items, whose directed modularity is Barber's. Nodes are visited
    in their order unless ``shuffle``; a node without edges is a cluster of its own.
    """
    try:
        from sknetwork.clustering import Louvain
    except ImportError:
        raise MissingExtra("scikit-network", "graphs") from None
    if not (math.isfinite(resolution) and resolution > 0):
        raise RecommendError(f"resolution = {resolution}: a positive number is needed")
    block = sparse.csr_matrix(matrix)
    if not block.nnz:
        raise RecommendError("no interactions: there is nothing to cluster")
    found = Louvain(
        resolution,
        tol_optimization=TOLERANCE,
        tol_aggregation=TOLERANCE,
        shuffle_nodes=shuffle,
        sort_clusters=False,
        return_probs=False,
        return_aggregate=False,
        random_state=seed,
    ).fit(block, force_bipartite=True)
    labels = _by_size(np.concatenate([found.labels_row_, found.labels_col_]))
    return Clustering(labels[: block.shape[0]], labels[block.shape[0] :], resolution)


def resolution_for(
    matrix: Any,
    budget: float,
    *,
    ids: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Clustering:
    """The finest clustering that needs at most ``budget`` of one row for each user and item.

    ``ids`` is what the budget is a share of, if not the users and items of ``matrix``.

    Bisection on the logarithm of the resolution. The number of clusters does not grow with every
    step, so that the best feasible clustering seen is kept. :class:`RecommendError` with the
    smallest size seen where none is.
    """
    ids = ids or sum(matrix.shape)
    most = math.floor(budget * ids + 1e-9)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    best: Clustering | None = None
    smallest = ids
    for step in range(STEPS):
        middle = (low + high) / 2
        progress(f"clustering at resolution {math.exp(middle):.3g}", step / STEPS)
        found = louvain(matrix, math.exp(middle), shuffle=shuffle, seed=seed)
        size = found.num_rows
        smallest = min(smallest, size)
        if size <= most and (best is None or size > best.num_rows):
            best = found
        if size == most:
            break
        low, high = (middle, high) if size < most else (low, middle)
    if best is None:
        raise RecommendError(
            f"budget = {budget} allows {most} rows for {ids} ids, but the fewest clusters found "
            f"need {smallest}: ask for a budget of at least {math.ceil(smallest / ids * 1e4) / 1e4}"
            f", or fold ids without interactions with merge_isolated=True"
        )
    return best


def _by_size(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Clusters numbered by falling size, equal ones by their first member."""
    _, first, numbers, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[numbers]
