"""The comparison with other libraries: how they are asked, and those that cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from anabranch.graphs.generators import planted_communities
from anabranch.graphs.ppr import exact_ppr
from benchmarks.graphs import peer, peers
from benchmarks.peers.environments import EnvironmentFailed, Recipe

GRAPH = planted_communities(200, 1500, 4, inside=0.8, seed=0).graph
SOURCES = np.array([3, 50])


class Here(Recipe):
    """This interpreter: the development extra has igraph."""

    def build(self) -> Path:
        return Path(sys.executable)


class Missing(Recipe):
    def build(self) -> Path:
        raise EnvironmentFailed("no version fits")


def test_a_peer_sees_the_same_graph_and_its_answers_come_back() -> None:
    pytest.importorskip("igraph")
    data = {"sources": SOURCES, "best": np.array(10)}
    facts, (answers,) = peers._ask("igraph", Here("igraph", ()), GRAPH, data)
    truth = np.argsort(-exact_ppr(GRAPH, SOURCES), axis=1, kind="stable")[:, :10]
    assert [set(row) for row in answers.tolist()] == [set(row) for row in truth.tolist()]
    assert facts[0]["seconds"] > 0


def test_scores_of_all_nodes_and_pairs_of_some_are_ranked_alike() -> None:
    assert peer._best(np.array([0.1, 0.4, 0.2]), 2) == [1, 2]
    assert peer._best([0.1, 0.4, 0.2], 2) == [1, 2]
    assert peer._best([(7, 0.1), (3, 0.4)], 3) == [3, 7, -1]
    assert peer._best([], 2) == [-1, -1]


def test_a_peer_that_fails_says_why() -> None:
    with pytest.raises(peers.PeerFailed, match=r"No module named 'pecanpy'|KeyError"):
        peers._ask("pecanpy", Here("pecanpy", ()), GRAPH, {})


def test_what_cannot_be_built_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LARGE_NODES", 400)
    monkeypatch.setattr(peers, "LARGE_DRAWN", 3000)
    monkeypatch.setattr(peers, "PAGERANK", {"igraph": Missing("igraph", ())})
    *ours, theirs = peers.pagerank(["igraph"], walks=20)
    assert [row["side"] for row in ours] == ["anabranch", "anabranch"]
    assert ours[0]["precision@50"] > 0.5
    assert "cannot be measured: no version fits" in peers.line(theirs)
