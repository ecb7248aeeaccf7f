"""Figures of classifiers: one label, several, or several with a value each.

Definitions of the several-label figures are those of Rethinking Scale (Carammia et al., 2024);
whatever scikit-learn has is scikit-learn's. A prediction that could not be read is None and is
wrong everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anabranch.errors import MissingExtra
from anabranch.training.errors import DataError
from anabranch.training.score_statistics import Interval, difference_of_scores, mcnemar

NOT_PRESENT = "not present"
UNREAD = "(unread)"

Labels = Sequence[str]


@dataclass(frozen=True)
class ClassFigures:
    """One label against all others. ``balanced_accuracy`` is mean of sensitivity and specificity.

    NaN where the rows have no text with the label, or none without.
    """

    precision: float
    sensitivity: float
    specificity: float
    f1: float
    balanced_accuracy: float
    rows: int


@dataclass(frozen=True)
class SingleFigures:
    """Figures of one label a row; averages are over the labels of the list.

    ``macro`` counts every label the same, ``weighted`` by its rows.
    """

    rows: int
    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    weighted_precision: float
    weighted_recall: float
    weighted_f1: float
    macro_balanced_accuracy: float
    unread: int
    by_label: Mapping[str, ClassFigures]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def single_label(
    references: Sequence[str], predictions: Sequence[str | None], labels: Labels
) -> SingleFigures:
    """Figures of single labels. Raises :class:`DataError` without rows or for unequal lengths."""
    metrics = _metrics()
    answers = _answers(references, predictions)
    averages = {
        average: metrics.precision_recall_fscore_support(
            references, answers, labels=list(labels), average=average, zero_division=0
        )
        for average in ("macro", "weighted")
    }
    (macro_p, macro_r, macro_f, _), (p, r, f, _) = averages["macro"], averages["weighted"]
    by_label = {label: _one_label(references, answers, label) for label in labels}
    balanced = [
        figures.balanced_accuracy
        for figures in by_label.values()
        if not math.isnan(figures.balanced_accuracy)
    ]
    return SingleFigures(
        rows=len(references),
        accuracy=float(metrics.accuracy_score(references, answers)),
        macro_precision=float(macro_p),
        macro_recall=float(macro_r),
        macro_f1=float(macro_f),
        weighted_precision=float(p),
        weighted_recall=float(r),
        weighted_f1=float(f),
        macro_balanced_accuracy=float(np.mean(balanced)) if balanced else float("nan"),
        unread=sum(p is None for p in predictions),
        by_label=by_label,
    )


@dataclass(frozen=True)
class MultiFigures:
    """Figures of label sets.

    ``hamming_loss`` is the share of wrong (row, label) decisions, ``jaccard`` the mean of
    |T and P| / |T or P| (1 for two empty sets), ``exact`` the share of equal sets, ``same_count``
    the share of sets that are as large as the true one and have a label in common with it, or are
    empty like it.
    """

    rows: int
    hamming_loss: float
    jaccard: float
    exact: float
    same_count: float
    macro_f1: float
    unread: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def multi_label(
    references: Sequence[frozenset[str]],
    predictions: Sequence[frozenset[str] | None],
    labels: Labels,
) -> MultiFigures:
    """Figures of label sets. Raises :class:`DataError` without rows or for unequal lengths."""
    metrics = _metrics()
    _require_rows(references, predictions)
    everything = frozenset(labels)
    # What was not read is wrong about each label, so that no figure gains from it.
    sets = [
        everything - truth if p is None else p
        for truth, p in zip(references, predictions, strict=True)
    ]
    truth, guess = _indicator(references, labels), _indicator(sets, labels)
    return MultiFigures(
        len(references),
        float(metrics.hamming_loss(truth, guess)),
        float(metrics.jaccard_score(truth, guess, average="samples", zero_division=1)),
        float(metrics.accuracy_score(truth, guess)),
        float(np.mean([_same_count(t, p) for t, p in zip(references, sets, strict=True)])),
        float(metrics.f1_score(truth, guess, average="macro", zero_division=0)),
        sum(p is None for p in predictions),
    )


def value_confusion(
    references: Sequence[Mapping[str, str]],
    predictions: Sequence[Mapping[str, str] | None],
    labels: Labels,
    values: Sequence[str],
) -> dict[str, dict[str, int]]:
    """Counts of (row, label) pairs: true value -> predicted value, with "not present".

    An answer that was not read is counted under ``(unread)``.
    """
    columns = [*values, NOT_PRESENT, UNREAD]
    counts = {value: dict.fromkeys(columns, 0) for value in [*values, NOT_PRESENT]}
    for truth, guess in zip(references, predictions, strict=True):
        for label in labels:
            seen = UNREAD if guess is None else guess.get(label, NOT_PRESENT)
            counts[truth.get(label, NOT_PRESENT)][seen] += 1
    return counts


def interval(
    score: Callable[[Sequence[Any], Sequence[Any]], float],
    references: Sequence[Any],
    predictions: Sequence[Any],
    seed: int = 0,
) -> Interval:
    """Any figure ``score(references, predictions)`` with its 95 % bootstrap interval over rows."""

    def of(rows: Sequence[int]) -> float:
        return score([references[i] for i in rows], [predictions[i] for i in rows])

    return difference_of_scores(of, lambda _: 0.0, len(references), seed)


@dataclass(frozen=True)
class Comparison:
    """Two classifiers on the same rows: rows that only one has right, and McNemar's p-value."""

    only_first: int
    only_second: int
    p_value: float


