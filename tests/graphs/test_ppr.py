"""PowerWalk against linear solves, and an index that is whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.graphs import Graph, GraphError, IndexMismatch
from anabranch.graphs.generators import planted_communities
from anabranch.graphs.ppr import PPRIndex, PPRQuery, PPRResult, build_index, exact_ppr
from anabranch.graphs.ppr import masses as masses_module
from anabranch.graphs.ppr import query as query_module
from anabranch.graphs.ppr.index import Settings
from tests.graphs.random_graphs import graphs

RESTART = 0.15
GRAPH = planted_communities(300, 2000, 5, inside=0.8, seed=0).graph


def solved(graph: Graph, restart: float = RESTART) -> NDArray[np.float64]:
    """All score vectors [n, n] by a linear solve; a dead end's row leads back to each source."""
    n = graph.num_nodes
    walk = graph.transition().toarray().astype(np.float64)
    rows = np.empty((n, n))
    for source in range(n):
        back = walk.copy()
        back[graph.out_degree == 0, source] = 1.0
        unit = np.eye(n)[source]
        rows[source] = np.linalg.solve(np.eye(n) - (1 - restart) * back.T, restart * unit)
    return rows


def dense(result: PPRResult, n: int) -> NDArray[np.float64]:
    scores = np.zeros((len(result.sources), n))
    for i, row in enumerate(scores):
        nodes, values = result.row(i)
        row[nodes] = values
    return scores


def perfect_index(graph: Graph) -> PPRIndex:
    """Fingerprints that are exact, to a millionth, before mass returns from dead ends."""
    n = graph.num_nodes
    walk = graph.transition().toarray().astype(np.float64)
    visits = np.linalg.inv(np.eye(n) - (1 - RESTART) * walk)  # expected, each stops with 0.15
    counts = np.round(visits * 1e8).astype(np.uint32)
    rows, nodes = np.nonzero(counts)
    totals = np.minimum(counts.sum(axis=1, dtype=np.int64), 2**32 - 1).astype(np.uint32)
    walks = 10**8
    lost = np.round((1 - RESTART * visits.sum(axis=1)) * walks).astype(np.uint32)
    return PPRIndex(
        Settings(graph.fingerprint(), walks, RESTART, 0, None),
        np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]),
        nodes.astype(np.int32),
        counts[rows, nodes],
        totals,
        lost,
    )


@settings(max_examples=50)
@given(graphs())
def test_power_iteration_is_the_linear_solve(graph: Graph) -> None:
    found = exact_ppr(graph, np.arange(graph.num_nodes))
    np.testing.assert_allclose(found, solved(graph), atol=1e-6)


@settings(max_examples=40)
@given(graphs(), st.integers(0, 4), st.booleans())
def test_a_perfect_index_gives_exact_scores_after_any_number_of_pushes(
    graph: Graph, rounds: int, compiled: bool
) -> None:
    query = PPRQuery(graph, perfect_index(graph), compiled=compiled)
    result = query.run(np.arange(graph.num_nodes), rounds=rounds)
    np.testing.assert_allclose(dense(result, graph.num_nodes), solved(graph), atol=1e-5)


@settings(max_examples=40)
@given(
    graphs(),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.01, 0.3]),
    st.booleans(),
)
def test_scores_and_dropped_mass_sum_to_one(
    graph: Graph, rounds: int, indexed: bool, threshold: float | None, compiled: bool
) -> None:
    index = build_index(graph, walks=5, keep=3) if indexed else None
    query = PPRQuery(graph, index, compiled=compiled)
    result = query.run(np.arange(graph.num_nodes), rounds=rounds, threshold=threshold)
    sums = dense(result, graph.num_nodes).sum(axis=1) + result.dropped
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    assert (result.scores > 0).all()
    assert (result.dropped >= -1e-6).all()


def test_pushing_alone_converges_at_the_rate_of_the_restart() -> None:
    exact = exact_ppr(GRAPH, [3])
    query = PPRQuery(GRAPH)
    for rounds in (1, 5, 20):
        result = query.run([3], rounds=rounds)
        error = np.abs(dense(result, GRAPH.num_nodes) - exact).sum()
        left = (1 - RESTART) ** (rounds + 1)
        assert error == pytest.approx(result.dropped[0], abs=1e-5)
        assert result.dropped[0] == pytest.approx(left, abs=1e-5)


def test_without_pushes_the_answer_is_the_fingerprint() -> None:
    index = build_index(GRAPH, walks=20)
    result = PPRQuery(GRAPH, index).run([7], rounds=0)
    start, stop = index.indptr[7:9]
    np.testing.assert_array_equal(result.nodes, index.nodes[start:stop])
    expected = index.counts[start:stop] / index.totals[7]
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5)


