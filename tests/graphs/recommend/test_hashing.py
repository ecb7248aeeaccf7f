"""Row assignments, clusters, and the embedding whose ids share rows."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import clone
from torch import nn

from anabranch.graphs.recommend import (
    Interactions,
    LightGCN,
    MatrixFactorization,
    NotFitted,
    RecommendError,
    UltraGCN,
)
from anabranch.graphs.recommend.data import planted_interactions
from anabranch.graphs.recommend.hashing import (
    LSH,
    DoubleFrequency,
    DoubleGraphHash,
    DoubleHash,
    Frequency,
    FullTable,
    GraphHash,
    IdMapper,
    MappedEmbedding,
    Modulo,
    RowAssignment,
    carried_over,
    louvain,
    modularity,
)
from anabranch.graphs.recommend.hashing.rows import universal_hash
from tests.graphs.recommend.samples import PLANTED, interactions

BICLIQUES = np.zeros((5, 6))
BICLIQUES[:3, :2] = 1
BICLIQUES[3:, 2:] = 1

MAPPERS: dict[str, IdMapper] = {
    "full": FullTable(),
    "modulo": Modulo(budget=0.25),
    "frequency": Frequency(budget=0.25),
    "double": DoubleHash(budget=0.25),
    "double frequency": DoubleFrequency(budget=0.25),
    "lsh": LSH(budget=0.25),
    "graph hash": GraphHash(budget=0.5),
    "double graph hash": DoubleGraphHash(resolution=2.0),
}


def groups(labels: NDArray[Any]) -> set[frozenset[int]]:
    """A partition without the names of its parts."""
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def joint(mapper: GraphHash) -> NDArray[np.int64]:
    return np.concatenate([mapper.user_clusters_, mapper.item_clusters_])


@pytest.mark.parametrize("name", MAPPERS)
def test_every_id_has_rows_of_its_own_table(name: str) -> None:
    mapper = clone(MAPPERS[name])
    with pytest.raises(NotFitted):
        _ = mapper.num_rows_
    mapper.fit(PLANTED)
    for side, count in ((mapper.users_, PLANTED.num_users), (mapper.items_, PLANTED.num_items)):
        assert side.rows.shape == (count, 2 if "double" in name else 1)
        assert 0 <= side.rows.min() <= side.rows.max() < side.num_rows <= count
        assert side.combine == ("sum" if "double" in name else "single")
        np.testing.assert_array_equal(side.of([[3, 0]])[0, 0], side.rows[3])
        with pytest.raises(RecommendError, match=f"id {count} is outside"):
            side.of([0, count])
        with pytest.raises(RecommendError, match="id -1"):
            side.of(-1)
    again = clone(mapper).fit(PLANTED)
    np.testing.assert_array_equal(again.items_.rows, mapper.items_.rows)
    rows = sum(mapper.num_rows_)
    assert mapper.reduction_ == pytest.approx(1 - rows / (PLANTED.num_users + PLANTED.num_items))
    if name in ("modulo", "frequency", "double", "double frequency"):
        assert mapper.num_rows_ == (15, round(0.25 * PLANTED.num_items))


@pytest.mark.parametrize("name", MAPPERS)
def test_what_every_mapper_refuses(name: str) -> None:
    mapper = clone(MAPPERS[name])
    with pytest.raises(RecommendError, match="nothing to assign rows by"):
        mapper.fit(Interactions.from_pairs([], [], num_users=3, num_items=3))
    for held_out in ("test", "validation"):
        _, part = PLANTED.split(held_out=held_out)  # type: ignore[arg-type]
        with pytest.raises(RecommendError, match=f"these are the {held_out} interactions"):
            mapper.fit(part)
    train, _ = PLANTED.split()
    assert mapper.fit(train.compact()).num_rows_ > (0, 0)


@pytest.mark.parametrize(
    ("mapper", "message"),
    [
        (Modulo(), "needs either budget or rows"),
        (Frequency(budget=0.1, rows=(2, 2)), "needs either budget or rows"),
        (DoubleHash(budget=0.0), "budget = 0.0"),
        (GraphHash(budget=1.5), "budget = 1.5"),
        (LSH(rows=(0, 3)), "at least one row"),
        (GraphHash(), "needs either budget or resolution"),
        (GraphHash(resolution=0.0), "resolution = 0.0"),
        (GraphHash(resolution=math.nan), "resolution = nan"),
    ],
)
def test_bad_parameters_are_refused_by_name(mapper: IdMapper, message: str) -> None:
    with pytest.raises(RecommendError, match=message):
        mapper.fit(PLANTED)


def test_frequent_ids_have_rows_of_their_own() -> None:
    mapper = Frequency(rows=(10, 10)).fit(PLANTED)
    most = np.argsort(-PLANTED.popularity(), kind="stable")[:5]
    assert mapper.items_.rows[most, 0].tolist() == [0, 1, 2, 3, 4]
    others = np.setdiff1d(np.arange(PLANTED.num_items), most)
    np.testing.assert_array_equal(mapper.items_.rows[others, 0], 5 + others % 5)
    enough = Frequency(rows=(999, 999)).fit(PLANTED)
    assert enough.num_rows_ == (PLANTED.num_users, PLANTED.num_items)
    assert len(np.unique(enough.items_.rows)) == PLANTED.num_items


def test_universal_hashes_do_not_overflow_and_collide_as_chance_has_it() -> None:
    rows = universal_hash(5000, 50, np.random.default_rng(0))
    assert rows.min() >= 0
    counts = np.bincount(rows, minlength=50)
    assert counts.min() > 50
    assert counts.max() < 160
    np.testing.assert_array_equal(rows[:100], universal_hash(100, 50, np.random.default_rng(0)))


def test_equal_interactions_share_a_row_of_lsh() -> None:
    matrix = np.repeat(np.random.default_rng(0).integers(0, 2, (10, 30)), 2, axis=0)
    rows = LSH(rows=(16, 30)).fit(matrix).users_.rows[:, 0]
    np.testing.assert_array_equal(rows[::2], rows[1::2])
    assert len(np.unique(rows)) > 3


@settings(max_examples=30)
@given(interactions(least=1), st.floats(0.1, 5), st.integers(1, 5), st.integers(0, 100))
def test_modularity_is_the_dense_double_sum(
    found: Interactions, resolution: float, clusters: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    users = generator.integers(0, clusters, found.num_users)
    items = generator.integers(0, clusters, found.num_items)
    matrix = found.csr().toarray().astype(np.float64)
    m = matrix.sum()
    total = 0.0
    for u in range(found.num_users):
        for i in range(found.num_items):
            if users[u] == items[i]:
                total += matrix[u, i] - resolution * matrix[u].sum() * matrix[:, i].sum() / m
    expected = total / m
    assert modularity(found.csr(), users, items, resolution) == pytest.approx(expected, abs=1e-9)


def test_modularity_is_that_of_the_libraries() -> None:
    clusters = louvain(PLANTED.csr(), 1.5)
    sknetwork = pytest.importorskip("sknetwork.clustering")
    ours = modularity(PLANTED.csr(), clusters.users, clusters.items, 1.5)
    nodes = PLANTED.num_users + PLANTED.num_items
    # As a square matrix with edges from users to items only: given the biadjacency matrix, the
    # library computes ordinary modularity of both directions.
    directed = sparse.lil_matrix((nodes, nodes))
    directed[: PLANTED.num_users, PLANTED.num_users :] = PLANTED.csr()
    joined = np.concatenate([clusters.users, clusters.items])
    theirs = sknetwork.get_modularity(directed.tocsr(), joined, resolution=1.5)
    assert ours == pytest.approx(theirs, abs=1e-9)
    igraph = pytest.importorskip("igraph")
    pairs = np.column_stack([PLANTED.user, PLANTED.item + PLANTED.num_users])
    graph = igraph.Graph(nodes, pairs.tolist(), directed=True)
    theirs = graph.modularity(joined.tolist(), resolution=1.5, directed=True)
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_two_bicliques_are_two_clusters() -> None:
    mapper = GraphHash(resolution=1.0).fit(BICLIQUES)
    assert mapper.user_clusters_.tolist() == [1, 1, 1, 0, 0]
    assert mapper.item_clusters_.tolist() == [1, 1, 0, 0, 0, 0], "the larger one is 0"
    assert mapper.num_rows_ == (2, 2)
    assert mapper.modularity_ == pytest.approx(
        modularity(sparse.csr_array(BICLIQUES), mapper.user_clusters_, mapper.item_clusters_)
    )


def test_relabelling_moves_clusters_and_nothing_else() -> None:
    clean = planted_interactions(80, 60, 5, per_user=30, inside=1.0, seed=2).csr().toarray()
    generator = np.random.default_rng(0)
    users, items = generator.permutation(80), generator.permutation(60)
    kept = louvain(clean, 1.0)
    moved = louvain(clean[users][:, items], 1.0)
    assert len(np.unique(kept.users)) == 5
    back = np.empty(140, np.int64)
    back[users], back[80 + items] = moved.users, moved.items
    assert groups(back) == groups(np.concatenate([kept.users, kept.items]))


def test_louvain_finds_no_worse_than_leiden_by_much() -> None:
    leidenalg = pytest.importorskip("leidenalg")
    igraph = pytest.importorskip("igraph")
    matrix = planted_interactions(200, 150, 8, per_user=15, seed=1).csr().tocoo()
    pairs = np.column_stack([matrix.row, matrix.col + 200])
    graph = igraph.Graph(350, pairs.tolist(), directed=True)
    found = leidenalg.find_partition(
        graph, leidenalg.RBConfigurationVertexPartition, resolution_parameter=1.0, seed=0
    )
    theirs = np.array(found.membership)
    clusters = louvain(matrix, 1.0)
    ours = modularity(matrix, clusters.users, clusters.items)
    assert ours > 0.9 * modularity(matrix, theirs[:200], theirs[200:])


@pytest.mark.parametrize("budget", [0.1, 0.33, 0.9, 1.0])
def test_a_budget_is_kept_and_used(budget: float) -> None:
    mapper = GraphHash(budget=budget).fit(PLANTED)
    rows = sum(mapper.num_rows_)
    ids = PLANTED.num_users + PLANTED.num_items
    assert 0.7 * budget * ids <= rows <= budget * ids
    if budget == 1:
        assert len(np.unique(mapper.users_.rows)) == PLANTED.num_users
        return
    again = louvain(PLANTED.csr(), mapper.resolution_)
    assert again.num_rows == rows
    np.testing.assert_array_equal(again.users, mapper.user_clusters_)


def test_an_unreachable_budget_names_the_smallest_size() -> None:
    with pytest.raises(RecommendError, match=r"need 4: ask for a budget of at least 0\.36"):
        GraphHash(budget=0.2).fit(BICLIQUES)
    with pytest.raises(RecommendError, match="nothing to cluster"):
        louvain(np.zeros((2, 2)))


def test_isolated_ids_are_counted_or_folded() -> None:
    padded = np.zeros((8, 7))
    padded[:5, :6] = BICLIQUES
    with pytest.warns(UserWarning, match="4 ids have no interaction"):
        mapper = GraphHash(resolution=1.0).fit(padded)
    assert mapper.num_rows_ == (5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = GraphHash(resolution=1.0, merge_isolated=True).fit(padded)
    assert folded.num_rows_ == (2, 2)
    assert folded.user_clusters_.tolist() == [1, 1, 1, 0, 0, -1, -1, -1]
    assert folded.users_.rows[5:, 0].tolist() == [1, 0, 1], "id mod rows"
    assert folded.modularity_ == pytest.approx(mapper.modularity_)


def test_new_ids_join_the_cluster_of_most_of_their_neighbours() -> None:
    mapper = GraphHash(resolution=1.0).fit(BICLIQUES)
    larger = np.zeros((8, 8))
    larger[:5, :6] = BICLIQUES
    larger[5, [0, 1, 2]] = 1  # two of the small biclique, one of the large
    larger[6, [0, 2]] = 1  # a tie: the larger cluster
    larger[:3, 6] = 1
    larger[7, 7] = 1  # knows new ones only
    found = mapper.extended(larger)
    np.testing.assert_array_equal(found.users_.rows[:5], mapper.users_.rows)
    np.testing.assert_array_equal(found.items_.rows[:6], mapper.items_.rows)
    assert found.user_clusters_[5:].tolist() == [1, 0, -1]
    assert found.item_clusters_[6:].tolist() == [1, -1]
    assert found.users_.rows[7, 0] == 7 % 2
    assert len(mapper.users_.rows) == 5, "the fitted one is as it was"
    with pytest.raises(RecommendError, match="fewer than the fitted"):
        mapper.extended(np.ones((2, 2)))
    double = DoubleGraphHash(resolution=1.0).fit(BICLIQUES)
    np.testing.assert_array_equal(double.extended(larger).users_.rows[:5], double.users_.rows)


def test_clustering_again_carries_rows_over() -> None:
    weight = np.array([[1.0], [2.0], [10.0]], np.float32)
    old = RowAssignment.single(np.array([0, 0, 1, 2, 2, 2, 2]), 3)
    #                                    row 0  1  and row 2 is split; ids 7 and 8 are new
    new = RowAssignment.single(np.array([0, 0, 0, 1, 1, 1, 2, 2, 3]), 4)
    found = carried_over(weight, old, new)
    np.testing.assert_allclose(found[:, 0], [(2 * 1 + 2) / 3, 10, 10, 13 / 3], rtol=1e-6)
    np.testing.assert_array_equal(carried_over(weight, old, old), weight)
    with pytest.raises(RecommendError, match="do not belong together"):
        carried_over(weight[:2], old, new)
    with pytest.raises(RecommendError, match="train again"):
        carried_over(weight, RowAssignment(np.zeros((7, 2), int), 3), new)


@pytest.mark.parametrize("recommender", [MatrixFactorization, LightGCN, UltraGCN])
def test_a_row_for_each_id_trains_as_nn_embedding_does(recommender: Any) -> None:
    options = {"dim": 6, "epochs": 3, "batch": 100, "lr": 0.02}
    plain = recommender(**options).fit(PLANTED)
    for mapper in (GraphHash(budget=1), FullTable()):
        mapped = recommender(**options, mapper=mapper).fit(PLANTED)
        np.testing.assert_array_equal(mapped.user_factors_, plain.user_factors_)
        np.testing.assert_array_equal(mapped.item_factors_, plain.item_factors_)


@settings(max_examples=20)
@given(st.integers(0, 50), st.integers(1, 2))
def test_the_gradient_of_a_row_is_the_sum_of_its_ids(seed: int, rows_of_an_id: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 4, (9, rows_of_an_id))
    mapped = MappedEmbedding(RowAssignment(rows, 4), 3)
    full = nn.Embedding(9, 3)
    with torch.no_grad():
        full.weight.copy_(mapped.every())
    ids = torch.from_numpy(generator.integers(0, 9, (5, 2)))
    torch.testing.assert_close(mapped(ids), full(ids))
    weights = torch.from_numpy(generator.standard_normal((5, 2, 3))).float()
    (mapped(ids) * weights).sum().backward()
    (full(ids) * weights).sum().backward()
    assert full.weight.grad is not None
    expected = torch.zeros(4, 3)
    for position in range(9):
        for row in rows[position]:
            expected[row] += full.weight.grad[position]
    torch.testing.assert_close(mapped.weight.grad, expected, atol=1e-5, rtol=1e-5)


def test_it_takes_the_place_of_an_embedding_in_any_model() -> None:
    mapper = Modulo(rows=(3, 3)).fit(PLANTED)
    model = nn.Sequential(MappedEmbedding(mapper.items_, 4), nn.Linear(4, 1))
    assert sum(p.numel() for p in model[0].parameters()) == 12
    out = model(torch.tensor([[0, 3], [1, 4]]))
    torch.testing.assert_close(out[:, 0], out[:, 1])
    again = nn.Sequential(
        MappedEmbedding(RowAssignment.single(np.zeros(PLANTED.num_items, int), 3), 4),
        nn.Linear(4, 1),
    )
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(torch.tensor([4])), model(torch.tensor([4])))
    with pytest.raises(IndexError):
        model(torch.tensor([PLANTED.num_items]))
    with pytest.raises(RecommendError, match="3 rows of 5 columns"):
        MappedEmbedding(mapper.items_, 5, nn.Embedding(3, 4))
    with pytest.raises(RecommendError, match="outside"):
        RowAssignment.single(np.array([3]), 3)
    assert "50 ids in 3 rows" in repr(model[0])


def test_ids_of_one_cluster_recommend_alike(tmp_path: Any) -> None:
    model = MatrixFactorization(dim=6, epochs=2, mapper=GraphHash(resolution=1.0)).fit(PLANTED)
    clusters = model.mapper_.users_.rows[:, 0]
    assert model.tables_["user"].shape == (model.mapper_.num_rows_[0], 6)
    one, other = np.flatnonzero(clusters == 0)[:2]
    np.testing.assert_array_equal(model.scores([one]), model.scores([other]))
    model.save(tmp_path / "m.npz")
    again = MatrixFactorization.load(tmp_path / "m.npz")
    assert again.tables_["user"].shape == model.tables_["user"].shape
    np.testing.assert_array_equal(again.scores([one]), model.scores([one]))
