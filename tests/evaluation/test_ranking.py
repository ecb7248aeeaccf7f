"""Ranking figures against the definitions, user by user."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse

from anabranch.evaluation.ranking import rank, top_k
from anabranch.training.errors import DataError


@st.composite
def rankings(draw: st.DrawFn) -> tuple[NDArray[np.float32], Any, Any]:
    """Scores with many ties, relevant and seen items that do not overlap."""
    users, items = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = generator.integers(0, 4, (users, items)).astype(np.float32)
    kind = generator.integers(0, 3, (users, items))
    return scores, sparse.csr_array(kind == 1), sparse.csr_array(kind == 2)


@settings(max_examples=40)
@given(rankings(), st.integers(1, 12), st.sampled_from(["relevant", "capped"]))
def test_it_is_the_definition_for_every_user(
    drawn: tuple[Any, Any, Any], k: int, denominator: Any
) -> None:
    scores, relevant, seen = drawn
    figures = {"recall": [], "ndcg": [], "precision": [], "full": [], "hit_rate": []}  # type: ignore[var-annotated]
    for row, wanted, known in zip(scores, relevant.toarray(), seen.toarray(), strict=True):
        if not wanted.any():
            continue
        # Python's sort is stable: equal scores stay in the order of item numbers.
        left = [item for item in range(len(row)) if not known[item]]
        best = sorted(left, key=lambda item: -row[item])[:k]
        hits = [position for position, item in enumerate(best) if wanted[item]]
        count = int(wanted.sum())
        recall, precision = len(hits) / count, len(hits) / k
        ideal = sum(1 / math.log2(p + 2) for p in range(min(k, count)))
        figures["recall"].append(recall if denominator == "relevant" else len(hits) / min(k, count))
        figures["ndcg"].append(sum(1 / math.log2(p + 2) for p in hits) / ideal)
        figures["precision"].append(precision)
        figures["full"].append(recall)
        figures["hit_rate"].append(float(bool(hits)))
    for average in ("active", "all"):
        found = rank(
            lambda users: scores[users],
            relevant,
            seen,
            k=k,
            denominator=denominator,
            average=average,  # type: ignore[arg-type]
        )
        users = len(scores) if average == "all" else max(1, len(figures["recall"]))
        for name in ("recall", "ndcg", "precision", "hit_rate"):
            assert getattr(found, name) == pytest.approx(sum(figures[name]) / users), name
        precision, recall = (sum(figures[name]) / users for name in ("precision", "full"))
        expected = 2 * precision * recall / (precision + recall) if precision else 0.0
        assert found.f1 == pytest.approx(expected)
        assert found.active == len(figures["recall"])
        assert (found.denominator, found.average) == (denominator, average)


@settings(max_examples=30)
@given(rankings(), st.integers(1, 5))
def test_the_batch_changes_nothing(drawn: tuple[Any, Any, Any], k: int) -> None:
    scores, relevant, seen = drawn
    found = [
        rank(lambda users: scores[users], relevant, seen, k=k, batch=batch)
        for batch in (1, 7, len(scores))
    ]
    assert found[0] == found[1] == found[2]


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 9), st.data())
def test_top_k_is_a_stable_sort(seed: int, rows: int, columns: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, columns))
    scores = np.random.default_rng(seed).integers(0, 3, (rows, columns)).astype(np.float32)
    scores[scores == 2] = -np.inf
    items, values = top_k(scores, k)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(items, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))


def test_nobody_with_a_relevant_item_is_zero() -> None:
    found = rank(lambda users: np.zeros((len(users), 3), np.float32), sparse.csr_array((4, 3)))
    assert (found.recall, found.ndcg, found.active, found.users) == (0.0, 0.0, 0, 4)


def test_what_is_refused() -> None:
    one = sparse.csr_array(np.ones((2, 3)))
    score = lambda users: np.zeros((len(users), 3), np.float32)  # noqa: E731
    with pytest.raises(DataError, match="6 relevant items are masked"):
        rank(score, one, one)
    with pytest.raises(DataError, match="k = 0"):
        rank(score, one, k=0)
    with pytest.raises(DataError, match="denominator = 'most'"):
        rank(score, one, denominator="most")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="seen is"):
        rank(score, one, sparse.csr_array((1, 3)))
    with pytest.raises(DataError, match="NaN"):
        rank(lambda users: np.full((len(users), 3), np.nan, np.float32), one)
    with pytest.raises(DataError, match="k = 4 of 3"):
        top_k(np.zeros((1, 3), np.float32), 4)
