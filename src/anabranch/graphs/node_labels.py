"""How well node vectors predict node labels: the field's protocol for multi-label graphs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from anabranch.graphs.errors import GraphError


@dataclass(frozen=True)
class F1:
    """F1 pooled over all labels, and its mean over the labels."""

    micro: float
    macro: float


def multilabel_node_f1(
    vectors: NDArray[np.float32],
    labels: NDArray[np.bool_],
    train_share: float,
    *,
    c: float = 0.1,
    seed: int = 0,
) -> F1:
    """Train one logistic regression a label on a random share of the nodes, test on the others.

    ``vectors`` [n, dim], ``labels`` [n, labels]. A test node gets as many labels as it truly has,
    the most probable ones: the convention of Tang and Liu (KDD 2009), which DeepWalk and its
    successors follow. ``c`` is the inverse strength of the L2 penalty. Nodes without labels take
    no part. A label that no training node has is never predicted and counts as F1 0 if a test
    node has it; labels without test nodes do not count.
    """
    labels = np.asarray(labels, bool)
    if len(vectors) != len(labels):
        raise GraphError(f"{len(vectors)} vectors for the labels of {len(labels)} nodes")
    labelled = np.flatnonzero(labels.any(axis=1))
    order = np.random.default_rng(seed).permutation(labelled)
    cut = round(train_share * len(order))
    if not 0 < cut < len(order):
        raise GraphError(f"a share of {train_share} of {len(order)} nodes leaves one side empty")
    train, test = order[:cut], order[cut:]
    model = one_vs_rest(vectors[train], labels[train], c)
    scores = vectors[test] @ model[:-1] + model[-1]
    truth = labels[test]
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1)
    predicted = rank < truth.sum(axis=1, keepdims=True)
    hits = (predicted & truth).sum(axis=0)
    both = predicted.sum(axis=0) + truth.sum(axis=0)
    counts = truth.any(axis=0)
    return F1(float(2 * hits.sum() / both.sum()), float(np.mean(2 * hits[counts] / both[counts])))


def one_vs_rest(
    vectors: NDArray[np.float32], labels: NDArray[np.bool_], c: float
) -> NDArray[np.float32]:
    """Logistic regressions of all labels at once: coefficients [dim + 1, labels], intercept last.

    Each minimises c * (sum of its log losses) + |coefficients|^2 / 2, intercept included, as
    liblinear does one by one. Together they share every product with ``vectors``, which is ten
    times faster; the sum is convex, so that the minimum is the same.
    """
    inputs = np.hstack([vectors, np.ones((len(vectors), 1), np.float32)], dtype=np.float32)
    wanted = labels.astype(np.float32)
    shape = inputs.shape[1], labels.shape[1]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        model = flat.reshape(shape)
        scores = inputs @ model.astype(np.float32)
        losses = np.logaddexp(0, scores) - wanted * scores
        slope = inputs.T @ (expit(scores) - wanted)
        value = c * losses.sum(dtype=np.float64) + 0.5 * float(flat @ flat)
        return value, (c * slope + model).ravel()

    options = {"maxiter": 500, "ftol": 1e-9, "gtol": 1e-3}
    found = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(shape).astype(np.float32)
