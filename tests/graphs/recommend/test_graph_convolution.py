"""LightGCN and UltraGCN against dense computations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.errors import UnknownName
from anabranch.graphs.recommend import (
    Interactions,
    LightGCN,
    MatrixFactorization,
    RecommendError,
    UltraGCN,
    cooccurrence,
    cooccurrence_neighbours,
    limit_weights,
)
from anabranch.graphs.recommend.lightgcn import _Smooth, normalised_adjacency, smooth
from anabranch.graphs.recommend.model import new_table
from anabranch.graphs.recommend.objective import PairObjective
from anabranch.graphs.recommend.sampler import NegativeSampler
from anabranch.graphs.recommend.ultragcn import PRESETS, ConstraintModel
from tests.graphs.recommend.samples import PLANTED, interactions

CONNECTED = Interactions.from_pairs(
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4], [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6]
)
"""12 nodes in one piece."""


def dense_adjacency(train: Interactions) -> NDArray[np.float64]:
    matrix = train.csr().toarray().astype(np.float64)
    users, items = matrix.shape
    return np.block([[np.zeros((users, users)), matrix], [matrix.T, np.zeros((items, items))]])


@settings(max_examples=20)
@given(interactions(), st.integers(0, 4))
def test_smoothing_is_the_mean_of_dense_powers_and_its_own_adjoint(
    train: Interactions, layers: int
) -> None:
    adjacency = dense_adjacency(train)
    degree = adjacency.sum(axis=1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1)), 0)
    dense = torch.from_numpy(scale[:, None] * adjacency * scale).float()
    sparse = normalised_adjacency(train)
    torch.testing.assert_close(sparse.to_dense(), dense)
    vectors = torch.randn(len(dense), 3, generator=torch.Generator().manual_seed(0))
    plain, custom = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    power, total = plain, plain
    for _ in range(layers):
        power = dense @ power
        total = total + power
    expected = total / (layers + 1)
    found: Any = _Smooth.apply(custom, sparse, layers)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(smooth(vectors, sparse, layers), expected.detach())
    weights = torch.randn_like(vectors)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(custom.grad, plain.grad)


def test_lightgcn_without_layers_is_matrix_factorisation() -> None:
    options: dict[str, Any] = {"dim": 8, "epochs": 2, "batch": 100}
    one = LightGCN(layers=0, **options).fit(PLANTED)
    other = MatrixFactorization(**options).fit(PLANTED)
    np.testing.assert_allclose(one.item_factors_, other.item_factors_, atol=1e-6)


def test_limit_weights_hold_at_the_fixed_point_of_propagation() -> None:
    """Infinitely many convolutions with self-loops: e_u is the beta-weighted sum of its items."""
    adjacency = dense_adjacency(CONNECTED) + np.eye(12)
    scale = 1 / np.sqrt(adjacency.sum(axis=1))
    convolution = scale[:, None] * adjacency * scale
    vectors = np.random.default_rng(0).standard_normal((12, 4))
    for _ in range(3000):
        vectors = convolution @ vectors
    users, items = vectors[:5], vectors[5:]
    of_users, of_items = limit_weights(CONNECTED)
    beta = of_users[:, None] * of_items * CONNECTED.csr().toarray()
    np.testing.assert_allclose(users, beta @ items, atol=1e-5)
    assert np.abs(users).max() > 0.01


def dense_omega(train: Interactions, exclude_self: bool = False) -> NDArray[np.float64]:
    matrix = train.csr().toarray().astype(np.float64)
    counts = matrix.T @ matrix
    sums = counts.sum(axis=1)
    n = train.num_items
    omega = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if sums[i] and not (exclude_self and i == j):
                omega[i, j] = counts[i, j] * math.sqrt(sums[i] + 1) / sums[i]
                omega[i, j] /= math.sqrt(sums[j] + 1)
    return omega


@settings(max_examples=30)
@given(interactions(), st.integers(1, 12), st.booleans(), st.integers(1, 20))
def test_neighbours_are_the_largest_of_dense_omega(
    train: Interactions, k: int, exclude_self: bool, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cooccurrence, "_BLOCK", block)
        neighbours, weights = cooccurrence_neighbours(train, k, exclude_self=exclude_self)
    omega = dense_omega(train, exclude_self)
    k = min(k, train.num_items)
    assert neighbours.shape == weights.shape == (train.num_items, k)
    for item, row in enumerate(omega):
        best = sorted(range(len(row)), key=lambda other: -round(row[other], 9))[:k]
        best = [other for other in best if row[other] > 0]
        assert neighbours[item, : len(best)].tolist() == best, "ties by item number"
        np.testing.assert_allclose(weights[item, : len(best)], row[best], rtol=1e-5)
        assert not weights[item, len(best) :].any()


def test_neighbours_are_kept_under_the_digest_of_the_data(tmp_path: Path) -> None:
    first = cooccurrence_neighbours(PLANTED, 4, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    again = cooccurrence_neighbours(PLANTED, 4, cache=tmp_path)
    assert file.stat().st_mtime_ns == stamp
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    cooccurrence_neighbours(PLANTED.split()[0], 4, cache=tmp_path)
    cooccurrence_neighbours(PLANTED, 4, exclude_self=True, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(cooccurrence_neighbours(PLANTED, 4, cache=tmp_path)[1], first[1])
    UltraGCN(dim=4, epochs=1, negatives=2, neighbours=4, cache=tmp_path).fit(PLANTED)


def model_of(settings: UltraGCN, train: Interactions) -> ConstraintModel:
    generator = torch.Generator().manual_seed(1)
    sides = (train.num_users, train.num_items)
    users, items = (new_table(n, settings.dim, 0.5, generator) for n in sides)
    return ConstraintModel(settings, train, users, items)


SETTINGS = {"dim": 4, "w1": 0.5, "w2": 0.7, "w3": 0.2, "w4": 1.3, "negatives": 3}
OTHERS = {"negative_weight": 6.0, "item_weight": 0.3, "l2": 0.05, "neighbours": 3}


@pytest.mark.parametrize("scoring", ["block", "gather"])
def test_the_loss_is_the_double_loop(scoring: Any) -> None:
    settings = UltraGCN(**SETTINGS, **OTHERS, scoring=scoring)  # type: ignore[arg-type]
    model = model_of(settings, CONNECTED)
    pairs, drawn = [0, 3, 10, 10], [[0, 1, 6], [2, 2, 5], [3, 0, 1], [6, 4, 0]]
    users, items = (torch.from_numpy(a.astype(np.int64)) for a in (CONNECTED.user, CONNECTED.item))
    found = model.pair_loss(users[pairs], items[pairs], torch.tensor(drawn), len(pairs))

    e_u, e_i = (table.weight.detach().double().numpy() for table in (model.users, model.items))
    d_u, d_i = CONNECTED.user_degree, CONNECTED.popularity()
    omega = dense_omega(CONNECTED)

    def beta(u: int, i: int) -> float:
        return math.sqrt((d_u[u] + 1) / (d_i[i] + 1)) / d_u[u]

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    total = 0.0
    for pair, negatives in zip(pairs, drawn, strict=True):
        u, i = int(CONNECTED.user[pair]), int(CONNECTED.item[pair])
        total += (0.5 + 0.7 * beta(u, i)) * softplus(-e_u[u] @ e_i[i])
        for j in negatives:
            total += 6.0 / 3 * (0.2 + 1.3 * beta(u, j)) * softplus(e_u[u] @ e_i[j])
        for j in np.argsort(-np.round(omega[i], 9), kind="stable")[:3]:
            total += 0.3 * omega[i, j] * softplus(-e_u[u] @ e_i[j])
    total += 0.05 / 2 * ((e_u**2).sum() + (e_i**2).sum())
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_gradients_of_both_paths_agree_and_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(4)
    negatives = torch.randint(PLANTED.num_items, (200, 3), generator=generator)
    users, items = (
        torch.from_numpy(a[:200].astype(np.int64)) for a in (PLANTED.user, PLANTED.item)
    )
    gradients = []
    for scoring, cuts in (("block", [0, 200]), ("gather", [0, 200]), ("gather", [0, 90, 200])):
        settings = UltraGCN(**SETTINGS, **OTHERS, scoring=scoring)  # type: ignore[arg-type]
        model = model_of(settings, PLANTED)
        for a, b in itertools.pairwise(cuts):
            model.pair_loss(users[a:b], items[a:b], negatives[a:b], 200).backward()
        gradients.append([p.grad / 200 for p in model.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_micro_batches_bound_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anabranch.graphs.recommend.objective.MOST_SCORES", 500)
    sampler = NegativeSampler(PLANTED, 2, False, torch.Generator())
    objective = PairObjective(PLANTED, sampler, 50, {})
    parts = objective.plan(range(34))
    assert [len(part) for part in parts] == [10, 10, 10, 4]
    assert [i for part in parts for i in part] == list(range(34))


def test_presets_are_complete_and_can_be_changed() -> None:
    model = UltraGCN.preset("gowalla", epochs=5)
    assert (model.negatives, model.negative_weight, model.lr, model.epochs) == (1500, 300, 1e-4, 5)
    assert UltraGCN.preset("amazon-electronics").exclude_positive
    for name in PRESETS:
        UltraGCN.preset(name)._check()
    with pytest.raises(UnknownName, match="did you mean 'yelp2018'"):
        UltraGCN.preset("yelp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0}, "negatives = 0"),
        ({"neighbours": 0}, "neighbours = 0"),
        ({"w1": -1.0}, "w1 = -1"),
        ({"w4": math.nan}, "w4 = nan"),
        ({"negative_weight": -1.0}, "negative_weight = -1"),
        ({"scoring": "all"}, "scoring = 'all'"),
    ],
)
def test_bad_parameters_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecommendError, match=message):
        UltraGCN(**options).fit(PLANTED)


def test_more_neighbours_than_items_are_cut_and_full_users_refused() -> None:
    UltraGCN(dim=4, epochs=1, negatives=2, neighbours=999).fit(PLANTED)
    with pytest.raises(RecommendError, match="user 1 has all 2 items"):
        UltraGCN(exclude_positive=True).fit(Interactions.from_pairs([0, 1, 1], [0, 0, 1]))
    with pytest.raises(RecommendError, match="at least one is needed"):
        cooccurrence_neighbours(PLANTED, 0)
