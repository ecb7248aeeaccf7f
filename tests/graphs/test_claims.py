"""The experiments of S48 and S80 on graphs so small that no verdict follows from them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from anabranch.claims.graph_experiments import fastrp, powerwalk
from anabranch.graphs.generators import planted_communities
from anabranch.models.progress import silent

SMALL = planted_communities(400, 4000, 4, inside=0.8, seed=0)


def test_powerwalk_measures_error_time_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(powerwalk, "_data", lambda seed: (SMALL.graph, "small"))
    for name, value in {
        "LARGE_NODES": 2000,
        "LARGE_DRAWN": 8000,
        "LARGE_SOURCES": 4,
        "LARGE_WALKS": 100,
        "BATCH": 40,
    }.items():
        monkeypatch.setattr(powerwalk, name, value)
    measured = powerwalk.measure(3, silent)
    figures = json.loads(json.dumps(measured.figures))
    errors = figures["l1_error_and_precision_at_100"]
    for walks in ("10 walks", "50 walks", "100 walks"):
        by_rounds = [errors[walks][f"{rounds} pushes"][0] for rounds in (0, 1, 2)]
        assert by_rounds == sorted(by_rounds, reverse=True)
    assert errors["100 walks"]["0 pushes"][0] < errors["10 walks"]["0 pushes"][0]
    assert figures["l1_error_of_end_points_with_50_walks"] > errors["50 walks"]["0 pushes"][0]
    assert len(figures["batches"]) == 2
    assert all(batch["equal_bit_for_bit"] is True for batch in figures["batches"].values())
    by_pushes = figures["queries_on_a_million_edges"]["by_pushes"]
    for row in by_pushes.values():
        wanted = row["precision_at_50"].pop("query")
        assert len(row["precision_at_50"]) == 2
        assert all(wanted <= reached for reached in row["precision_at_50"].values())
    times = figures["times_faster_than_power_iteration"]
    assert times == min(row["times_faster"] for row in by_pushes.values())
    assert measured.plots[0].series["2 pushes"]


def test_fastrp_and_deepwalk_both_find_planted_communities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gensim")
    monkeypatch.setattr(fastrp, "_data", lambda seed: (SMALL, False, "small"))
    monkeypatch.setattr(fastrp, "DIM", 16)
    monkeypatch.setattr(fastrp, "SHARES", (0.1, 0.5))
    measured = fastrp.measure(0, silent)
    found = json.loads(json.dumps(measured.figures))["micro_and_macro_f1_by_share_of_labels"]
    chance = SMALL.labels.sum() / SMALL.labels.size
    for name in ("fastrp", "deepwalk", "deepwalk, standardised"):
        micro, macro = found[name]["50%"]
        assert micro > chance + 0.2, name
        assert macro > chance + 0.2, name
    assert set(measured.plots[0].series) == set(found)


def test_walks_follow_edges_and_end_at_dead_ends() -> None:
    from anabranch.graphs import Graph
    from anabranch.graphs.walks import random_walks

    path = Graph.from_edges([[0, 1], [1, 2]], directed=True)
    walks = random_walks(path, np.array([0, 1, 2], np.int32), 4, seed=0)
    assert walks.tolist() == [[0, 1, 2, -1], [1, 2, -1, -1], [2, -1, -1, -1]]
    walks = random_walks(SMALL.graph, np.arange(400, dtype=np.int32), 5, seed=0)
    dense = SMALL.graph.adjacency().toarray()
    linked = walks[:, 1] >= 0
    for position in range(4):
        assert (dense[walks[linked, position], walks[linked, position + 1]] > 0).all()


WITHOUT = """
import sys
sys.modules["scipy"] = None
from anabranch import registry
from anabranch.claims import find
from anabranch.errors import MissingExtra
registry.available("claims")
try:
    find("S48")().measure(0, lambda message, fraction: None)
except MissingExtra as error:
    print(error)
"""


@pytest.mark.slow
def test_without_the_extra_claims_can_be_listed_and_say_what_is_missing() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert "anabranch[graphs]" in ran.stdout, ran.stderr
