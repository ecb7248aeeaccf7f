"""The compiled query against the one in NumPy, and what happens without a compiler."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import compiled
from anabranch.graphs import Graph
from anabranch.graphs.generators import planted_communities
from anabranch.graphs.ppr import PPRIndex, PPRQuery, PPRResult, build_index, kernel
from anabranch.graphs.ppr import query as query_module
from tests.graphs.random_graphs import graphs

needs_compiler = pytest.mark.skipif(
    compiled.compiler() is None, reason="no C++ compiler: queries run in NumPy"
)
DENSE = planted_communities(300, 6000, 3, inside=0.8, seed=0).graph
SPARSE = planted_communities(5000, 9000, 50, inside=0.8, seed=1).graph


def assert_same(found: PPRResult, expected: PPRResult) -> None:
    """Equal but for rounding, which may swap neighbours that score the same."""
    assert len(found.sources) == len(expected.sources)
    np.testing.assert_allclose(found.dropped, expected.dropped, atol=1e-6)
    for i in range(len(found.sources)):
        nodes, scores = found.row(i)
        np.testing.assert_allclose(scores, expected.row(i)[1], rtol=1e-5, atol=1e-9)
        differs = nodes != expected.row(i)[0]
        close = np.isclose(scores, np.roll(scores, 1), rtol=1e-5) | np.isclose(
            scores, np.roll(scores, -1), rtol=1e-5
        )
        # The last one may have swapped with one that is not shown.
        assert (close | (np.arange(len(nodes)) == len(nodes) - 1))[differs].all()


@needs_compiler
@settings(max_examples=40)
@given(
    graphs(),
    st.integers(0, 4),
    st.sampled_from(["none", "whole", "cut"]),
    st.sampled_from([None, 0.0, 0.01, 0.3]),
    st.sampled_from([None, 1, 3, 100]),
)
def test_it_is_the_plain_query(
    graph: Graph, rounds: int, index: str, threshold: float | None, top_k: int | None
) -> None:
    walked = (
        None if index == "none" else build_index(graph, walks=5, keep=3 if index == "cut" else None)
    )
    fast, plain = (PPRQuery(graph, walked, compiled=c) for c in (True, False))
    sources = np.arange(graph.num_nodes)
    options = {"rounds": rounds, "threshold": threshold, "top_k": top_k}
    assert_same(fast.run(sources, **options), plain.run(sources, **options))


@needs_compiler
@pytest.mark.parametrize("graph", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("top_k", [None, 20])
def test_a_batch_is_its_single_queries_bit_for_bit(
    graph: Graph, rounds: int, top_k: int | None
) -> None:
    """Sources of the dense graph share rows and go together, those of the sparse one do not."""
    query = PPRQuery(graph, build_index(graph, walks=30))
    sources = np.random.default_rng(0).choice(graph.num_nodes, 75, replace=False)
    together = query.run(sources, rounds=rounds, top_k=top_k)
    by_threads = query.run(sources, rounds=rounds, top_k=top_k, workers=2)
    for i, source in enumerate(sources):
        single = query.run([source], rounds=rounds, top_k=top_k)
        for batch in (together, by_threads):
            np.testing.assert_array_equal(batch.row(i)[0], single.nodes)
            np.testing.assert_array_equal(batch.row(i)[1], single.scores)
            assert batch.dropped[i] == single.dropped[0]


@needs_compiler
@pytest.mark.parametrize("graph", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_large_answers_are_the_plain_ones(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(graph, walks=40)
    wide = replace(index, counts=index.counts.astype(np.uint32))
    plain = PPRQuery(graph, index, compiled=False)
    for work in (2**24, 2000):
        monkeypatch.setattr(query_module, "WORK", work)
        for rounds in (1, 3):
            expected = plain.run(range(40), rounds=rounds, top_k=25)
            assert (expected.dropped > 0.01).any() == (work == 2000)
            for given_index in (index, wide):
                found = PPRQuery(graph, given_index).run(range(40), rounds=rounds, top_k=25)
                assert_same(found, expected)


@needs_compiler
def test_threads_and_graphs_of_other_sizes_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Sums are kept between the queries of a thread."""
    build_index(SPARSE, tmp_path / "i", walks=5)
    queries = [
        PPRQuery(DENSE, build_index(DENSE, walks=5)),
        PPRQuery(SPARSE, PPRIndex.load(tmp_path / "i", SPARSE)),
    ]
    expected = [query.run([7], rounds=2) for query in queries]
    failed: list[Exception] = []

    def ask() -> None:
        try:
            for _ in range(40):
                for query, answer in zip(queries, expected, strict=True):
                    np.testing.assert_array_equal(query.run([7], rounds=2).scores, answer.scores)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.fixture
def not_loaded() -> Iterator[None]:
    kernel.load.cache_clear()
    yield
    kernel.load.cache_clear()


@pytest.mark.usefixtures("not_loaded")
@pytest.mark.parametrize(("compiler", "said"), [("", "no C++ compiler"), ("false", "not build")])
def test_without_a_compiler_numpy_answers_and_the_log_says_so(
    compiler: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    index = build_index(DENSE, walks=5)
    with caplog.at_level(logging.WARNING):
        found = PPRQuery(DENSE, index).run([3, 4], top_k=10)
    assert said in caplog.text
    expected = PPRQuery(DENSE, index, compiled=False).run([3, 4], top_k=10)
    np.testing.assert_array_equal(found.scores, expected.scores)


@needs_compiler
@pytest.mark.usefixtures("not_loaded")
def test_a_library_is_compiled_once_for_a_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    tool = compiled.compiler()
    assert tool is not None
    first = compiled.build(tool, "one", source)
    made = first.stat().st_mtime_ns
    assert compiled.build(tool, "one", source) == first
    assert first.stat().st_mtime_ns == made
    assert compiled.build(tool, "one", source, ("-DX",)) != first
    source.write_text('extern "C" int one() { return 2; }')
    assert compiled.build(tool, "one", source) not in (first, None)
    assert not list(first.parent.glob(".*")), "no half-written library is left"
