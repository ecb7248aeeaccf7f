"""Whether a difference on held-out rows is more than chance: bootstrap intervals, McNemar's test.

Rows are the unit of resampling, because the tokens of one answer are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
BLOCK = 100
"""Resamples drawn at once, which bounds the memory."""
CONFIDENCE = 0.95

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval (percentile method, Efron 1979)."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def mean_per_token(nll: Floats, tokens: Floats, seed: int = 0) -> Interval:
    """NLL per answer token from sums per row ``[rows]``; each resample is a ratio of sums."""
    return _interval(lambda drawn: nll[drawn].sum(1) / tokens[drawn].sum(1), len(nll), seed)


def difference_per_token(tuned: Floats, base: Floats, tokens: Floats, seed: int = 0) -> Interval:
    """Tuned minus base NLL per token, resampling the same rows for both (paired bootstrap)."""
    return mean_per_token(tuned - base, tokens, seed)


def difference_of_scores(
    score: Callable[[Sequence[int]], float],
    base: Callable[[Sequence[int]], float],
    rows: int,
    seed: int = 0,
) -> Interval:
    """Tuned minus base of any figure of a set of row indices, paired."""

    def differences(drawn: Indices) -> Floats:
        return np.array([score(chosen) - base(chosen) for chosen in drawn.tolist()])

    return _interval(differences, rows, seed)


def mcnemar(base: Sequence[bool], tuned: Sequence[bool]) -> float:
    """Two-sided exact p-value that both are right equally often on the same rows.

    Only rows that one of them has right count (McNemar 1947; binomial form).
    """
    gained = sum(t and not b for b, t in zip(base, tuned, strict=True))
    lost = sum(b and not t for b, t in zip(base, tuned, strict=True))
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def _interval(figures: Callable[[Indices], Floats], rows: int, seed: int) -> Interval:
    """``figures`` maps row indices ``[resamples, rows]`` to a figure for each resample."""
    if rows == 0:
        return Interval(math.nan, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    drawn = [
        figures(generator.integers(0, rows, (BLOCK, rows))) for _ in range(0, RESAMPLES, BLOCK)
    ]
    edge = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(drawn), [edge, 100 - edge])
    return Interval(float(figures(np.arange(rows)[None])[0]), float(low), float(high))
