"""How long an engine step takes, learned from steps that ran.

One fitted object answers every question about step time: how many tokens fit in a latency
target, what a plan will take, and what time it is in a simulation.

    seconds = fixed + per_token * tokens + per_context * context

The form is SmartSpec's (Liu et al. 2024): weights are read once per step, every
token costs compute, and every context token costs a read of the cache.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

CORRECTION_RATE = 0.1
"""Weight of the newest observation in the online correction."""
FIRST_FIT = 8
REFIT_EVERY = 32
OUTLIER = 4.0
SURPRISE = 1.5
"""A step this many times slower or faster than predicted."""
MOST_SURPRISES = 4
"""After so many, the fit is of steps unlike those that come, and is made anew."""
WINDOW = 512


@dataclass
class CostModel:
    """Predicts the seconds of a step of ``tokens`` tokens that attend to ``context`` tokens."""

    fixed: float = 0.0
    per_token: float = 0.0
    per_context: float = 0.0
    correction: float = 1.0
    """Recent observed time over predicted time: follows a machine that gets busier."""
    _observed: deque[tuple[int, int, float]] = field(
        default_factory=lambda: deque(maxlen=WINDOW), repr=False
    )
    _unfitted: int = field(default=0, repr=False)
    _surprises: int = field(default=0, repr=False)

    @property
    def fitted(self) -> bool:
        """Whether there is anything to predict from."""
        return self.fixed + self.per_token + self.per_context > 0

    def predict(self, tokens: int, context: int) -> float:
        """Seconds of a step."""
        raw = self.fixed + self.per_token * tokens + self.per_context * context
        return raw * self.correction

    def invert(self, seconds: float, context: int = 0) -> int:
        """Most tokens that a step can have and still take at most ``seconds``; 0 if none."""
        left = seconds / self.correction - self.fixed - self.per_context * context
        if left <= 0:
            return 0
        return int(left / self.per_token) if self.per_token else 2**31

    def saturating_tokens(self, fraction: float = 0.85) -> int:
        """Fewest tokens per step that reach ``fraction`` of the best possible tokens per second.

        Throughput at b tokens is b / (fixed + per_token b), so b = f fixed / ((1 - f) per_token).
        """
        if not self.per_token:
            return 1
        return max(1, math.ceil(fraction * self.fixed / ((1 - fraction) * self.per_token)))

    def observe(self, tokens: int, context: int, seconds: float) -> None:
        """Learn from a step that ran. A clock that did not move teaches nothing."""
        if seconds <= 0:
            return
        predicted = self.predict(tokens, context)
        if predicted and not 1 / SURPRISE < seconds / predicted < SURPRISE:
            self._surprises += 1
        self._follow(tokens, context, seconds)
        self.record(tokens, context, seconds)
        self._unfitted += 1
        first = not self.fitted and len(self._observed) >= FIRST_FIT
        if first or self._unfitted >= REFIT_EVERY or self._surprises >= MOST_SURPRISES:
            self.fit()
            # The fit knows the whole window, but the machine may have changed within it.
            for step in self.observations[-REFIT_EVERY:]:
                self._follow(*step)

    @property
    def observations(self) -> tuple[tuple[int, int, float], ...]:
        """Tokens, context tokens and seconds of the latest steps."""
        return tuple(self._observed)

    def record(self, tokens: int, context: int, seconds: float) -> None:
        """Keep a step for the next :meth:`fit`, without acting on it now."""
        self._observed.append((tokens, context, seconds))

    def fit(self) -> None:
        """Least squares of the relative error over the observed steps, coefficients >= 0."""
        if len(self._observed) < 3:
            return
        rows = np.array(self._observed, dtype=float)
        features = np.column_stack([np.ones(len(rows)), rows[:, 0], rows[:, 1]])
        if self.fitted and self._surprises < MOST_SURPRISES:
            # A step that the system stalled says nothing; many such steps say that all is new.
            known = (self.fixed, self.per_token, self.per_context)
            ratio = rows[:, 2] / (features @ known * self.correction)
            usual = (ratio > 1 / OUTLIER) & (ratio < OUTLIER)
            if usual.mean() > 0.75:
                rows, features = rows[usual], features[usual]
        seconds = rows[:, 2]
        self.fixed, self.per_token, self.per_context = _non_negative(
            features / seconds[:, None], np.ones(len(rows))
        )
        self.correction = 1.0
        self._unfitted = self._surprises = 0

    def _follow(self, tokens: int, context: int, seconds: float) -> None:
        predicted = self.predict(tokens, context)
        if predicted > 0:
            # One stalled step, say a page-out, must not move every later decision.
            ratio = min(max(seconds / predicted, 1 / 4), 4.0)
            self.correction *= 1.0 + CORRECTION_RATE * (ratio - 1.0)


def _non_negative(features: np.ndarray, target: np.ndarray) -> tuple[float, float, float]:
    """Non-negative least squares: the best of the plain ones over every subset of columns."""
    columns = range(features.shape[1])
    solution, least = np.zeros(len(columns)), np.inf
    for size in range(len(columns), 0, -1):
        for active in map(list, combinations(columns, size)):
            coefficients, *_ = np.linalg.lstsq(features[:, active], target, rcond=None)
            error = float(np.linalg.norm(features[:, active] @ coefficients - target))
            if (coefficients >= 0).all() and error < least:
                solution, least = np.zeros(len(columns)), error
                solution[active] = coefficients
    return float(solution[0]), float(solution[1]), float(solution[2])