def compare(references: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> Comparison:
    """Exact two-sided McNemar test that both are right equally often."""
    right = [[p == t for p, t in zip(side, references, strict=True)] for side in (first, second)]
    pairs = list(zip(*right, strict=True))
    return Comparison(
        sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs), mcnemar(*right)
    )


def human_ceiling(ratings: Sequence[Sequence[str]], references: Sequence[str]) -> float:
    """How often a single rater says what the reference says, mean over rows."""
    if not ratings or not all(ratings):
        raise DataError("a human ceiling needs at least one rating of every row")
    shares = [
        sum(rating == truth for rating in given) / len(given)
        for given, truth in zip(ratings, references, strict=True)
    ]
    return float(np.mean(shares))


def _answers(references: Sequence[str], predictions: Sequence[str | None]) -> list[str]:
    _require_rows(references, predictions)
    return [UNREAD if p is None else p for p in predictions]


def _one_label(references: Sequence[str], answers: Sequence[str], label: str) -> ClassFigures:
    truth = np.array([reference == label for reference in references])
    guess = np.array([answer == label for answer in answers])
    hits = float((truth & guess).sum())
    sensitivity = float(hits / truth.sum()) if truth.any() else float("nan")
    specificity = float((~truth & ~guess).sum() / (~truth).sum()) if not truth.all() else np.nan
    return ClassFigures(
        precision=float(hits / guess.sum()) if guess.any() else 0.0,
        sensitivity=sensitivity,
        specificity=specificity,
        f1=float(2 * hits / (truth.sum() + guess.sum())) if truth.any() or guess.any() else 0.0,
        balanced_accuracy=(sensitivity + specificity) / 2,
        rows=int(truth.sum()),
    )


def _same_count(truth: frozenset[str], guess: frozenset[str]) -> bool:
    return len(truth) == len(guess) and (not truth or bool(truth & guess))


def _require_rows(references: Sequence[Any], predictions: Sequence[Any]) -> None:
    if len(references) != len(predictions) or not references:
        raise DataError(
            f"figures need as many predictions as references and at least one; "
            f"there are {len(predictions)} and {len(references)}"
        )


def _indicator(sets: Sequence[frozenset[str]], labels: Labels) -> np.ndarray:
    """1 where a row has a label, [rows, labels]."""
    return np.array([[label in chosen for label in labels] for chosen in sets], dtype=np.int64)


def _metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise MissingExtra("scikit-learn", "train") from None
    return metrics