def test_more_walks_and_more_pushes_come_closer() -> None:
    sources = np.arange(0, 300, 10)
    exact = exact_ppr(GRAPH, sources)

    def error(walks: int, rounds: int) -> float:
        result = PPRQuery(GRAPH, build_index(GRAPH, walks=walks)).run(sources, rounds=rounds)
        return float(np.abs(dense(result, 300) - exact).sum(axis=1).mean())

    errors = {(w, r): error(w, r) for w in (10, 160) for r in (0, 1, 2)}
    for walks in (10, 160):
        assert errors[walks, 2] < errors[walks, 1] < errors[walks, 0]
    for rounds in (0, 1, 2):
        # Sixteen times the walks: a quarter of the error.
        assert errors[160, rounds] == pytest.approx(errors[10, rounds] / 4, rel=0.35)


def test_visits_are_unbiased() -> None:
    """Over 200 seeds the mean count is the expected one within 4 standard errors everywhere."""
    graph = Graph.from_edges(
        np.random.default_rng(0).integers(0, 20, (50, 2)), num_nodes=20, directed=True
    )
    walk = graph.transition().toarray().astype(np.float64)
    expected = np.linalg.inv(np.eye(20) - (1 - RESTART) * walk)
    drawn = np.stack(
        [build_index(graph, walks=10, seed=seed).visits().toarray() / 10 for seed in range(200)]
    )
    standard_error = drawn.std(axis=0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(axis=0) - expected) <= 4 * standard_error + 1e-3).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_walkers_follow_weights(weighted: bool) -> None:
    pairs = [[0, 1], [0, 2], [1, 0], [2, 0]]
    graph = Graph.from_edges(pairs, [3.0, 1.0, 1.0, 1.0] if weighted else None, directed=True)
    index = build_index(graph, walks=20_000)
    counts = index.visits().toarray()[0]
    assert counts[1] / counts[2] == pytest.approx(3 if weighted else 1, rel=0.05)


