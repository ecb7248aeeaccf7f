"""Random graphs with known structure, for claims, benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anabranch.graphs.graph import Graph


@dataclass(frozen=True)
class LabelledGraph:
    """``labels`` [nodes, labels]: which communities a node belongs to."""

    graph: Graph
    labels: NDArray[np.bool_]


def planted_communities(
    nodes: int,
    edges: int,
    communities: int,
    *,
    inside: float = 0.5,
    spread: float = 1.0,
    seed: int = 0,
) -> LabelledGraph:
    """An undirected graph of overlapping communities with unequal degrees.

    A node belongs to one community, with probability 0.3 to a second one. An edge is drawn within
    a random community with probability ``inside``, between any two nodes otherwise; nodes are
    chosen with probability proportional to an activity that is log-normal with ``spread``.
    Duplicates are merged and self-loops left out, so that there are somewhat fewer than ``edges``.
    """
    generator = np.random.default_rng(seed)
    activity = generator.lognormal(0.0, spread, nodes)
    labels = np.zeros((nodes, communities), bool)
    labels[np.arange(nodes), generator.integers(communities, size=nodes)] = True
    second = np.flatnonzero(generator.random(nodes) < 0.3)
    labels[second, generator.integers(communities, size=len(second))] = True

    drawn = generator.random(edges) < inside
    pairs = [_draw(np.arange(nodes), activity, 2 * int((~drawn).sum()), generator)]
    members = [np.flatnonzero(labels[:, c]) for c in range(communities)]
    sizes = np.array([activity[m].sum() for m in members])
    counts = generator.multinomial(int(drawn.sum()), sizes / sizes.sum())
    pairs += [
        _draw(m, activity[m], 2 * int(count), generator)
        for m, count in zip(members, counts, strict=True)
    ]
    ends = np.concatenate(pairs).reshape(-1, 2)
    ends = ends[ends[:, 0] != ends[:, 1]]
    return LabelledGraph(Graph.from_edges(ends, num_nodes=nodes), labels)


def _draw(
    nodes: NDArray[np.int64],
    activity: NDArray[np.float64],
    count: int,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    reach = np.cumsum(activity)
    if not count:
        return np.empty(0, np.int64)
    return nodes[np.searchsorted(reach, generator.random(count) * reach[-1], side="right")]
