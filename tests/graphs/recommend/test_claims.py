"""The experiments of S58 and S21 on data so small that no verdict follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone

from anabranch.claims import find
from anabranch.claims.graph_experiments import graphhash, ultragcn
from anabranch.graphs.recommend import RecommendError
from anabranch.graphs.recommend.data import (
    amazon_electronics,
    movielens_100k,
    planted_interactions,
)
from anabranch.models.progress import silent


def absent() -> None:
    raise RecommendError("not here")


def test_ultragcn_races_lightgcn(monkeypatch: pytest.MonkeyPatch) -> None:
    small = planted_interactions(80, 60, 4, per_user=15, seed=1)
    parts = small.split("random", 0.2, 0)
    train, validation = parts[0].split("random", 0.2, 0, "validation")
    monkeypatch.setattr(
        ultragcn, "interactions", lambda seed: (train, validation, parts[1], "small")
    )
    few = {
        name: clone(model).set_params(dim=8, epochs=6, evaluate_every=1, batch=128)
        for name, model in ultragcn.MODELS.items()
    }
    monkeypatch.setattr(ultragcn, "MODELS", few)
    measured = ultragcn.measure(0, silent)
    figures = json.loads(json.dumps(measured.figures))
    assert set(figures["recall_at_20"]) == {*few, "popularity"}
    for value in (*figures["recall_at_20"].values(), *figures["ndcg_at_20"].values()):
        assert 0 < value <= 1
    assert figures["lightgcn_chosen"] in ultragcn.LIGHTS
    epochs = figures["best_epoch"]
    assert sorted(len(epochs[name]) for name in ultragcn.LIGHTS) == [1, 2]
    for race in figures["races"]:
        seconds, ratio = race["processor_seconds"], race["times_faster"]
        assert (ratio is None) == (race["epochs"]["UltraGCN"] is None)
        assert seconds["LightGCN"] >= 0
    assert len(measured.plots[0].series) == 3


def test_graphhash_is_above_hashes_on_planted_communities(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = planted_interactions(100, 100, 5, per_user=25, inside=0.9, seed=0)
    monkeypatch.setattr(
        graphhash, "_sets", lambda: ({"planted": lambda seed: planted.split(seed=seed)}, {})
    )
    monkeypatch.setattr(graphhash, "SEEDS", 1)
    training = {"dim": 16, "lr": 0.03, "l2": 1e-6, "batch": 256, "epochs": 8}
    monkeypatch.setattr(graphhash, "TRAINING", training)
    monkeypatch.setattr(graphhash, "FEW", 0.1)
    measured = graphhash.measure(0, silent)
    figures = json.loads(json.dumps(measured.figures))
    found = figures["at_75_percent_fewer_rows"]["planted"]
    assert found["rows_saved"] >= 0.75
    recall = found["recall_at_20"]
    assert set(recall) == {
        "GraphHash",
        "DoubleGraphHash",
        "full",
        "popularity",
        *graphhash.BASELINES,
    }
    assert recall["GraphHash"] > 1.1 * recall["modulo"]
    few = figures["planted_at_96_7_percent_fewer"]
    assert few["rows_saved"] >= 0.9
    assert few["recall_at_20"]["full"] == recall["full"]
    assert [x for x, _ in measured.plots[0].series["GraphHash"]] == [0.1, 0.25, 0.5]


def test_a_missing_data_set_is_named_and_the_claim_cannot_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphhash, "movielens_100k", absent)
    monkeypatch.setattr(graphhash, "amazon_electronics", absent)
    sets, missing = graphhash._sets()
    assert list(sets) == ["planted"]
    assert set(missing) == {"movielens", "amazon"}
    monkeypatch.setattr(ultragcn, "movielens_100k", absent)
    monkeypatch.setattr(ultragcn, "amazon_electronics", absent)
    train, validation, test, note = ultragcn.interactions(0)
    assert "PLANTED" in note
    assert (train.part, validation.part, test.part) == ("train", "validation", "test")


def test_the_built_in_sets_are_what_their_papers_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    with pytest.raises(RecommendError, match="unset"):
        amazon_electronics()
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    with pytest.raises(RecommendError, match="there is no file"):
        amazon_electronics()
    try:
        ratings = movielens_100k()
    except RecommendError as reason:
        pytest.skip(str(reason))
    assert (ratings.num_users, ratings.num_items, len(ratings)) == (943, 1682, 100_000)
    liked = ratings.rated_at_least(4).compact()
    assert (liked.num_users, liked.num_items, len(liked)) == (942, 1447, 55_375)
    assert liked.time is not None


def test_planted_interactions_are_mostly_inside() -> None:
    found = planted_interactions(400, 300, 5, per_user=20, inside=1.0, seed=2)
    # Two users of one community share items, others none: the overlaps fall into five blocks.
    shared = (found.csr() @ found.csr().T).toarray() > 0
    communities = np.unique(shared @ shared, axis=0)
    assert len(communities) == 5
    assert (
        found.fingerprint()
        == planted_interactions(400, 300, 5, per_user=20, inside=1.0, seed=2).fingerprint()
    )


@pytest.mark.parametrize("name", ["S21", "S58", "graphhash", "ultragcn"])
def test_claims_are_found_and_state_their_threshold(name: str) -> None:
    claim = find(name)
    assert "recall@20" in claim.threshold
    assert claim.baseline
