"""The classifier against scikit-learn's, and the protocol on labels that are known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from anabranch.graphs import GraphError
from anabranch.graphs.node_labels import multilabel_node_f1, one_vs_rest


def test_all_labels_at_once_are_liblinear_one_by_one() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(300, 6)).astype(np.float32)
    labels = vectors @ generator.normal(size=(6, 4)) + generator.normal(size=(300, 4)) > 0.5
    found = one_vs_rest(vectors, labels, 0.1)
    for j in range(4):
        single = LogisticRegression(C=0.1, solver="liblinear", tol=1e-8).fit(vectors, labels[:, j])
        expected = np.append(single.coef_, single.intercept_)
        np.testing.assert_allclose(found[:, j], expected, atol=2e-3)


def test_perfect_vectors_score_one_and_noise_scores_chance() -> None:
    generator = np.random.default_rng(0)
    labels = generator.random((600, 4)) < 0.3
    perfect = multilabel_node_f1(labels.astype(np.float32), labels, 0.5, c=10.0)
    assert perfect.micro == perfect.macro == 1.0
    noise = generator.normal(size=(600, 4)).astype(np.float32)
    assert multilabel_node_f1(noise, labels, 0.5).micro < 0.55


def test_nodes_without_labels_take_no_part() -> None:
    labels = np.zeros((10, 2), bool)
    labels[:4, 0] = labels[2:6, 1] = True
    vectors = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    changed = vectors.copy()
    changed[6:] = 100
    assert multilabel_node_f1(vectors, labels, 0.5) == multilabel_node_f1(changed, labels, 0.5)
    with pytest.raises(GraphError, match="one side empty"):
        multilabel_node_f1(vectors, labels, 0.01)
    with pytest.raises(GraphError, match="3 vectors"):
        multilabel_node_f1(vectors[:3], labels, 0.5)
