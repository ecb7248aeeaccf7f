"""Other libraries' graphs as ours, recognised without importing those libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from anabranch.graphs.errors import GraphError
from anabranch.graphs.graph import Duplicates, Graph
from anabranch.graphs.read import read_graph


def as_graph(
    source: Any, *, directed: bool | None = None, duplicates: Duplicates | None = None
) -> Graph:
    """A :class:`Graph` from whatever holds one.

    ====================================  ====================================================
    a SciPy sparse or dense square array  adjacency matrix; undirected if symmetric
    an array or list [m, 2] or [m, 3]     edge list; undirected unless ``directed``
    a path                                see :func:`~anabranch.graphs.read.read_graph`
    a networkx graph                      its edge attribute ``weight``; node names become ids
    an igraph ``Graph``                   its edge attribute ``weight``; vertex ``name`` as ids
    a PyG ``Data``                        ``edge_index``; ``edge_weight``, or 1-D ``edge_attr``
    ====================================  ====================================================

    A 2x2 or 3x3 array could be either of the first two and is refused: say which with
    :meth:`Graph.from_matrix` or :meth:`Graph.from_edges`. ``duplicates`` as in :class:`Graph`.
    """
    if isinstance(source, Graph):
        return source
    if isinstance(source, str | os.PathLike):
        return read_graph(source, directed=directed or False, duplicates=duplicates)
    for convert in (_networkx, _igraph, _pyg):
        if (graph := convert(source, directed, duplicates)) is not None:
            return graph
    if sparse.issparse(source):
        return Graph.from_matrix(source, directed=directed)
    return _array(source, directed, duplicates)


def _array(source: Any, directed: bool | None, duplicates: Duplicates | None) -> Graph:
    try:
        array = np.asarray(source)
    except ValueError as error:
        raise GraphError(f"neither a matrix nor an edge list: {error}") from None
    shape = list(array.shape)
    square = array.ndim == 2 and shape[0] == shape[1]
    edges = array.size == 0 or (array.ndim == 2 and shape[1] in (2, 3))
    if square and edges and array.size:
        raise GraphError(
            f"an array of shape {shape} may be an adjacency matrix or an edge list; say which with "
            f"Graph.from_matrix or Graph.from_edges"
        )
    if square:
        return Graph.from_matrix(array, directed=directed)
    if edges and array.ndim <= 2 and (array.size or shape in ([0], [0, 2], [0, 3])):
        names = array.dtype.kind in "US"
        return Graph.from_edges(
            array, directed=directed or False, duplicates=duplicates, relabel=names
        )
    if array.ndim == 2 and array.dtype.kind in "biuf":
        return Graph.from_matrix(array)  # says that it is not square
    raise GraphError(
        f"{type(source).__name__} of shape {shape} is no graph: pass an adjacency matrix [n, n], "
        f"an edge list [m, 2] or [m, 3], a path, or a graph of networkx, igraph or PyG"
    )


def _networkx(source: Any, directed: bool | None, duplicates: Duplicates | None) -> Graph | None:
    networkx = sys.modules.get("networkx")
    if networkx is None or not isinstance(source, networkx.Graph):
        return None
    names = list(source.nodes)
    rows = {name: row for row, name in enumerate(names)}
    edges = list(source.edges(data="weight"))
    return _from_lists(
        [(rows[a], rows[b]) for a, b, _ in edges],
        [weight for _, _, weight in edges],
        names,
        source.is_directed() if directed is None else directed,
        duplicates,
    )


def _igraph(source: Any, directed: bool | None, duplicates: Duplicates | None) -> Graph | None:
    igraph = sys.modules.get("igraph")
    if igraph is None or not isinstance(source, igraph.Graph):
        return None
    return _from_lists(
        source.get_edgelist(),
        source.es["weight"] if "weight" in source.es.attributes() else [],
        source.vs["name"] if "name" in source.vs.attributes() else range(source.vcount()),
        source.is_directed() if directed is None else directed,
        duplicates,
    )


def _pyg(source: Any, directed: bool | None, duplicates: Duplicates | None) -> Graph | None:
    edge_index = getattr(source, "edge_index", None)
    if edge_index is None or not hasattr(source, "num_nodes"):
        return None
    pairs = np.asarray(edge_index).T  # [2, m] -> [m, 2]
    weights = getattr(source, "edge_weight", None)
    if weights is None:
        attributes = getattr(source, "edge_attr", None)
        # Edge features of several columns are no weights.
        if attributes is not None and attributes.ndim == 1:
            weights = attributes
    weights = None if weights is None else np.asarray(weights)
    # PyG stores both directions of an undirected edge: they are no duplicates of each other.
    graph = Graph.from_edges(
        pairs, weights, num_nodes=source.num_nodes, directed=True, duplicates=duplicates
    )
    return graph if directed else Graph.from_matrix(graph.adjacency(), directed=directed)


def _from_lists(
    pairs: Any,
    weights: list[float | None],
    names: Any,
    directed: bool,
    duplicates: Duplicates | None,
) -> Graph:
    """Row-number pairs; an edge without a weight beside edges with one weighs 1."""
    weighted = any(weight is not None for weight in weights)
    values: list[float] | None = None
    if weighted:
        values = [1.0 if weight is None else weight for weight in weights]
    graph = Graph.from_edges(
        np.array(pairs, np.int64).reshape(-1, 2),
        values,
        num_nodes=len(names),
        directed=directed,
        duplicates=duplicates,
    )
    ids = _ids(list(names))
    if ids is None:
        return graph
    return Graph(graph.indptr, graph.indices, graph.weights, graph.directed, ids)


def _ids(names: list[Any]) -> Any:
    """Names as ids: None for 0..n-1, numbers or strings as they are, others as their text."""
    if names == list(range(len(names))):
        return None
    same: Callable[[type], bool] = lambda kind: all(type(name) is kind for name in names)  # noqa: E731
    if same(int) or same(str):
        return np.array(names)
    return np.array([str(name) for name in names])
