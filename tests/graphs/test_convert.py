"""The same graph from every library and file."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx
import numpy as np
import pytest
import torch
from scipy import sparse

from anabranch.graphs import Graph, GraphError, as_graph, read_graph

EDGES = np.array([[0, 1], [1, 2], [2, 0], [2, 3]])
WEIGHTS = np.array([1.0, 2.0, 0.5, 4.0])
PLAIN = Graph.from_edges(EDGES)
WEIGHTED = Graph.from_edges(EDGES, WEIGHTS)


def same(found: Graph, expected: Graph) -> bool:
    return found.fingerprint() == expected.fingerprint()


def test_arrays_and_matrices() -> None:
    assert same(as_graph(EDGES), PLAIN)
    assert same(as_graph(EDGES.tolist()), PLAIN)
    assert same(as_graph(np.column_stack([EDGES, WEIGHTS])), WEIGHTED)
    assert same(as_graph(WEIGHTED.adjacency().toarray()), WEIGHTED)
    for kind in (sparse.csr_matrix, sparse.coo_array, sparse.lil_array):
        assert same(as_graph(kind(WEIGHTED.adjacency())), WEIGHTED)
    assert as_graph(PLAIN) is PLAIN
    assert as_graph(EDGES, directed=True).directed


def test_networkx() -> None:
    graph = networkx.Graph()
    graph.add_nodes_from(range(4))
    graph.add_weighted_edges_from(zip(*EDGES.T.tolist(), WEIGHTS, strict=True))
    assert same(as_graph(graph), WEIGHTED)
    named = as_graph(networkx.DiGraph([("a", "b"), ("b", "c")]))
    assert named.directed
    assert named.ids is not None
    assert named.ids.tolist() == ["a", "b", "c"]
    several = networkx.MultiGraph([(0, 1), (0, 1)])
    assert as_graph(several, duplicates="sum").adjacency().toarray()[0, 1] == 2
    karate = as_graph(networkx.karate_club_graph())
    assert (karate.num_nodes, karate.num_edges) == (34, 78)


def test_igraph() -> None:
    igraph = pytest.importorskip("igraph")
    graph = igraph.Graph(4, EDGES.tolist())
    assert same(as_graph(graph), PLAIN)
    graph.es["weight"] = WEIGHTS.tolist()
    assert same(as_graph(graph), WEIGHTED)
    graph.vs["name"] = list("wxyz")
    assert as_graph(graph).positions(["z"]).tolist() == [3]


def test_what_looks_like_pyg_data() -> None:
    both = np.concatenate([EDGES, EDGES[:, ::-1]]).T
    data = SimpleNamespace(edge_index=torch.tensor(both), num_nodes=4, edge_attr=None)
    assert same(as_graph(data), PLAIN)
    data.edge_attr = torch.tensor(np.concatenate([WEIGHTS, WEIGHTS]))
    assert same(as_graph(data), WEIGHTED)
    data.edge_attr = torch.ones(8, 3)  # features, no weights
    assert same(as_graph(data), PLAIN)
    one_way = SimpleNamespace(edge_index=torch.tensor(EDGES.T), num_nodes=6)
    assert (as_graph(one_way).directed, as_graph(one_way).num_nodes) == (True, 6)


def write(path: Path, text: str) -> Path:
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["g.txt", "g.edges.gz", "g.csv", "g.csv.xz", "g.tsv"])
def test_text_files(name: str, tmp_path: Path) -> None:
    mark = "," if ".csv" in name else "\t"
    lines = [mark.join(map(str, (a, b, w))) for (a, b), w in zip(EDGES, WEIGHTS, strict=True)]
    header = [mark.join(("source", "target", "weight"))] if "sv" in name else ["# a graph"]
    assert same(read_graph(write(tmp_path / name, "\n".join(header + lines))), WEIGHTED)
    bare = [line.rsplit(mark, 1)[0] for line in lines]
    assert same(as_graph(write(tmp_path / name, "\n".join(bare))), PLAIN)


def test_a_file_of_names(tmp_path: Path) -> None:
    graph = read_graph(write(tmp_path / "g.csv", "source,target\nann,bob\nbob,eve\n"))
    assert graph.ids is not None
    assert graph.ids.tolist() == ["ann", "bob", "eve"]
    assert graph.num_edges == 2
    sparse_numbers = read_graph(write(tmp_path / "g.txt", "10 99\n"), relabel=True)
    assert sparse_numbers.num_nodes == 2


def test_numpy_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", edges=EDGES, weights=WEIGHTS, num_nodes=7)
    assert read_graph(tmp_path / "e.npz").num_nodes == 7
    sparse.save_npz(tmp_path / "m.npz", sparse.csr_array(WEIGHTED.adjacency()))
    assert same(read_graph(tmp_path / "m.npz"), WEIGHTED)
    np.savez(tmp_path / "x.npz", other=EDGES)
    with pytest.raises(GraphError, match="has other, but neither"):
        read_graph(tmp_path / "x.npz")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"source": EDGES[:, 0], "target": EDGES[:, 1], "weight": WEIGHTS}
    parquet.write_table(pyarrow.table(columns), tmp_path / "g.parquet")
    assert same(read_graph(tmp_path / "g.parquet"), WEIGHTED)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.txt", "0 1\n0 1 2 3\n", r"line 2: '0 1 2 3' has not 2 columns"),
        ("g.txt", "7\n", "line 1"),
        ("g.csv", "0,1,-3\n", "g.csv: Negative values in data: edge 0"),
        ("g.csv", "0,1,x\n0,2,y\n", "a weight is no number"),
        ("g.dat", "0 1\n", "graphs are read from"),
        ("g.npz", "no zip", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_by_name(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=message):
        read_graph(write(tmp_path / name, text))


def test_an_empty_file_is_an_empty_graph_and_no_file_is_an_error(tmp_path: Path) -> None:
    assert read_graph(write(tmp_path / "g.txt", "# nothing\n")).num_nodes == 0
    with pytest.raises(GraphError, match="there is no file"):
        read_graph(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.eye(2), "may be an adjacency matrix or an edge list"),
        ([[0, 1], [1, 0]], "may be an adjacency matrix"),
        (np.ones((2, 5)), "no adjacency matrix"),
        ([[0, 1], [1]], "neither a matrix nor an edge list"),
        (object(), "object of shape"),
        (7, "is no graph"),
    ],
)
def test_what_is_no_graph_is_refused(source: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        as_graph(source)
