"""Mass of many sources on the nodes of a graph, and one step of spreading it.

Knows nothing of PageRank: ``spread`` is a product of sparse matrices that shares the work of the
rows which several sources reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

DENSE_GAIN = 8
"""So many times faster is a multiplication on a dense row of sources than on single entries."""


@dataclass(frozen=True, eq=False)
class Masses:
    """Positive masses [sources, nodes] in compressed sparse rows, nodes rising within a source."""

    num_nodes: int
    indptr: NDArray[Any]
    nodes: NDArray[np.int32]
    mass: NDArray[np.float32]

    @classmethod
    def at(cls, nodes: NDArray[np.int64], num_nodes: int) -> Masses:
        """Mass 1 of each source at its node."""
        count = len(nodes)
        ones = np.ones(count, np.float32)
        return cls(num_nodes, np.arange(count + 1), nodes.astype(np.int32), ones)

    @property
    def sources(self) -> int:
        """Rows."""
        return len(self.indptr) - 1

    @property
    def owner(self) -> NDArray[np.int64]:
        """The source of each entry."""
        return np.repeat(np.arange(self.sources), np.diff(self.indptr))

    def sums(self, weights: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """Sum of each source's masses, each times its entry of ``weights`` [entries] if given."""
        values = self.mass if weights is None else self.mass * weights
        sums = np.bincount(self.owner, weights=values, minlength=self.sources)
        return sums.astype(np.float64, copy=False)

    def with_mass(self, mass: NDArray[np.float32]) -> Masses:
        """The same places with other masses."""
        return Masses(self.num_nodes, self.indptr, self.nodes, mass)

    def where(self, kept: NDArray[np.bool_]) -> Masses:
        """Some of the entries."""
        counts = np.bincount(self.owner[kept], minlength=self.sources)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        return Masses(self.num_nodes, indptr, self.nodes[kept], self.mass[kept])


def added(parts: Sequence[Masses]) -> Masses:
    """The sum, entry by entry in the order of the parts."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    keys = np.concatenate([part.owner * part.num_nodes + part.nodes for part in parts])
    places, where = np.unique(keys, return_inverse=True)
    sums = np.bincount(where, weights=np.concatenate([part.mass for part in parts]))
    owner = places // first.num_nodes
    indptr = np.searchsorted(owner, np.arange(first.sources + 1))
    nodes = (places - owner * first.num_nodes).astype(np.int32)
    return Masses(first.num_nodes, indptr, nodes, sums.astype(np.float32))


def spread(flow: Masses, matrix: sparse.csr_array, plus: Masses | None = None) -> Masses:
    """``flow`` [sources, n] @ ``matrix`` [n, n] + ``plus``; only reached rows are touched.

    If the sources reached mostly the same rows, each row is loaded once and multiplied with all of
    their masses; otherwise the sources go one by one. Sums run over a source's nodes in rising
    order either way, so that a source's result does not depend on which others are in the batch.
    """
    if plus is None and np.array_equal(flow.indptr, np.arange(flow.sources + 1)):
        return _single_rows(flow, matrix)
    if flow.sources > 1:
        reached = np.zeros(flow.num_nodes, bool)
        reached[flow.nodes] = True
        rows = np.flatnonzero(reached)
        lengths = np.diff(matrix.indptr)
        separate = int(lengths[flow.nodes].sum())
        if int(lengths[rows].sum()) * flow.sources > DENSE_GAIN * separate:
            alone = [_slice(plus, i) if plus else None for i in range(flow.sources)]
            return _stacked([spread(_slice(flow, i), matrix, p) for i, p in enumerate(alone)])
        local = (np.cumsum(reached, dtype=np.int32) - 1)[flow.nodes]
    else:
        rows = flow.nodes.astype(np.int64)
        local = np.arange(len(rows), dtype=np.int32)
    part = matrix[rows]
    part.data = part.data.astype(np.float32, copy=False)
    mass = np.zeros((len(rows), flow.sources), np.float32)
    mass[local, flow.owner] = flow.mass
    dense = part.T @ mass  # [n, sources]
    if plus is not None:
        dense[plus.nodes, plus.owner] += plus.mass
    return _compressed(dense)


def _single_rows(flow: Masses, matrix: sparse.csr_array) -> Masses:
    """The product where every source is at one node: nothing is to be summed."""
    part = matrix[flow.nodes]
    mass = part.data.astype(np.float32) * np.repeat(flow.mass, np.diff(part.indptr))
    return Masses(flow.num_nodes, part.indptr, part.indices, mass)


def _slice(masses: Masses, source: int) -> Masses:
    start, stop = masses.indptr[source : source + 2]
    ends = np.array([0, stop - start])
    return Masses(masses.num_nodes, ends, masses.nodes[start:stop], masses.mass[start:stop])


def _stacked(rows: Sequence[Masses]) -> Masses:
    return Masses(
        rows[0].num_nodes,
        np.concatenate([[0], np.cumsum([len(row.nodes) for row in rows])]),
        np.concatenate([row.nodes for row in rows]),
        np.concatenate([row.mass for row in rows]),
    )


def _compressed(dense: NDArray[np.float32]) -> Masses:
    """The entries of [n, sources] that are not zero."""
    n, sources = dense.shape
    by_source = np.ascontiguousarray(dense.T)
    # NumPy finds what is not zero far faster among booleans than among floats.
    places = np.flatnonzero(by_source.ravel() != 0)
    indptr = np.searchsorted(places, np.arange(sources + 1) * n)
    nodes = places if sources == 1 else places % n
    return Masses(n, indptr, nodes.astype(np.int32), by_source.ravel()[places])
