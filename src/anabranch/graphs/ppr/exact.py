"""Exact personalised PageRank: the reference, and the baseline of the claims."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from anabranch.graphs.errors import GraphError
from anabranch.graphs.graph import Graph

RESTART = 0.15


def exact_ppr(
    graph: Graph, sources: ArrayLike, restart: float = RESTART, tolerance: float = 1e-9
) -> NDArray[np.float64]:
    """Scores [sources, n] by power iteration, each row within ``tolerance`` in L1.

    A walk from the source stops at each node with probability ``restart`` and moves on otherwise;
    a score is the probability of stopping at a node. At a node without out-edges a walk that does
    not stop starts again at its source. ``sources`` are row numbers.
    """
    check_restart(restart)
    rows = np.asarray(sources, np.int64)
    push = Push(graph, restart, np.float64)
    rounds = int(np.ceil(np.log(tolerance / 2) / np.log(1 - restart)))
    return push.scores(rows, rounds).T.astype(np.float64, copy=False)


class Push:
    """Power iteration on a graph whose matrix is prepared once."""

    def __init__(self, graph: Graph, restart: float, dtype: type[np.floating] = np.float32) -> None:
        walk = graph.adjacency().astype(np.float64)
        strength = graph.strength
        inverse = np.divide(1 - restart, strength, out=np.zeros_like(strength), where=strength > 0)
        walk.data *= np.repeat(inverse, graph.out_degree)
        # Rows of the transpose are in-edges: the product gathers, and needs no scattered writes.
        self._onward = sparse.csr_array(walk.T.tocsr(), dtype=dtype)
        self._restart = restart
        self._dtype = dtype

    def scores(self, sources: NDArray[np.int64], rounds: int) -> NDArray[np.floating]:
        """Scores [n, sources] after ``rounds`` pushes; what has not stopped by then is spread
        in proportion, which is also what starting again at the source amounts to."""
        flow = np.zeros((self._onward.shape[0], len(sources)), self._dtype)
        flow[sources, np.arange(len(sources))] = 1
        if len(sources) == 1:
            flow = flow[:, 0]  # SciPy is faster on a plain vector
        total = flow.copy()
        for _ in range(rounds):
            flow = self._onward @ flow
            total += flow
        return (total / total.sum(axis=0)).reshape(len(total), len(sources))


def check_restart(restart: float) -> None:
    """Refuse what is no probability of stopping."""
    if not 0 < restart < 1:
        raise GraphError(f"restart = {restart}: a walk must stop with a probability in (0, 1)")
