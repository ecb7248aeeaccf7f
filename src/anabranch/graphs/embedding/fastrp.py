"""FastRP: node embeddings as a weighted sum of randomly projected powers of the random walk.

Chen, Sultan, Tian, Chen and Skiena, "Fast and Accurate Network Embeddings via Very Sparse Random
Projection" (CIKM 2019).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from anabranch.errors import MissingExtra
from anabranch.graphs import saved
from anabranch.graphs.convert import as_graph
from anabranch.graphs.embedding.products import add_rows, multiply
from anabranch.graphs.embedding.projection import projection
from anabranch.graphs.errors import GraphError
from anabranch.graphs.graph import Graph, walk_probabilities

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError:
    raise MissingExtra("scikit-learn", "graphs") from None

_SPARSE_SHARE = 0.1
"""Projections with fewer entries than this are multiplied as sparse matrices."""


class FastRP(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Embeds nodes without training.

    With P = D^-1 A, L = diag((strength / total)^beta) and a very sparse random R [n, dim]:
    N_1 = P L R, N_k = P N_(k-1), and the embedding is the sum of ``weights[k-1]`` * N_k with every
    row of N_k scaled to length 1. Products go from right to left, so that nothing larger than
    [n, dim] is formed: time O(K * edges * dim), memory O(n * dim).

    When to use it: first features of large graphs, in seconds, for linear classifiers and
    neighbour search. Known problems: it knows nothing of node features; ``weights`` and ``beta``
    matter much and are worth :func:`~anabranch.graphs.embedding.tune`; the defaults are those
    that the authors tuned on BlogCatalog.

    Example::

        vectors = FastRP(dim=128).fit_transform(graph)  # float32 [n, 128]

    Parameters: ``weights`` of the powers 1, 2, ...; None concatenates them instead (dimension
    K * dim with K = 4). ``beta`` < 0 damps hubs. ``normalize`` scales the rows of each power.
    ``density`` is s, one entry in s of R is not zero; "sqrt" is sqrt(n). ``standardize`` gives each
    column mean 0 and variance 1, for linear classifiers; without it isolated nodes are zero rows.
    ``matrix`` "adjacency" puts A in the place of P. ``self_weight`` is the weight of a node's own
    random vector. ``both`` gives half of the columns to the edges' other direction. With
    ``keep_powers`` the fitted estimator can :meth:`transform` new nodes, for (K - 1) more arrays
    of [n, dim]. ``workers`` are threads; they change the time only.

    Fitted: ``embedding_`` float32 [n, columns], ``n_features_in_`` = n.
    """

    def __init__(
        self,
        dim: int = 128,
        *,
        weights: Sequence[float] | None = (0.0, 0.0, 1.0, 6.67),
        beta: float = -0.64,
        normalize: bool = True,
        density: float | Literal["sqrt"] = "sqrt",
        standardize: bool = True,
        matrix: Literal["transition", "adjacency"] = "transition",
        self_weight: float = 0.0,
        both: bool = False,
        keep_powers: bool = True,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        self.dim = dim
        self.weights = weights
        self.beta = beta
        self.normalize = normalize
        self.density = density
        self.standardize = standardize
        self.matrix = matrix
        self.self_weight = self_weight
        self.both = both
        self.keep_powers = keep_powers
        self.workers = workers
        self.seed = seed

    def fit(self, graph: Any, y: object = None) -> Self:
        """Embed the nodes of ``graph``, anything that :func:`~anabranch.graphs.as_graph` takes."""
        self._check()
        graph = self._graph(graph)
        powers: list[Any] = []
        if self.both:
            half = self.dim // 2
            parts = [self._embed(g, half, s, []) for s, g in enumerate((graph, graph.transpose()))]
            embedding = np.hstack(parts)
        else:
            embedding = self._embed(graph, self.dim, 0, powers)
        self.n_features_in_ = graph.num_nodes
        self.powers_ = powers if self.keep_powers else []
        self.mean_: NDArray[np.float32] | None = None
        self.scale_: NDArray[np.float32] | None = None
        if self.standardize:
            self.mean_, self.scale_ = _moments(embedding)
        self.embedding_ = self._standardised(embedding)
        return self

    def fit_transform(self, graph: Any, y: object = None) -> NDArray[np.float32]:
        """Embeddings [n, columns] of the graph's nodes."""
        return self.fit(graph).embedding_

    def transform(self, edges: Any) -> NDArray[np.float32]:
        """Embeddings [k, columns] of k new nodes from their edges [k, n] to the fitted nodes.

        The fitted graph's own adjacency matrix gives its embedding back. For new nodes it is an
        approximation, because the fitted nodes do not know them: fit again once they are more
        than about a twentieth. An edge's weight counts as in the graph.
        """
        check_is_fitted(self, "embedding_")
        if self.both or self.self_weight or not self.keep_powers:
            raise GraphError(
                "new nodes can only be embedded with both=False, self_weight=0 and "
                "keep_powers=True: fit again with them in the graph"
            )
        rows = _edges_of_new_nodes(self, edges)
        total = np.zeros((rows.shape[0], self.embedding_.shape[1]), np.float32)
        for k, power in enumerate(self.powers_):
            self._add(total, k, multiply(rows, power, self.workers))
        return self._standardised(total)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz`` file, whole or not at all."""
        check_is_fitted(self, "embedding_")
        arrays: dict[str, Any] = {"embedding": self.embedding_}
        if self.mean_ is not None:
            arrays |= {"mean": self.mean_, "scale": self.scale_}
        for k, power in enumerate(self.powers_):
            if sparse.issparse(power):
                arrays |= {f"power{k}.{name}": getattr(power, name) for name in _CSR}
            else:
                arrays[f"power{k}"] = power
        facts = {
            "format": _FORMAT,
            "parameters": self.get_params(),
            "powers": len(self.powers_),
            "nodes": self.n_features_in_,
        }
        saved.save(path, facts, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The estimator that :meth:`save` wrote."""
        facts, arrays = saved.load(path, "FastRP", _FORMAT)
        found = cls(**facts["parameters"])
        found.n_features_in_ = facts["nodes"]
        found.embedding_ = arrays["embedding"]
        found.mean_, found.scale_ = arrays.get("mean"), arrays.get("scale")
        found.powers_ = [_power(arrays, k, found) for k in range(facts["powers"])]
        return found

    @property
    def _n_features_out(self) -> int:
        return self.embedding_.shape[1]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        tags.input_tags.positive_only = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _check(self) -> None:
        """Refuse options that cannot work, before any work."""
        if not isinstance(self.dim, int | np.integer) or self.dim < 1:
            raise GraphError(f"dim = {self.dim!r}: the embedding needs at least one column")
        if self.both and self.dim % 2:
            raise GraphError(f"dim = {self.dim} with both=True: the two halves need an even number")
        if self.weights is not None:
            weights = list(self.weights)
            if not all(
                isinstance(w, int | float | np.number) and math.isfinite(w) for w in weights
            ):
                raise GraphError(f"weights = {weights}: not all are finite numbers")
            if not any(weights) and not self.self_weight:
                raise GraphError(f"weights = {weights}: at least one power must count")
        elif self.self_weight:
            raise GraphError("self_weight is a term of the sum; weights=None concatenates instead")
        for name in ("beta", "self_weight"):
            if not math.isfinite(getattr(self, name)):
                raise GraphError(f"{name} = {getattr(self, name)} is not finite")
        if self.beta > 0:
            warnings.warn(f"beta = {self.beta} > 0 favours hubs", stacklevel=3)
        if self.density != "sqrt" and not (
            isinstance(self.density, int | float) and 1 <= self.density < math.inf
        ):
            raise GraphError(f"density = {self.density!r}: pass 'sqrt' or a number of at least 1")
        if self.matrix not in ("transition", "adjacency"):
            raise GraphError(f"matrix = {self.matrix!r}: choose 'transition' or 'adjacency'")
        if not isinstance(self.workers, int) or self.workers < 1:
            raise GraphError(f"workers = {self.workers!r}: at least one thread must work")

    def _graph(self, graph: Any) -> Graph:
        if isinstance(graph, np.ndarray) or sparse.issparse(graph) or hasattr(graph, "columns"):
            # A matrix is an adjacency matrix here, as the tag `pairwise` says to scikit-learn.
            return Graph.from_matrix(_validated(self, graph, reset=True))
        return as_graph(graph)

    def _powers_wanted(self) -> int:
        """K: powers after the last weight that counts are not computed."""
        if self.weights is None:
            return CONCATENATED
        return max((k for k, weight in enumerate(self.weights, 1) if weight), default=0)

    def _embed(self, graph: Graph, dim: int, stream: int, kept: list[Any]) -> NDArray[np.float32]:
        """The embedding before standardisation; appends the powers 0..K-1 to ``kept``."""
        n = graph.num_nodes
        sparsity = max(1.0, math.sqrt(n)) if self.density == "sqrt" else float(self.density)
        ids = n if graph.ids is None else graph.ids
        start = projection(ids, dim, sparsity, self.seed, stream)
        wanted = self._powers_wanted()
        total = np.zeros((n, dim * (wanted if self.weights is None else 1)), np.float32)
        if self.self_weight:
            add_rows(total, start, self.self_weight, self.normalize)
        matrix = graph.transition() if self.matrix == "transition" else graph.adjacency()
        power: Any = _scaled(start, graph.strength, self.beta)
        if start.nnz > _SPARSE_SHARE * n * dim:
            power = power.toarray()
        for k in range(wanted):
            if self.keep_powers:
                kept.append(power)
            power = multiply(matrix, power, self.workers)
            self._add(total, k, power)
        return total

    def _add(self, total: NDArray[np.float32], k: int, power: NDArray[np.float32]) -> None:
        """Let power k + 1 count."""
        if self.weights is None:
            dim = power.shape[1]
            add_rows(total[:, k * dim : (k + 1) * dim], power, 1.0, self.normalize)
        elif self.weights[k]:
            add_rows(total, power, self.weights[k], self.normalize)

    def _standardised(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.mean_ is not None and self.scale_ is not None:
            embedding -= self.mean_
            embedding /= self.scale_
        return embedding


CONCATENATED = 4
"""Powers that are concatenated without weights."""
_FORMAT = 1
_CSR = ("data", "indices", "indptr")


def _scaled(start: sparse.csr_array, strength: NDArray[np.float64], beta: float) -> Any:
    """L R: row i times (strength_i / total)^beta; rows without edges are never multiplied."""
    share = strength / max(strength.sum(), 1.0)
    factor = np.power(share, beta, out=np.zeros_like(share), where=share > 0)
    return sparse.csr_array(
        (
            start.data * np.repeat(factor, np.diff(start.indptr)).astype(np.float32),
            start.indices,
            start.indptr,
        ),
        shape=start.shape,
    )


def _moments(embedding: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each column; a constant column is divided by 1."""
    columns = embedding.shape[1]
    if not len(embedding):
        return np.zeros(columns, np.float32), np.ones(columns, np.float32)
    mean = embedding.mean(axis=0, dtype=np.float64)
    squares = np.zeros(columns)
    for start in range(0, len(embedding), 2**15):
        part = embedding[start : start + 2**15] - mean
        squares += np.einsum("ij,ij->j", part, part)
    scale = np.sqrt(squares / len(embedding))
    # What rounding leaves of a constant column is no variance.
    scale[scale <= 1e-6 * np.abs(mean)] = 1.0
    scale[scale == 0] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def _edges_of_new_nodes(estimator: FastRP, edges: Any) -> sparse.csr_array:
    """Rows of the walk's matrix, checked as a graph's are."""
    if isinstance(edges, Graph):
        edges = edges.adjacency()
    given = _validated(estimator, edges, reset=False)
    matrix = sparse.csr_array(given, dtype=np.float32, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    bad = ~(np.isfinite(matrix.data) & (matrix.data > 0))
    if bad.any():
        raise GraphError(f"Negative values in data: an edge has the weight {matrix.data[bad][0]}")
    if estimator.matrix == "transition":
        matrix.data = walk_probabilities(matrix.indptr, matrix.data)
    return matrix


def _validated(estimator: FastRP, matrix: Any, *, reset: bool) -> Any:
    """scikit-learn's checks of a matrix: shape, finite numbers, names of columns."""
    try:
        return validate_data(
            estimator,
            matrix,
            reset=reset,
            accept_sparse=True,
            accept_large_sparse=True,
            ensure_min_samples=0,
            ensure_min_features=min(1, matrix.shape[0] if hasattr(matrix, "shape") else 1),
            dtype=[np.float32, np.float64],
        )
    except GraphError:
        raise
    except ValueError as error:
        raise GraphError(str(error)) from None


def _power(arrays: dict[str, Any], k: int, estimator: FastRP) -> Any:
    if f"power{k}" in arrays:
        return arrays[f"power{k}"]
    shape = (estimator.n_features_in_, estimator.dim)
    return sparse.csr_array(tuple(arrays[f"power{k}.{name}"] for name in _CSR), shape=shape)
