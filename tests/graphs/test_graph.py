"""Graphs against dense matrices, and every input that is no graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from anabranch.errors import AnabranchError
from anabranch.graphs import Graph, GraphError
from tests.graphs.random_graphs import graphs

PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=30)


@given(PAIRS, st.booleans(), st.booleans(), st.sampled_from(["sum", "once"]))
def test_an_edge_list_is_its_dense_matrix(
    pairs: list[tuple[int, int]], directed: bool, weighted: bool, duplicates: Any
) -> None:
    weights = [1.0 + i for i in range(len(pairs))] if weighted else None
    expected = np.zeros((8, 8))
    seen = set()
    for i, (a, b) in enumerate(pairs):
        key = (a, b) if directed else (min(a, b), max(a, b))
        if duplicates == "once" and key in seen:
            continue
        seen.add(key)
        expected[key] += weights[i] if weights else 1
    if not directed:
        expected += np.triu(expected, 1).T
    graph = Graph.from_edges(
        np.array(pairs, np.int64).reshape(-1, 2),
        weights,
        num_nodes=8,
        directed=directed,
        duplicates=duplicates,
    )
    np.testing.assert_array_equal(graph.adjacency().toarray(), expected)
    assert graph.num_edges == np.count_nonzero(expected if directed else np.triu(expected))
    again = Graph.from_matrix(expected, directed=directed)
    assert again.fingerprint() == graph.fingerprint()


@given(graphs())
def test_views_are_those_of_the_dense_matrix(graph: Graph) -> None:
    dense = graph.adjacency().toarray().astype(np.float64)
    np.testing.assert_allclose(graph.strength, dense.sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(graph.out_degree, (dense > 0).sum(axis=1))
    np.testing.assert_array_equal(graph.transpose().adjacency().toarray(), dense.T)
    sums = dense.sum(axis=1, keepdims=True)
    walk = np.divide(dense, sums, out=np.zeros_like(dense), where=sums > 0)
    np.testing.assert_allclose(graph.transition().toarray(), walk, atol=1e-6)


def test_without_a_word_duplicates_are_summed_if_weighted_and_merged_if_not() -> None:
    assert Graph.from_edges([[0, 1], [1, 0]]).weights is None
    weights = Graph.from_edges([[0, 1], [1, 0]], [1.0, 2.0]).weights
    assert weights is not None
    np.testing.assert_array_equal(weights, [3, 3])


def test_an_edge_of_weight_zero_is_none_and_isolated_nodes_stay() -> None:
    graph = Graph.from_edges([[0, 1, 0.0], [1, 2, 2.0]], num_nodes=5)
    assert (graph.num_nodes, graph.num_edges) == (5, 1)
    np.testing.assert_array_equal(graph.out_degree, [0, 1, 1, 0, 0])


@pytest.mark.parametrize("empty", [[], np.empty((0, 2)), np.empty((0, 3))])
def test_a_graph_without_nodes_is_legal(empty: Any) -> None:
    graph = Graph.from_edges(empty)
    assert (graph.num_nodes, graph.num_edges) == (0, 0)
    assert graph.transition().shape == (0, 0)
    assert Graph.from_matrix(np.empty((0, 0))).num_nodes == 0


def test_two_kinds_of_nodes_stand_one_after_the_other() -> None:
    block = sparse.csr_array(np.array([[1.0, 0, 2], [0, 3, 0]]))
    graph = Graph.bipartite(block)
    assert (graph.num_nodes, graph.num_edges, graph.left) == (5, 3, 2)
    np.testing.assert_array_equal(graph.biadjacency().toarray(), block.toarray())
    assert not graph.directed
    assert Graph.bipartite(np.empty((0, 3))).num_nodes == 3
    with pytest.raises(GraphError, match=r"not made by Graph.bipartite"):
        Graph.from_edges([[0, 1]]).biadjacency()


def test_names_stand_for_rows() -> None:
    graph = Graph.from_edges([["b", "a"], ["c", "a"]], relabel=True)
    assert graph.ids is not None
    assert graph.ids.tolist() == ["a", "b", "c"]
    assert graph.positions(["c", "a"]).tolist() == [2, 0]
    with pytest.raises(GraphError, match="no node 'x'"):
        graph.positions(["x"])
    numbered = Graph.from_edges([[70, 5]], ids=[5, 60, 70])
    assert numbered.num_nodes == 3
    assert numbered.positions([70]).tolist() == [2]
    with pytest.raises(GraphError, match="no node 9"):
        Graph.from_edges([[70, 9]], ids=[5, 60, 70])
    with pytest.raises(GraphError, match=r"no node 3 in 0\.\.1"):
        Graph.from_edges([[0, 1]]).positions([3])


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([[0, 1, 2, 3]], {}, r"shape \[m, 2\] or \[m, 3\], not \[1, 4\]"),
        ([[0, 1, -1.0]], {}, "Negative values in data: edge 0"),
        ([[0, 1, 1.0], [1, 2, np.nan]], {}, "edge 1 has the weight NaN"),
        ([[0, 1, np.inf]], {}, "edge 0 has the weight inf"),
        ([[0, 1, 1e300]], {}, "too large for float32"),
        ([[0, -1]], {}, r"edge 0: \[0, -1\] names a node outside 0\.\.0"),
        ([[0, 1], [0, 5]], {"num_nodes": 3}, r"edge 1: \[0, 5\] names a node outside 0\.\.2"),
        ([[0.5, 1]], {}, "edge 0: 0.5 is no node number"),
        ([["a", "b"]], {}, "relabel=True"),
        ([[0, 1]], {"num_nodes": -1}, "negative"),
        ([[0, 2**40]], {}, "relabel=True"),
        ([[0, 1]], {"weights": [1.0, 2.0]}, r"weights of shape \[2\] for 1 edges"),
        ([[0, 1, 1.0]], {"weights": [1.0]}, "given twice"),
        ([[0, 1]], {"duplicates": "max"}, "'sum' or 'once'"),
        ([[0, 1]], {"ids": [1, 1]}, "the id 1 is given to more than one node"),
        ([[0, 1]], {"ids": ["a", "b"]}, "nodes are named by"),
        ([[0, 1]], {"relabel": True, "num_nodes": 2}, "neither ids nor num_nodes"),
        ([[0, 1, 3e38], [0, 1, 3e38]], {}, "summed weight"),
    ],
)
def test_a_bad_edge_list_is_refused_by_name(
    pairs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        Graph.from_edges(np.array(pairs), **options)
    assert isinstance(caught.value, AnabranchError)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (np.ones((2, 3)), {}, r"shape \(2, 3\) is no adjacency matrix"),
        (np.array([[0, -1.0], [0, 0]]), {}, r"entry \(0, 1\)"),
        (sparse.coo_array(([np.nan], ([1], [0])), shape=(2, 2)), {}, r"entry \(1, 0\)"),
        (np.ones(3), {}, "two dimensions"),
        (np.array([[1j]]), {}, "complex"),
        (np.array([[0, 1.0], [0, 0]]), {"directed": False}, "not symmetric"),
        (np.eye(2), {"ids": [1]}, "1 ids for 2 nodes"),
    ],
)
def test_a_bad_matrix_is_refused_by_name(
    matrix: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GraphError, match=message):
        Graph.from_matrix(matrix, **options)


def test_a_graph_made_of_wrong_arrays_is_refused() -> None:
    with pytest.raises(GraphError, match="decreases"):
        Graph(np.array([0, 2, 1, 2]), np.array([0, 1], np.int32), None, True)
    with pytest.raises(GraphError, match="outside"):
        Graph(np.array([0, 1]), np.array([5], np.int32), None, True)
    graph = Graph.from_edges([[0, 1]])
    with pytest.raises(ValueError, match="read-only"):
        graph.indices[0] = 0


def test_a_matrix_given_is_not_changed() -> None:
    matrix = sparse.csr_array(np.array([[0, 1.0], [1, 0]]))
    matrix.data[0] = 0
    before = matrix.copy()
    Graph.from_matrix(matrix)
    assert matrix.nnz == before.nnz
    matrix.data[0] = 2
