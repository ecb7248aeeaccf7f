"""FastRP against dense matrix powers, and what must not change it."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from anabranch.graphs import Graph, GraphError
from anabranch.graphs.embedding import FastRP, tune
from anabranch.graphs.embedding.projection import projection
from anabranch.graphs.generators import planted_communities
from benchmarks.graphs.__main__ import measure
from tests.graphs.random_graphs import graphs

PLANTED = planted_communities(200, 2000, 4, inside=0.8, seed=1)
GRAPH = PLANTED.graph


def unit_rows(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.divide(matrix, length, out=np.zeros_like(matrix), where=length > 0)


def dense_fastrp(
    graph: Graph, dim: int, weights: Any, beta: float, sparsity: float, normalise: bool
) -> NDArray[np.float64]:
    """The definition with explicit powers of P (section 3.3 of the paper)."""
    adjacency = graph.adjacency().toarray().astype(np.float64)
    strength = adjacency.sum(axis=1)
    walk = adjacency / np.where(strength > 0, strength, 1)[:, None]
    share = strength / max(strength.sum(), 1)
    scale = np.power(share, beta, where=share > 0, out=np.zeros_like(share))
    random = projection(graph.num_nodes, dim, sparsity, 0).toarray().astype(np.float64)
    total = np.zeros((graph.num_nodes, dim))
    for k, weight in enumerate(weights, 1):
        power = np.linalg.matrix_power(walk, k) @ (scale[:, None] * random)
        total += weight * (unit_rows(power) if normalise else power)
    return total


@settings(max_examples=40)
@given(graphs(), st.booleans(), st.sampled_from([(1,), (0, 2.0), (1, 0, 0.5, 3)]))
def test_it_is_the_sum_of_dense_powers(graph: Graph, normalise: bool, weights: Any) -> None:
    embedder = FastRP(6, weights=weights, normalize=normalise, density=2, standardize=False)
    expected = dense_fastrp(graph, 6, weights, -0.64, 2, normalise)
    found = embedder.fit_transform(graph)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, np.abs(expected).max()))


def test_on_fifty_nodes_with_the_default_density() -> None:
    graph = planted_communities(50, 200, 3, seed=2).graph
    weights = (1, 1, 7.81, 45.28)
    found = FastRP(32, weights=weights, beta=-0.628, standardize=False).fit_transform(graph)
    expected = dense_fastrp(graph, 32, weights, -0.628, np.sqrt(50), True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_standardised_columns_and_constant_ones() -> None:
    found = FastRP(16).fit_transform(GRAPH)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=0), 1, atol=1e-4)
    nothing = FastRP(4).fit_transform(Graph.from_edges([], num_nodes=3))
    np.testing.assert_array_equal(nothing, np.zeros((3, 4)))


def test_relabelling_permutes_the_rows() -> None:
    generator = np.random.default_rng(0)
    order = generator.permutation(GRAPH.num_nodes)
    moved = GRAPH.adjacency()[order][:, order]
    named = Graph.from_matrix(GRAPH.adjacency(), ids=np.arange(GRAPH.num_nodes))
    permuted = Graph.from_matrix(moved, ids=order)
    kept, found = (FastRP(24).fit_transform(g) for g in (named, permuted))
    np.testing.assert_allclose(found, kept[order], atol=1e-4)
    np.testing.assert_array_equal(kept, FastRP(24).fit_transform(GRAPH))


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(0, 3))
def test_workers_and_a_second_time_change_nothing(workers: int, seed: int) -> None:
    one = FastRP(8, seed=seed).fit_transform(GRAPH)
    np.testing.assert_array_equal(FastRP(8, seed=seed, workers=workers).fit_transform(GRAPH), one)


def test_scaling_all_weights_changes_nothing() -> None:
    pairs = np.random.default_rng(0).integers(0, 30, (90, 2))
    weights = np.random.default_rng(1).uniform(0.5, 2, 90)
    one, other = (Graph.from_edges(pairs, weights * factor) for factor in (1.0, 8.0))
    np.testing.assert_allclose(
        FastRP(12).fit_transform(one), FastRP(12).fit_transform(other), atol=1e-4
    )


def test_projections_keep_products_in_expectation() -> None:
    """Over 400 seeds the mean product is that of the unprojected rows, within 3 standard errors."""
    graph = planted_communities(20, 60, 2, seed=3).graph
    products = []
    for seed in range(400):
        options: dict[str, Any] = {"normalize": False, "density": 3, "standardize": False}
        x = FastRP(8, weights=(0, 1), beta=0.0, seed=seed, **options).fit_transform(graph)
        products.append(x @ x.T)
    walk = graph.transition().toarray().astype(np.float64)
    rows = walk @ walk
    error = np.abs(np.mean(products, axis=0) - rows @ rows.T)
    standard_error = np.std(products, axis=0) / np.sqrt(len(products))
    outside = error > 3 * standard_error + 1e-6
    assert outside.mean() < 0.02, "0.3 % are expected outside"


def test_a_projection_is_as_dense_as_asked_and_belongs_to_ids() -> None:
    drawn = projection(4000, 32, 10.0, seed=5)
    assert drawn.nnz / (4000 * 32) == pytest.approx(0.1, rel=0.03)
    assert set(np.abs(drawn.data).tolist()) == {np.float32(np.sqrt(10 / 32))}
    assert abs(np.sign(drawn.data).mean()) < 0.03
    some = projection(np.array([7, 3999]), 32, 10.0, seed=5)
    np.testing.assert_array_equal(some.toarray(), drawn[[7, 3999]].toarray())
    names = projection(np.array(["a", "b"]), 32, 2.0, seed=5)
    np.testing.assert_array_equal(
        names[[1]].toarray(), projection(np.array(["b"]), 32, 2.0, seed=5).toarray()
    )
    thinner = projection(4000, 32, 40.0, seed=5).toarray() != 0
    assert not (thinner & (drawn.toarray() == 0)).any()


def test_concatenated_powers_and_both_directions() -> None:
    whole = FastRP(8, weights=None, standardize=False).fit_transform(GRAPH)
    assert whole.shape == (GRAPH.num_nodes, 32)
    third = FastRP(8, weights=(0, 0, 1), standardize=False).fit_transform(GRAPH)
    np.testing.assert_array_equal(whole[:, 16:24], third)
    path = Graph.from_edges([[0, 1], [1, 2], [2, 3]], directed=True)
    both = FastRP(8, weights=(1,), both=True, standardize=False, density=1).fit_transform(path)
    assert not both[3, :4].any(), "the last node has no out-edges"
    assert both[3, 4:].any()
    own = FastRP(8, weights=(1,), self_weight=2.0, standardize=False, density=1)
    assert own.fit_transform(path)[3].any()


def test_new_nodes_get_the_rows_of_nodes_with_the_same_edges() -> None:
    embedder = FastRP(16).fit(GRAPH)
    np.testing.assert_array_equal(embedder.transform(GRAPH), embedder.embedding_)
    some = GRAPH.adjacency()[[5, 3]]
    np.testing.assert_array_equal(embedder.transform(some), embedder.embedding_[[5, 3]])
    for options in ({"keep_powers": False}, {"both": True}, {"self_weight": 1.0}):
        with pytest.raises(GraphError, match="fit again"):
            FastRP(16, **options).fit(GRAPH).transform(some)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="3 features"):
        embedder.transform(np.ones((1, 3)))


@pytest.mark.parametrize("density", ["sqrt", 2])
def test_a_saved_estimator_comes_back(density: Any, tmp_path: Path) -> None:
    embedder = FastRP(8, density=density, weights=(0, 1, 2)).fit(GRAPH)
    embedder.save(tmp_path / "f.npz")
    again = FastRP.load(tmp_path / "f.npz")
    np.testing.assert_array_equal(again.embedding_, embedder.embedding_)
    np.testing.assert_array_equal(again.transform(GRAPH), embedder.embedding_)
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]
    (tmp_path / "f.npz").write_bytes((tmp_path / "f.npz").read_bytes()[:100])
    with pytest.raises(GraphError, match="is no saved FastRP"):
        FastRP.load(tmp_path / "f.npz")
    with pytest.raises(GraphError, match="no file"):
        FastRP.load(tmp_path / "g.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim = 0"),
        ({"dim": 2.5}, "dim = 2.5"),
        ({"weights": ()}, "at least one power"),
        ({"weights": (0, 0)}, "at least one power"),
        ({"weights": (1, np.nan)}, "not all are finite"),
        ({"weights": None, "self_weight": 1.0}, "concatenates"),
        ({"beta": np.inf}, "beta = inf"),
        ({"density": 0.5}, "density = 0.5"),
        ({"density": "dense"}, "density = 'dense'"),
        ({"matrix": "laplacian"}, "matrix = 'laplacian'"),
        ({"dim": 3, "both": True}, "even"),
        ({"workers": 0}, "workers = 0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError, match=re.escape(message)):
        FastRP(**options).fit(GRAPH)


def test_favouring_hubs_is_allowed_with_a_warning() -> None:
    embedder = FastRP(4, weights=(1,), beta=0.5, density=2, standardize=False, normalize=False)
    with pytest.warns(UserWarning, match="favours hubs"):
        found = embedder.fit_transform(GRAPH)
    expected = dense_fastrp(GRAPH, 4, (1,), 0.5, 2, False)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


def test_no_nodes_one_node_and_fewer_nodes_than_columns() -> None:
    assert FastRP(4).fit_transform(Graph.from_edges([])).shape == (0, 4)
    assert FastRP(4).fit_transform(Graph.from_edges([[0, 0]])).shape == (1, 4)
    assert FastRP(64).fit_transform(Graph.from_edges([[0, 1]])).shape == (2, 64)
    assert clone(FastRP(7)).dim == 7


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastrp", "fastrp, powers kept"])
def test_memory_and_time_grow_with_the_edges(method: str) -> None:
    """What 800,000 and 3,200,000 edges take, drawn on, is below 6 GB at ten million.

    Both are larger than a processor's cache, so that time grows with the work alone.
    """
    options = Namespace(dim=128, walks=1, workers=1)
    small, large = (measure(method, edges, options) for edges in (800_000, 3_200_000))
    more = (large["peak_gigabytes"] - small["peak_gigabytes"]) / (large["edges"] - small["edges"])
    assert more > 0
    assert large["peak_gigabytes"] + more * (10**7 - large["edges"]) < 6
    assert large["seconds"] < 10 * small["seconds"], "four times the edges; 16 if it were quadratic"


def test_tuning_finds_better_weights_and_repeats() -> None:
    pytest.importorskip("optuna")
    labels = PLANTED.labels.argmax(axis=1)

    def separation(vectors: NDArray[np.float32]) -> float:
        same = labels[:, None] == labels
        likeness = vectors @ vectors.T
        return float(likeness[same].mean() - likeness[~same].mean())

    tuned = tune(GRAPH, separation, trials=6, dim=16, seed=1)
    assert len(tuned.trials) == 6
    assert tuned.score == max(score for _, _, score in tuned.trials)
    assert tuned == tune(GRAPH, separation, trials=6, dim=16, seed=1)
    best = FastRP(16, weights=tuned.weights, beta=tuned.beta, seed=1).fit_transform(GRAPH)
    assert separation(best) == pytest.approx(tuned.score, rel=1e-3)
    with pytest.raises(GraphError, match="the objective is nan"):
        tune(GRAPH, lambda _: float("nan"), trials=1)


@parametrize_with_checks([FastRP(dim=4)])
def test_it_is_an_estimator_of_scikit_learn(estimator: FastRP, check: Any) -> None:
    """All of its checks; the one of the array API is for estimators that support it."""
    check(estimator)
