"""One step of many random walks at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anabranch.graphs.graph import Graph


class Walker:
    """Moves walkers along edges chosen with probability proportional to their weights."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._degree = graph.out_degree
        self._reach = None
        if graph.weights is not None:
            self._reach = np.concatenate([[0.0], np.cumsum(graph.weights, dtype=np.float64)])

    def step(self, nodes: NDArray[np.int32], generator: np.random.Generator) -> NDArray[np.int32]:
        """The next node of each walker [w]; -1 where a node has no out-edge. One draw a walker."""
        draws = generator.random(len(nodes))
        first, degree = self._graph.indptr[nodes], self._degree[nodes]
        if self._reach is None:
            entry = first + (draws * degree).astype(np.int64)
        else:
            low, high = self._reach[first], self._reach[first + degree]
            entry = np.searchsorted(self._reach, low + draws * (high - low), side="right") - 1
        # Rounding must not lead into a neighbouring row.
        entry = np.clip(entry, first, np.maximum(first + degree - 1, first))
        moved = degree > 0
        if moved.all():
            return self._graph.indices[entry]
        after = np.full(len(nodes), -1, np.int32)
        after[moved] = self._graph.indices[entry[moved]]
        return after


def random_walks(
    graph: Graph, starts: NDArray[np.int32], length: int, seed: int
) -> NDArray[np.int32]:
    """Walks [starts, length] of ``length`` nodes; -1 after a node without out-edges."""
    walker, generator = Walker(graph), np.random.default_rng(seed)
    walks = np.full((len(starts), length), -1, np.int32)
    walks[:, 0] = starts
    for position in range(1, length):
        alive = walks[:, position - 1] >= 0
        walks[alive, position] = walker.step(walks[alive, position - 1], generator)
    return walks
