"""The graph that every algorithm here works on: compressed sparse rows, checked once, immutable.

Knows nothing about files or other libraries' graphs (``convert``, ``read``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from anabranch.graphs.errors import GraphError

Duplicates = Literal["sum", "once"]

MOST_NODES = 2**31 - 1
"""Neighbours are stored as 32-bit numbers."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes 0..n-1 and their out-neighbours.

    ``indptr`` int64 [n + 1] and ``indices`` int32 [entries], increasing within a row; ``weights``
    float32 [entries], all positive and finite, or None if every edge weighs 1. An undirected graph
    stores each edge in both rows and a self-loop once. ``ids`` [n] are the nodes' names outside
    (integers or strings), None if they are the row numbers. ``left`` is set on a bipartite graph:
    nodes below it are the one side, the others the other.

    Rules of the constructors: an edge of weight 0 is no edge; a self-loop is kept; a node without
    edges is kept; a graph without nodes is legal. Duplicates are summed (``"sum"``, the default
    where weights are given) or kept once (``"once"``, the first weight; the default without
    weights); in an undirected edge list (a, b) and (b, a) are duplicates. Everything else that is
    no graph raises :class:`GraphError` with the row or position of the fault.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    weights: NDArray[np.float32] | None
    directed: bool
    ids: NDArray[Any] | None = None
    left: int | None = None

    def __post_init__(self) -> None:
        for name, dtype in (("indptr", np.int64), ("indices", np.int32), ("weights", np.float32)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _read_only(np.asarray(value, dtype)))
        if self.ids is not None:
            object.__setattr__(self, "ids", _checked_ids(self.ids, self.num_nodes))
        entries = len(self.indices)
        if len(self.indptr) == 0 or self.indptr[0] != 0 or self.indptr[-1] != entries:
            raise GraphError(f"indptr must run from 0 to the {entries} entries of indices")
        if np.any(np.diff(self.indptr) < 0):
            raise GraphError("indptr decreases")
        if entries and not 0 <= self.indices.min() <= self.indices.max() < self.num_nodes:
            raise GraphError(f"indices name nodes outside 0..{self.num_nodes - 1}")
        if self.weights is not None:
            if len(self.weights) != entries:
                raise GraphError(f"{len(self.weights)} weights for {entries} entries")
            _refuse_bad_weights(self.weights, "entry")
        if self.left is not None and not 0 <= self.left <= self.num_nodes:
            raise GraphError(f"left = {self.left} of {self.num_nodes} nodes")

    @classmethod
    def from_edges(
        cls,
        pairs: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        num_nodes: int | None = None,
        directed: bool = False,
        duplicates: Duplicates | None = None,
        ids: ArrayLike | None = None,
        relabel: bool = False,
    ) -> Graph:
        """A graph from ``pairs`` [m, 2], or [m, 3] with the weight last.

        Pairs name row numbers, 0..``num_nodes`` - 1 (default: up to the largest seen). With ``ids``
        they name those instead; with ``relabel`` they are names, and the rows are the distinct
        ones in sorted order.
        """
        ends, weights = _split(np.asarray(pairs), weights)
        if relabel:
            if ids is not None or num_nodes is not None:
                raise GraphError("relabel finds the nodes itself: pass neither ids nor num_nodes")
            ids, ends = np.unique(ends, return_inverse=True)
            ends = ends.reshape(-1, 2)
        elif ids is not None:
            names = _checked_ids(np.asarray(ids), num_nodes)
            ids, ends = names, _positions(names, ends)
        ends = _whole(ends)
        names_count = None if ids is None else len(np.asarray(ids))
        num_nodes = _node_count(ends, num_nodes if names_count is None else names_count)
        if duplicates not in (None, "sum", "once"):
            raise GraphError(f"duplicates={duplicates!r}: choose 'sum' or 'once'")
        once = duplicates == "once" or (duplicates is None and weights is None)
        matrix = _assemble(ends, weights, num_nodes, directed, once)
        return cls._of_matrix(matrix, directed, ids=ids)

    @classmethod
    def from_matrix(
        cls, matrix: Any, *, directed: bool | None = None, ids: ArrayLike | None = None
    ) -> Graph:
        """A graph from an adjacency matrix [n, n], dense or SciPy sparse; entry (i, j) is i -> j.

        ``directed`` None: undirected if the matrix is symmetric.
        """
        matrix = _checked_matrix(matrix)
        rows, columns = matrix.shape
        if rows != columns:
            raise GraphError(
                f"a matrix of shape ({rows}, {columns}) is no adjacency matrix, whose rows and "
                f"columns are the same nodes; for two kinds of nodes use Graph.bipartite"
            )
        if directed is not True:
            symmetric = (matrix != matrix.T).nnz == 0
            if directed is False and not symmetric:
                raise GraphError("directed=False, but the matrix is not symmetric")
            directed = not symmetric
        return cls._of_matrix(matrix, directed, ids=None if ids is None else np.asarray(ids))

    @classmethod
    def bipartite(cls, matrix: Any) -> Graph:
        """An undirected graph of rows and columns of ``matrix`` [left, right], left nodes first."""
        block = _checked_matrix(matrix)
        joined = sparse.block_array([[None, block], [block.T, None]], format="csr")
        if 0 in block.shape:
            joined = sparse.csr_array((sum(block.shape),) * 2, dtype=np.float32)
        return cls._of_matrix(joined, directed=False, left=block.shape[0])

    @classmethod
    def _of_matrix(cls, matrix: Any, directed: bool, **fields: Any) -> Graph:
        matrix.eliminate_zeros()
        matrix.sort_indices()
        data = matrix.data.astype(np.float32, copy=False)
        if not np.all(np.isfinite(data)):
            raise GraphError("the summed weight of duplicate edges is larger than float32 holds")
        weights = None if np.all(data == 1) else data
        return cls(matrix.indptr, matrix.indices, weights, directed, **fields)

    @property
    def num_nodes(self) -> int:
        """n, with nodes that have no edges."""
        return len(self.indptr) - 1

    @property
    def num_entries(self) -> int:
        """Stored entries: an undirected edge counts twice, a self-loop once."""
        return len(self.indices)

    @property
    def num_edges(self) -> int:
        """Edges: an undirected one counts once."""
        if self.directed:
            return self.num_entries
        rows = np.repeat(np.arange(self.num_nodes, dtype=np.int32), self.out_degree)
        return (self.num_entries + int(np.count_nonzero(rows == self.indices))) // 2

    @property
    def out_degree(self) -> NDArray[np.int64]:
        """Out-neighbours of each node [n]."""
        return np.diff(self.indptr)

    @property
    def strength(self) -> NDArray[np.float64]:
        """Sum of the weights of each node's out-edges [n]; the out-degree without weights."""
        return _row_sums(self.indptr, self.weights)

    def adjacency(self) -> sparse.csr_array:
        """The adjacency matrix [n, n] in float32; shares what it can with the graph."""
        data = np.ones(self.num_entries, np.float32) if self.weights is None else self.weights
        return self._matrix(data)

    def transition(self) -> sparse.csr_array:
        """The random walk's matrix D^-1 A [n, n] in float32; a row without edges stays zero."""
        return self._matrix(walk_probabilities(self.indptr, self.weights))

    def transpose(self) -> Graph:
        """The graph with every edge turned round; itself if undirected."""
        if not self.directed:
            return self
        return Graph._of_matrix(self.adjacency().T.tocsr(), True, ids=self.ids, left=self.left)

    def biadjacency(self) -> sparse.csr_array:
        """The matrix [left, right] that :meth:`bipartite` took."""
        if self.left is None:
            raise GraphError("the graph was not made by Graph.bipartite: it has no two sides")
        return self.adjacency()[: self.left, self.left :]

    def positions(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Row numbers of nodes by their names; :class:`GraphError` names the first unknown one."""
        wanted = np.asarray(ids)
        if self.ids is not None:
            return _positions(self.ids, wanted)
        wanted = _whole(wanted)
        outside = (wanted < 0) | (wanted >= self.num_nodes)
        if outside.any():
            raise GraphError(_unknown(wanted[outside].flat[0], f"0..{self.num_nodes - 1}"))
        return wanted

    def fingerprint(self) -> str:
        """A digest of everything above: equal graphs have equal ones, on any machine."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.num_nodes} {self.num_entries} {self.directed} {self.left}".encode())
        for part in (self.indptr, self.indices, self.weights):
            digest.update(b"-" if part is None else np.ascontiguousarray(part).data)
        if self.ids is not None:
            digest.update("\n".join(map(str, self.ids.tolist())).encode())
        return digest.hexdigest()

    def _matrix(self, data: NDArray[np.float32]) -> sparse.csr_array:
        # SciPy wants both index arrays of one type: narrow the short one, never the long one.
        narrow = self.num_entries <= np.iinfo(np.int32).max
        indptr = self.indptr.astype(np.int32) if narrow else self.indptr
        matrix = sparse.csr_array((data, self.indices, indptr), shape=(self.num_nodes,) * 2)
        matrix.has_canonical_format = True
        return matrix


