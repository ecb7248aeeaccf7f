"""Full-ranking figures of recommenders: every item is ranked for every user.

There are no sampled candidates here: ranking against a sample changes which method is best
(Krichene and Rendle, "On sampled metrics for item recommendation", KDD 2020). Definitions differ
between papers in two switches; a :class:`Ranking` always states both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from anabranch.training.errors import DataError

Denominator = Literal["relevant", "capped"]
Average = Literal["active", "all"]
Score = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""``score(users [b])`` -> scores [b, items] that may be written to."""


@dataclass(frozen=True)
class Ranking:
    """Means over users of what the first ``k`` items of their rankings hold.

    ``recall`` divides a user's hits by its relevant items, or by at most k of them where
    ``denominator`` is "capped". ``ndcg`` has gains 1 / log2(rank + 1) and an ideal cut at k.
    ``f1`` is the harmonic mean of the mean precision and the mean uncapped recall, as published
    for amazon-electronics. Means are over the ``active`` users, which have a relevant item; with
    ``average`` "all" the others count as zeros. All are 0 where nobody is active.
    """

    k: int
    recall: float
    ndcg: float
    precision: float
    f1: float
    hit_rate: float
    active: int
    users: int
    denominator: Denominator
    average: Average

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def rank(
    score: Score,
    relevant: Any,
    seen: Any = None,
    *,
    k: int = 20,
    denominator: Denominator = "relevant",
    average: Average = "active",
    batch: int = 512,
) -> Ranking:
    """Rank all items for every user with a relevant one.

    ``relevant`` and ``seen`` are sparse matrices [users, items]; seen items are never ranked.
    Equal scores are ranked by item number. Only ``batch`` users are scored at a time; it changes
    nothing else. Raises :class:`DataError` where an item is both, or a score is NaN.
    """
    relevant = relevant.tocsr()
    if k < 1 or batch < 1:
        raise DataError(f"k = {k}, batch = {batch}: both are at least 1")
    if denominator not in ("relevant", "capped") or average not in ("active", "all"):
        raise DataError(
            f"denominator = {denominator!r}, average = {average!r}: choose 'relevant' or "
            f"'capped', and 'active' or 'all'"
        )
    if seen is not None and seen.shape != relevant.shape:
        raise DataError(f"seen is {list(seen.shape)}, relevant is {list(relevant.shape)}")
    if seen is not None and (both := relevant.multiply(seen).tocoo()).nnz:
        raise DataError(
            f"{both.nnz} relevant items are masked as seen, the first is item {both.col[0]} of "
            f"user {both.row[0]}: split before training"
        )
    users, items = relevant.shape
    counts = np.diff(relevant.indptr)
    active = np.flatnonzero(counts)
    depth = min(k, items)
    hits = np.zeros((len(active), depth), bool)
    for start in range(0, len(active), batch):
        block = active[start : start + batch]
        scores = masked(score(block), None if seen is None else seen[block])
        best, _ = top_k(scores, depth)
        hits[start : start + batch] = _at(relevant[block].toarray() > 0, best)

    wanted = counts[active]
    gains = 1 / np.log2(np.arange(2, depth + 2))
    ideal = np.concatenate([[0.0], np.cumsum(gains)])[np.minimum(wanted, depth)]
    found = hits.sum(axis=1)
    most = np.minimum(wanted, k) if denominator == "capped" else wanted
    over = users if average == "all" else len(active)

    def mean(values: NDArray[Any]) -> float:
        return float(values.sum() / over) if over else 0.0

    return Ranking(
        k=k,
        recall=mean(found / most),
        ndcg=mean((hits * gains).sum(axis=1) / ideal),
        precision=mean(found / k),
        f1=_harmonic(mean(found / k), mean(found / wanted)),
        hit_rate=mean(found > 0),
        active=len(active),
        users=users,
        denominator=denominator,
        average=average,
    )


def masked(scores: NDArray[np.float32], seen: Any) -> NDArray[np.float32]:
    """The scores [b, items] with -inf where ``seen`` [b, items] has an entry; in place."""
    if seen is not None:
        rows = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
        scores[rows, seen.indices] = -np.inf
    return scores


def top_k(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``k`` largest scores of each row, best first: columns [b, k] and scores [b, k].

    Equal scores go by column number, also where they straddle the last place.
    """
    if np.isnan(scores).any():
        raise DataError("a score is NaN: the recommender has diverged")
    rows, columns = scores.shape
    if not 0 <= k <= columns:
        raise DataError(f"k = {k} of {columns} items")
    if k == 0 or rows == 0:
        return np.empty((rows, k), np.int64), np.empty((rows, k), np.float32)
    last = np.partition(scores, columns - k, axis=1)[:, columns - k, None]
    above, level = scores > last, scores == last
    places = k - above.sum(axis=1, keepdims=True)
    chosen = above | (level & (np.cumsum(level, axis=1) <= places))
    candidates = np.nonzero(chosen)[1].reshape(rows, k)
    values = _at(scores, candidates)
    order = np.argsort(-values, axis=1, kind="stable")
    return _at(candidates, order), _at(values, order)


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def _at(values: NDArray[Any], columns: NDArray[np.int64]) -> NDArray[Any]:
    return np.take_along_axis(values, columns, axis=1)
