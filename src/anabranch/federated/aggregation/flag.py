"""Flag Aggregator (Almasi et al., ICLR 2024): average what a common subspace explains.

The updates, scaled to unit length, are columns of G [d, p]. Sought is an orthonormal Y [d, m] with

    A(Y) = sum_i sqrt(1 - |Y^T g_i|^2)
         + regulariser / (p (p - 1)) sum_{i != j} sqrt(1 - |Y^T (g_i - g_j)|^2 / |g_i - g_j|^2)

small, by iteratively reweighted least squares; the result is the mean of the projections Y Y^T g_i.
Everything happens in the p x p Gram matrix: Y = G C is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation.base import Aggregate, Rule
from anabranch.federated.aggregation.gram import gram
from anabranch.federated.errors import AggregationError, TooFewUpdates

_EPSILON = 1e-7
_SMALLEST_EIGENVALUE = 1e-12
_MOST_WITH_PAIRS = 64


class Flag(Rule):
    """The mean of the updates' projections onto a subspace that most of them share.

    Needs no number of bad updates. ``rank`` is the dimension (default (p + 1) / 2, rounded up; more
    than p counts as p), ``regulariser`` weighs the differences of pairs, ``iterations`` bounds the
    reweighting. Scores are in [0, 1]: how much of an update the subspace explains.

    Lengths do not count, so the result is scaled by the median length of the updates
    (``rescale="median"``). ``rescale="none", divide_by="m"`` is the authors' code. Weights of the
    updates count only with ``weighted``: they are a way in for whoever lies about them.

    Weak where at least ``rank`` bad updates agree on a direction.
    """

    name = "flag"
    needs_differences = True

    def __init__(
        self,
        rank: int | None = None,
        regulariser: float = 0.0,
        iterations: int = 5,
        tol: float = 1e-10,
        rescale: Literal["median", "none"] = "median",
        divide_by: Literal["p", "m"] = "p",
        weighted: bool = False,
    ) -> None:
        if rank is not None and rank < 1:
            raise ConfigurationError(f"rank is at least 1, not {rank}")
        if not (regulariser >= 0 and math.isfinite(regulariser)):
            raise ConfigurationError(f"regulariser is at least 0, not {regulariser}")
        if iterations < 1:
            raise ConfigurationError(f"iterations is at least 1, not {iterations}")
        if rescale not in ("median", "none") or divide_by not in ("p", "m"):
            raise ConfigurationError("rescale is median or none, divide_by is p or m")
        self.rank, self.regulariser, self.iterations, self.tol = rank, regulariser, iterations, tol
        self.rescale, self.divide_by, self.weighted = rescale, divide_by, weighted

    def combine(self, rows: Tensor, weights: Tensor) -> Aggregate:
        """[p, d] -> [d]. Updates of zeros have no direction: they are left out, with score 0."""
        p = len(rows)
        if p == 1:
            return Aggregate(rows[0].clone(), torch.ones(1, dtype=torch.float64))
        products = gram(rows)
        lengths = products.diagonal().sqrt()
        there = lengths > 0
        scores = torch.zeros(p, dtype=torch.float64)
        if not there.any():
            return Aggregate(torch.zeros_like(rows[0]), scores)
        inverse = 1 / lengths[there]
        # The diagonal of unit vectors is 1, whatever rounding says.
        unit = (products[there][:, there] * inverse[:, None] * inverse).fill_diagonal_(1.0)
        p = len(unit)
        share = weights[there] if self.weighted else torch.ones(p, dtype=torch.float64)
        share = share / share.sum()
        rank = min(self.rank or math.ceil((p + 1) / 2), p)
        found = subspace(unit, rank, self.regulariser, self.iterations, self.tol, p * share)
        scores[there] = found.scores
        # d = G C C^T K share: coefficients of the unit vectors, then of the updates themselves.
        coefficients = found.basis @ (found.basis.T @ (unit @ share))
        if self.divide_by == "m":
            coefficients = coefficients * (p / found.basis.shape[1])
        if self.rescale == "median":
            coefficients = coefficients * lengths[there].quantile(0.5)
        combined = torch.zeros(rows.shape[1], dtype=torch.float64)
        for row, factor in zip(rows[there], (coefficients * inverse).tolist(), strict=True):
            combined += row.to(torch.float64) * factor
        return Aggregate(combined.to(rows.dtype), scores)


@dataclass(frozen=True)
class Subspace:
    """``basis`` C [p, m] with Y = G C; ``scores`` [p]; the objective after each accepted step."""

    basis: Tensor
    scores: Tensor
    history: tuple[float, ...]


def subspace(
    unit: Tensor,
    rank: int,
    regulariser: float = 0.0,
    iterations: int = 5,
    tol: float = 1e-10,
    importance: Tensor | None = None,
) -> Subspace:
    """The subspace of unit vectors with the Gram matrix ``unit`` [p, p], float64.

    The first step is plain principal components (the flag mean); a step that makes the objective
    worse is not taken. ``importance`` [p] multiplies the columns' weights.
    Raises :class:`AggregationError` if the matrix is not finite.
    """
    p = len(unit)
    if p < 1:
        raise TooFewUpdates("flag", p, 1)
    if not unit.isfinite().all():
        rows = [i for i in range(p) if not unit[i].isfinite().all()]
        raise AggregationError(f"flag: the inner products of updates {rows} are not finite")
    if not 1 <= rank <= p:
        raise ConfigurationError(f"rank is from 1 to {p}, not {rank}")
    columns, pair_weight = _columns(unit, regulariser)
    scale = torch.ones(columns.shape[1], dtype=torch.float64)
    fixed = torch.full((columns.shape[1],), pair_weight, dtype=torch.float64)
    fixed[:p] = 1.0 if importance is None else importance
    best: Subspace | None = None
    for _ in range(iterations):
        basis = _principal(unit, columns, (fixed * scale).sqrt(), rank)
        explained = (basis.T @ unit @ columns).square().sum(0).clamp(0, 1)
        objective = float((fixed * (1 - explained).sqrt()).sum())
        if best is not None and objective > best.history[-1]:
            break
        gained = math.inf if best is None else best.history[-1] - objective
        history = (*(best.history if best else ()), objective)
        best = Subspace(basis, explained[:p], history)
        if gained < tol:
            break
        scale = (1 - explained + _EPSILON).rsqrt()
    assert best is not None
    return best


def _columns(unit: Tensor, regulariser: float) -> tuple[Tensor, float]:
    """What the subspace should explain, in terms of the unit vectors [p, columns], and the weight
    of the pairs: the vectors themselves, then their differences of unit length.
    """
    p = len(unit)
    identity = torch.eye(p, dtype=torch.float64)
    if not regulariser or p < 2:
        return identity, 0.0
    if p > _MOST_WITH_PAIRS:
        raise ConfigurationError(
            f"the regulariser looks at all pairs, of at most {_MOST_WITH_PAIRS} updates; there are "
            f"{p}"
        )
    pairs = [
        (identity[i] - identity[j]) / math.sqrt(squared)
        for i in range(p)
        for j in range(p)
        if i != j and (squared := float(2 - 2 * unit[i, j])) > _SMALLEST_EIGENVALUE
    ]
    weight = regulariser / (p * (p - 1))
    return torch.stack([*identity, *pairs], dim=1), weight


def _principal(unit: Tensor, columns: Tensor, scale: Tensor, rank: int) -> Tensor:
    """C so that G C are the first ``rank`` left singular vectors of ``G columns diag(scale)``."""
    scaled = columns * scale
    values, vectors = torch.linalg.eigh(scaled.T @ unit @ scaled)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    kept = values > _SMALLEST_EIGENVALUE * values[0]
    return scaled @ vectors[:, kept] / values[kept].sqrt()