def walk_probabilities(
    indptr: NDArray[Any], weights: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Each entry's weight over the sum of its row [entries]."""
    sums = _row_sums(indptr, weights)
    inverse = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
    spread = np.repeat(inverse.astype(np.float32), np.diff(indptr))
    return spread if weights is None else spread * weights


def _row_sums(indptr: NDArray[Any], weights: NDArray[np.float32] | None) -> NDArray[np.float64]:
    if weights is None:
        return np.diff(indptr).astype(np.float64)
    # The appended zero lets rows at the end be empty; reduceat gives an empty row the next entry.
    padded = np.append(weights.astype(np.float64), 0.0)
    return np.add.reduceat(padded, indptr[:-1]) * (np.diff(indptr) > 0)


def _split(
    pairs: NDArray[Any], weights: ArrayLike | None
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """The ends [m, 2] and the weights [m] of an edge list."""
    if pairs.size == 0:
        pairs = np.empty((0, 2), np.int64)
    if pairs.ndim != 2 or pairs.shape[1] not in (2, 3):
        raise GraphError(f"an edge list has the shape [m, 2] or [m, 3], not {list(pairs.shape)}")
    ends = pairs[:, :2]
    if pairs.shape[1] == 3:
        if weights is not None:
            raise GraphError("weights are given twice: as an argument and as the third column")
        weights = pairs[:, 2]
    if weights is None:
        return ends, None
    try:
        weights = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise GraphError(f"a weight is no number: {error}") from None
    if weights.shape != (len(ends),):
        raise GraphError(f"weights of shape {list(weights.shape)} for {len(ends)} edges")
    _refuse_bad_weights(weights, "edge")
    return ends, weights.astype(np.float32)


def _whole(numbers: NDArray[Any]) -> NDArray[np.int64]:
    """Node numbers as integers; [m, 3] arrays bring them as floats."""
    if numbers.dtype.kind not in "iuf":
        raise GraphError(
            f"nodes are named by {numbers.dtype} values where row numbers are expected; "
            f"pass relabel=True to let them be names"
        )
    if numbers.dtype.kind == "f":
        broken = ~(np.isfinite(numbers) & (numbers == np.floor(numbers)))
        if broken.any():
            at = int(np.argwhere(broken)[0][0])
            raise GraphError(f"edge {at}: {numbers[broken].flat[0]} is no node number")
    return numbers.astype(np.int64, copy=False)


def _node_count(ends: NDArray[np.int64], num_nodes: int | None) -> int:
    largest = int(ends.max(initial=-1))
    count = largest + 1 if num_nodes is None else num_nodes
    if count < 0:
        raise GraphError(f"num_nodes = {num_nodes} is negative")
    if count > MOST_NODES:
        raise GraphError(
            f"{count} nodes are more than {MOST_NODES}; if the ids are sparse names, relabel=True"
        )
    outside = ((ends < 0) | (ends >= count)).any(axis=1)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise GraphError(f"edge {at}: {ends[at].tolist()} names a node outside 0..{count - 1}")
    return count


def _assemble(
    ends: NDArray[np.int64],
    weights: NDArray[np.float32] | None,
    num_nodes: int,
    directed: bool,
    once: bool,
) -> Any:
    """The adjacency matrix with duplicates merged."""
    source, target = ends[:, 0].astype(np.int32), ends[:, 1].astype(np.int32)
    if not directed:
        # Both directions of an edge meet in the upper triangle.
        source, target = np.minimum(source, target), np.maximum(source, target)
    if once and weights is not None:
        _, first = np.unique(source.astype(np.int64) * num_nodes + target, return_index=True)
        source, target, weights = source[first], target[first], weights[first]
    data = np.ones(len(source), np.float32) if weights is None else weights
    matrix = sparse.coo_array((data, (source, target)), shape=(num_nodes,) * 2).tocsr()
    if once:
        matrix.data = np.minimum(matrix.data, 1) if weights is None else matrix.data
    if directed:
        return matrix
    return (matrix + sparse.triu(matrix, k=1).T).tocsr()


def _checked_matrix(matrix: Any) -> Any:
    """A fresh canonical CSR matrix in float32 with finite entries that are not negative."""
    if not sparse.issparse(matrix):
        matrix = np.asarray(matrix)
        if matrix.ndim != 2:
            raise GraphError(f"a matrix has two dimensions, not {matrix.ndim}")
    if matrix.dtype.kind not in "biuf":
        raise GraphError(f"a matrix of {matrix.dtype} values is no adjacency matrix")
    if max(matrix.shape) > MOST_NODES:
        raise GraphError(f"{max(matrix.shape)} nodes are more than {MOST_NODES}")
    found = sparse.coo_array(matrix)
    if (bad := _first_bad(found.data)) is not None:
        row, column = (int(axis[bad]) for axis in found.coords)
        raise GraphError(_fault(f"entry ({row}, {column})", found.data[bad]))
    return found.astype(np.float32).tocsr(copy=True)


def _refuse_bad_weights(weights: NDArray[Any], what: str) -> None:
    if (bad := _first_bad(weights)) is not None:
        raise GraphError(_fault(f"{what} {bad}", weights[bad]))


def _first_bad(weights: NDArray[Any]) -> int | None:
    """Position of the first weight that is negative, NaN or infinite."""
    if weights.dtype.kind in "bu":
        return None
    largest = np.finfo(np.float32).max
    bad = ~((weights >= 0) & (weights <= largest))
    return int(np.argmax(bad)) if bad.any() else None


def _fault(where: str, weight: Any) -> str:
    if np.isnan(weight):
        return f"{where} has the weight NaN"
    if weight < 0:
        return f"Negative values in data: {where} has the weight {weight}"
    return f"{where} has the weight {weight}, infinity or too large for float32"


def _checked_ids(ids: NDArray[Any], num_nodes: int | None) -> NDArray[Any]:
    ids = np.asarray(ids)
    if ids.dtype.kind == "O" and all(isinstance(name, str) for name in ids):
        ids = ids.astype(str)
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise GraphError(f"ids are a list of integers or strings, not {ids.dtype} {ids.shape}")
    if num_nodes is not None and len(ids) != num_nodes:
        raise GraphError(f"{len(ids)} ids for {num_nodes} nodes")
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise GraphError(f"the id {values[counts > 1][0].item()!r} is given to more than one node")
    return _read_only(ids)


def _positions(ids: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Where each wanted name stands among ``ids``."""
    if wanted.size and (wanted.dtype.kind == "U") != (ids.dtype.kind == "U"):
        raise GraphError(f"nodes are named by {ids.dtype} ids, not by {wanted.dtype} values")
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids, wanted, sorter=order)
    found = order[np.minimum(at, len(ids) - 1)] if len(ids) else np.zeros(wanted.shape, np.int64)
    unknown = ids[found] != wanted if len(ids) else np.ones(wanted.shape, bool)
    if unknown.any():
        raise GraphError(_unknown(wanted[unknown].flat[0], f"the {len(ids)} ids of the graph"))
    return found


def _unknown(name: Any, known: str) -> str:
    name = name.item() if isinstance(name, np.generic) else name
    return f"no node {name!r} in {known}"


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    """The same memory; the caller's own array stays writable."""
    view = values.view()
    view.flags.writeable = False
    return view
