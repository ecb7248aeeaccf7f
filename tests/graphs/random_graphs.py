"""Hypothesis strategies: small graphs of every kind."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from anabranch.graphs import Graph


@st.composite
def graphs(draw: st.DrawFn, most_nodes: int = 12, dangling: bool = True) -> Graph:
    """Directed or not, weighted or not, with self-loops, duplicates and isolated nodes."""
    n = draw(st.integers(1, most_nodes))
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))
    pairs = draw(st.lists(pair, max_size=4 * n))
    if not dangling:
        pairs += [(node, (node + 1) % n) for node in range(n)]
    weights = None
    if draw(st.booleans()):
        weight = st.floats(0.125, 8.0, width=32)
        weights = draw(st.lists(weight, min_size=len(pairs), max_size=len(pairs)))
    return Graph.from_edges(
        np.array(pairs, np.int64).reshape(-1, 2),
        weights,
        num_nodes=n,
        directed=draw(st.booleans()),
    )