def test_a_batch_is_its_single_queries_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In NumPy; the compiled ones are in ``test_ppr_kernel``."""
    query = PPRQuery(GRAPH, build_index(GRAPH, walks=30), compiled=False)
    sources = [5, 250, 5, 17, 0, 99]
    singles = [query.run([source]) for source in sources]
    for gain in (1e-9, 1e9):  # always one by one, always together
        monkeypatch.setattr(masses_module, "DENSE_GAIN", gain)
        for size, workers in ((2, 1), (4, 3), (256, 2)):
            monkeypatch.setattr(query_module, "_BATCH", size)
            batch = query.run(sources, workers=workers)
            for i, single in enumerate(singles):
                np.testing.assert_array_equal(batch.row(i)[0], single.nodes)
                np.testing.assert_array_equal(batch.row(i)[1], single.scores)


def test_the_best_are_sorted_with_ties_by_node() -> None:
    star = Graph.from_edges([[0, i] for i in range(1, 9)])
    result = PPRQuery(star, perfect_index(star)).run([0], top_k=4)
    assert result.nodes.tolist() == [0, 1, 2, 3]
    full = dense(PPRQuery(GRAPH).run([4], rounds=6), 300)[0]
    best = PPRQuery(GRAPH).run([4], rounds=6, top_k=20)
    np.testing.assert_array_equal(best.nodes, np.lexsort((np.arange(300), -full))[:20])
    assert len(PPRQuery(star).run([0], top_k=99, rounds=3).nodes) == 9


def test_refining_ends_with_the_right_set() -> None:
    exact = exact_ppr(GRAPH, [11])[0]
    query = PPRQuery(GRAPH, build_index(GRAPH, walks=50))
    steps = list(query.refine(11, 5, most_rounds=60))
    assert [step.rounds for step in steps] == list(range(len(steps)))
    for step in steps:
        best = set(np.argsort(-exact)[: step.certain].tolist())
        assert set(step.nodes[: step.certain].tolist()) == best
    assert steps[-1].certain == 5
    np.testing.assert_allclose(np.sort(steps[-1].scores)[::-1], np.sort(exact)[::-1][:5], rtol=0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_round_beyond_the_budget_drops_the_smallest_masses(
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = PPRQuery(GRAPH, build_index(GRAPH, walks=30), compiled=compiled)
    whole = query.run([2], rounds=2)
    assert whole.dropped[0] == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(query_module, "WORK", 3000)
    cut = query.run([2], rounds=2)
    assert 0 < cut.dropped[0] < 0.9
    np.testing.assert_array_equal(cut.scores, query.run([2, 3], rounds=2).row(0)[1])


def test_the_index_does_not_depend_on_workers(tmp_path: Path) -> None:
    graph = planted_communities(3000, 9000, 5, seed=1).graph  # two blocks
    one = build_index(graph, walks=60, seed=3)
    two = build_index(graph, tmp_path / "two", walks=60, seed=3, workers=2)
    for name in ("indptr", "nodes", "counts", "totals", "lost"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert isinstance(two.nodes, np.memmap)
    other = build_index(graph, walks=60, seed=4)
    assert not np.array_equal(one.nodes, other.nodes)


@pytest.mark.parametrize("keep", [None, 4])
def test_an_index_on_disk_answers_as_the_one_in_memory(keep: int | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"walks": 20, "keep": keep, "restart": 0.3}
    there = build_index(GRAPH, tmp_path / "i", **options)
    loaded = PPRIndex.load(tmp_path / "i", GRAPH)
    assert loaded.settings == there.settings
    here = PPRQuery(GRAPH, build_index(GRAPH, **options)).run([1, 2])
    found = PPRQuery(GRAPH, loaded).run([1, 2])
    np.testing.assert_array_equal(found.scores, here.scores)
    if keep:
        assert (np.diff(loaded.indptr) <= keep).all()
        assert (found.dropped > 0.05).all()


def test_an_index_for_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i"
    build_index(GRAPH, path, walks=2)
    other = Graph.from_edges([[0, 1]])
    with pytest.raises(IndexMismatch, match="another graph"):
        PPRIndex.load(path, other)
    with pytest.raises(IndexMismatch, match="another graph"):
        PPRQuery(other, build_index(GRAPH, walks=2))
    with pytest.raises(IndexMismatch, match=r"restart = 0.15, not 0.2"):
        PPRQuery(GRAPH, PPRIndex.load(path, GRAPH), restart=0.2)
    with pytest.raises(GraphError, match="there already"):
        build_index(GRAPH, path, walks=2)
    build_index(GRAPH, path, walks=3, replace=True)
    assert PPRIndex.load(path, GRAPH).settings.walks == 3
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    with pytest.raises(IndexMismatch, match="no index at"):
        PPRIndex.load(tmp_path / "missing", GRAPH)
    (path / "nodes").write_bytes((path / "nodes").read_bytes()[:-4])
    with pytest.raises(IndexMismatch, match=r"nodes has \d+ bytes, not"):
        PPRIndex.load(path, GRAPH)
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(IndexMismatch, match="format 99"):
        PPRIndex.load(path, GRAPH)
    (path / "header.json").write_text("{")
    with pytest.raises(IndexMismatch, match="header cannot be read"):
        PPRIndex.load(path, GRAPH)


BUILD = """
import sys
import numpy as np
from anabranch.graphs import Graph
from anabranch.graphs.ppr import build_index
pairs = np.random.default_rng(0).integers(0, 20_000, (60_000, 2))
report = lambda message, fraction: print(message, flush=True)
build_index(Graph.from_edges(pairs), sys.argv[1], walks=200, progress=report)
"""


def test_a_kill_leaves_no_index_and_the_next_build_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "i"
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):  # some blocks are written
        assert process.stdout.readline().startswith("walked from")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = [p.name for p in tmp_path.iterdir()]
    assert left == [f".i.{process.pid}.tmp"], "half an index, under no name that is loaded"
    with pytest.raises(IndexMismatch, match="no index at"):
        PPRIndex.load(path, GRAPH)
    build_index(GRAPH, path, walks=2)
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(message: str, fraction: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(GRAPH, tmp_path / "i", walks=2, progress=fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"walks": 0}, "walks = 0"),
        ({"walks": 65536}, "walks = 65536"),
        ({"restart": 0.0}, "restart = 0.0"),
        ({"restart": 1.0}, "restart = 1.0"),
        ({"keep": 0}, "keep = 0"),
        ({"workers": 0}, "workers = 0"),
    ],
)
def test_bad_options_of_the_index(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        build_index(GRAPH, **options)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([300], {}, r"no node 300 in 0\.\.299"),
        ([-1], {}, "no node -1"),
        ([[1, 2]], {}, "list of nodes"),
        ([1], {"rounds": -1}, "rounds = -1"),
        ([1], {"threshold": -0.1}, "threshold = -0.1"),
        ([1], {"top_k": 0}, "top_k = 0"),
        ([1], {"workers": 0}, "workers = 0"),
    ],
)
def test_bad_queries(sources: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        PPRQuery(GRAPH).run(sources, **options)


def test_no_sources_one_node_and_dead_ends() -> None:
    nothing = PPRQuery(GRAPH).run([])
    assert (len(nothing.sources), len(nothing.scores)) == (0, 0)
    empty = Graph.from_edges([])
    assert len(build_index(empty).nodes) == 0
    alone = Graph.from_edges([], num_nodes=1)
    for index in (None, build_index(alone, walks=3)):
        result = PPRQuery(alone, index).run([0])
        assert (result.nodes.tolist(), result.scores.tolist()) == ([0], [1.0])
    named = Graph.from_edges([["a", "b"]], relabel=True)
    assert PPRQuery(named).run(["b"]).sources.tolist() == [1]


def test_relabelling_permutes_the_scores() -> None:
    order = np.random.default_rng(1).permutation(300)
    moved = Graph.from_matrix(GRAPH.adjacency()[order][:, order])
    here = dense(PPRQuery(GRAPH).run([order[4]], rounds=8), 300)[0]
    there = dense(PPRQuery(moved).run([4], rounds=8), 300)[0]
    np.testing.assert_allclose(there, here[order], atol=1e-6)


def test_a_large_build_reports_its_progress() -> None:
    said: list[float] = []
    build_index(GRAPH, walks=2000, progress=lambda message, done: said.append(done or 0.0))
    assert said == sorted(said)
    assert said[-1] == 1.0
    assert len(said) > 3
