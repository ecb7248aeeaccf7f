"""Figures of classifiers against scikit-learn and against their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from anabranch.evaluation.classification import (
    UNREAD,
    compare,
    human_ceiling,
    interval,
    multi_label,
    single_label,
    value_confusion,
)
from anabranch.training.errors import DataError

LABELS = ["a", "b", "c"]
pairs = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), min_size=1, max_size=30
)


@given(pairs)
def test_single_label_figures_are_scikit_learns(rows: list[tuple[str, Any]]) -> None:
    truth, guess = [t for t, _ in rows], [p for _, p in rows]
    figures = single_label(truth, guess, LABELS)
    answers = [p or UNREAD for p in guess]
    assert figures.accuracy == metrics.accuracy_score(truth, answers)
    for average, found in (("macro", figures.macro_f1), ("weighted", figures.weighted_f1)):
        expected = metrics.f1_score(truth, answers, labels=LABELS, average=average, zero_division=0)
        assert found == pytest.approx(expected)
    for label, one in figures.by_label.items():
        binary = [t == label for t in truth], [p == label for p in guess]
        assert one.precision == pytest.approx(metrics.precision_score(*binary, zero_division=0))
        assert one.f1 == pytest.approx(metrics.f1_score(*binary, zero_division=0))
        assert one.rows == sum(binary[0])
        if any(binary[0]) and not all(binary[0]):
            assert one.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(*binary))
            assert one.sensitivity == pytest.approx(metrics.recall_score(*binary))
            specificity = metrics.recall_score(*binary, pos_label=False)
            assert one.specificity == pytest.approx(specificity)
    assert figures.unread == guess.count(None)


def test_a_label_without_rows_has_no_balanced_accuracy() -> None:
    figures = single_label(["a", "b"], ["a", "a"], LABELS)
    assert math.isnan(figures.by_label["c"].balanced_accuracy)
    assert figures.macro_balanced_accuracy == pytest.approx(0.5)


sets = st.frozensets(st.sampled_from(LABELS))


@given(st.lists(st.tuples(sets, sets), min_size=1, max_size=20))
def test_multi_label_figures_follow_their_definitions(
    rows: list[tuple[frozenset[str], frozenset[str]]],
) -> None:
    figures = multi_label([t for t, _ in rows], [p for _, p in rows], LABELS)
    jaccard = [len(t & p) / len(t | p) if t | p else 1.0 for t, p in rows]
    assert figures.jaccard == pytest.approx(np.mean(jaccard))
    assert figures.hamming_loss == pytest.approx(np.mean([len(t ^ p) / 3 for t, p in rows]))
    assert figures.exact == np.mean([t == p for t, p in rows])
    assert figures.exact <= figures.same_count + 1e-12


def test_an_unread_set_is_wrong_for_every_label() -> None:
    figures = multi_label([frozenset("a"), frozenset()], [None, None], LABELS)
    assert (figures.hamming_loss, figures.jaccard, figures.exact) == (1, 0, 0)
    assert figures.unread == 2


def test_values_are_counted_with_not_present() -> None:
    truth = [{"a": "low", "b": "high"}, {}]
    counts = value_confusion(truth, [{"a": "high", "c": "low"}, None], LABELS, ["low", "high"])
    assert counts["low"]["high"] == 1
    assert counts["high"]["not present"] == 1
    assert counts["not present"] == {"low": 1, "high": 0, "not present": 0, UNREAD: 3}
    assert sum(sum(row.values()) for row in counts.values()) == 6


def test_intervals_contain_the_figure_and_shrink_with_rows() -> None:
    def accuracy(truth: Any, guess: Any) -> float:
        return float(np.mean([t == p for t, p in zip(truth, guess, strict=True)]))

    truth = ["a"] * 40
    guess = ["a"] * 30 + ["b"] * 10
    small = interval(accuracy, truth, guess)
    large = interval(accuracy, truth * 20, guess * 20)
    assert small.value == large.value == 0.75
    assert small.low < 0.75 < small.high
    assert large.high - large.low < (small.high - small.low) / 3
    assert interval(accuracy, truth, guess) == small


def test_mcnemar_counts_what_only_one_has_right() -> None:
    truth = ["a"] * 12
    found = compare(truth, ["a"] * 10 + ["b"] * 2, ["b"] * 8 + ["a"] * 4)
    assert (found.only_first, found.only_second) == (8, 2)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert compare(truth, truth, truth).p_value == 1


def test_the_human_ceiling_is_the_share_of_raters_who_agree() -> None:
    assert human_ceiling([["a", "a", "b"], ["b"]], ["a", "b"]) == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(DataError, match="at least one rating"):
        human_ceiling([[]], ["a"])


@pytest.mark.parametrize(("truth", "guess"), [([], []), (["a"], [])])
def test_no_rows_or_unequal_rows_are_refused(truth: Any, guess: Any) -> None:
    with pytest.raises(DataError, match="as many predictions as references"):
        single_label(truth, guess, LABELS)
    with pytest.raises(DataError, match="as many predictions as references"):
        multi_label(truth, guess, LABELS)
