"""How accuracy grows with labelled rows, and how many a target would need.

``accuracy = a - b n**-c`` with 0 <= a <= 1, b >= 0, 0 < c <= 2: the usual power law of learning
curves (Rethinking Scale, section 5, reads such curves by eye).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import MissingExtra
from anabranch.evaluation.plotting import Plot
from anabranch.training.errors import DataError

Point = tuple[int, float]
"""Labelled rows, and the accuracy after training on them."""


@dataclass(frozen=True)
class LearningCurve:
    """``accuracy(n) = ceiling - gap * n**-rate``, fitted to ``points``.

    ``error`` is the root of the mean squared difference from the points.
    """

    ceiling: float
    gap: float
    rate: float
    error: float
    points: tuple[Point, ...]

    def accuracy(self, rows: float) -> float:
        """Expected accuracy after training on so many rows."""
        return self.ceiling - self.gap * rows**-self.rate

    def rows_for(self, target: float) -> int | None:
        """Rows needed for an accuracy; None if the fitted curve never reaches it."""
        if target <= self.accuracy(1):
            return 1
        if target >= self.ceiling:
            return None
        rows = (self.gap / (self.ceiling - target)) ** (1 / self.rate)
        return math.ceil(rows) if rows < 1e12 else None

    def plot(
        self, title: str = "learning curve", levels: Mapping[str, float] | None = None
    ) -> Plot:
        """The points and the fitted curve, over rows on a logarithmic scale."""
        low, high = min(n for n, _ in self.points), max(n for n, _ in self.points)
        grid = np.geomspace(low, max(high, low + 1), 40)
        curve = [(float(n), self.accuracy(float(n))) for n in grid]
        label = f"{self.ceiling:.2f} - {self.gap:.2f} n^-{self.rate:.2f}"
        return Plot(
            title,
            "labelled rows",
            "accuracy",
            {"measured": [(float(n), y) for n, y in self.points], label: curve},
            marks=("measured",),
            levels=dict(levels or {}),
            x_scale="log",
        )


def fit_curve(points: Sequence[Point]) -> LearningCurve:
    """Least squares within the bounds above. Raises :class:`DataError` below three sizes."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingExtra("scipy", "train") from None
    sizes = np.array([n for n, _ in points], dtype=np.float64)
    reached = np.array([y for _, y in points], dtype=np.float64)
    if len(set(sizes.tolist())) < 3 or sizes.min() < 1:
        raise DataError(
            f"a learning curve has three parameters and needs at least three sizes from 1 row on, "
            f"not {sorted(set(sizes.tolist()))}"
        )

    def residuals(parameters: np.ndarray) -> np.ndarray:
        ceiling, gap, rate = parameters
        return ceiling - gap * sizes**-rate - reached

    # The fit is not convex in the rate: take the best of several starts.
    fits = [
        least_squares(residuals, (min(1.0, reached.max() + 0.05), 0.5, rate),
                      bounds=((0, 0, 1e-3), (1.0, np.inf, 2.0)))
        for rate in (0.1, 0.5, 1.0)
    ]  # fmt: skip
    best = min(fits, key=lambda fit: fit.cost)
    ceiling, gap, rate = map(float, best.x)
    error = float(np.sqrt(np.mean(residuals(best.x) ** 2)))
    return LearningCurve(ceiling, gap, rate, error, tuple((int(n), float(y)) for n, y in points))


def nested_subsets(
    classes: Sequence[Hashable], sizes: Sequence[int], seed: int = 0
) -> dict[int, list[int]]:
    """Row indices for each size; each subset contains the smaller ones and keeps the class shares.

    Every prefix of the order has each class within one row of its share, for two classes; within
    a few for more.
    """
    if not sizes or min(sizes) < 1 or max(sizes) > len(classes):
        raise DataError(f"sizes must be 1 to {len(classes)} (the rows), not {list(sizes)}")
    generator = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for index in generator.permutation(len(classes)).tolist():
        members.setdefault(classes[index], []).append(index)
    places = [
        ((rank + generator.random()) / len(rows), row)
        for rows in members.values()
        for rank, row in enumerate(rows)
    ]
    order = [row for _, row in sorted(places)]
    return {size: order[:size] for size in sorted(sizes)}


def measure(
    train_and_score: Callable[[Sequence[int], int], float],
    classes: Sequence[Hashable],
    sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
) -> list[Point]:
    """``train_and_score(rows, seed)`` at every size and seed, on nested stratified subsets."""
    return [
        (size, train_and_score(rows, seed))
        for seed in seeds
        for size, rows in nested_subsets(classes, sizes, seed).items()
    ]
