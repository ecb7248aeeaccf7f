"""The contract of every recommender, and the shared training loop."""

from __future__ import annotations

import math
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from anabranch.graphs.recommend import (
    FactorRecommender,
    Interactions,
    LightGCN,
    MatrixFactorization,
    NotFitted,
    Popularity,
    RecommendError,
    UltraGCN,
)
from anabranch.graphs.recommend.hashing import DoubleHash, GraphHash
from anabranch.graphs.recommend.objective import PairObjective, Validated
from anabranch.graphs.recommend.sampler import NegativeSampler
from anabranch.training.errors import CheckpointError, Diverged, TrainingError
from tests.graphs.recommend.samples import PLANTED

SMALL: dict[str, Any] = {"dim": 8, "epochs": 3, "batch": 128, "lr": 0.02, "init": 0.1}
MODELS: dict[str, FactorRecommender] = {
    "popularity": Popularity(),
    "mf": MatrixFactorization(**SMALL),
    "lightgcn": LightGCN(**SMALL),
    "ultragcn": UltraGCN(**SMALL, negatives=5),
    "hashed mf": MatrixFactorization(**SMALL, mapper=GraphHash(resolution=2.0)),
    "hashed lightgcn": LightGCN(**SMALL, mapper=DoubleHash(budget=0.5)),
    "hashed ultragcn": UltraGCN(**SMALL, negatives=5, mapper=DoubleHash(budget=0.5)),
}
TRAIN, TEST = PLANTED.split("random", 0.2, 1)
FIT, VALIDATION = TRAIN.split("random", 0.2, 2, "validation")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> FactorRecommender:
    return clone(MODELS[request.param])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ (ids|users) .* no interaction")
        yield


def test_scores_are_products_and_seen_items_are_left_out(model: FactorRecommender) -> None:
    model.fit(FIT, validation=VALIDATION)
    scores = model.scores([3, 0])
    expected = model.user_factors_[[3, 0]] @ model.item_factors_.T
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    items, values = model.recommend(range(PLANTED.num_users), k=10, batch=7)
    known = TRAIN.by_user()
    for user, row in enumerate(items):
        assert not set(row.tolist()) & set(known[user].tolist()), "training or validation item"
        np.testing.assert_allclose(values[user], model.scores([user])[0][row], rtol=1e-4, atol=1e-6)
    assert (np.diff(values, axis=1) <= 0).all()
    everything, _ = model.recommend([0], k=PLANTED.num_items, exclude_seen=False)
    assert sorted(everything[0].tolist()) == list(range(PLANTED.num_items))


def test_places_that_no_item_is_left_for_are_marked(model: FactorRecommender) -> None:
    model.fit(TRAIN)
    items, values = model.recommend([5], k=PLANTED.num_items + 2)
    left = PLANTED.num_items - int(TRAIN.user_degree[5])
    assert (items[0, :left] >= 0).all()
    assert (items[0, left:] == -1).all()
    assert np.isneginf(values[0, left:]).all()


def test_a_saved_recommender_comes_back(model: FactorRecommender, tmp_path: Path) -> None:
    named = Interactions(
        TRAIN.user,
        TRAIN.item,
        TRAIN.num_users,
        TRAIN.num_items,
        user_ids=np.array([f"u{n}" for n in range(TRAIN.num_users)]),
    )
    model.fit(named).save(tmp_path / "m.npz")
    again = type(model).load(tmp_path / "m.npz")
    for one, other in zip(model.recommend([0, 1], 5), again.recommend([0, 1], 5), strict=True):
        np.testing.assert_array_equal(one, other)
    assert str(again.get_params()) == str(model.get_params())
    assert again.ids_["user"] is not None
    assert again.ids_["user"][3] == "u3"
    with pytest.raises(RecommendError, match="load it with that class"):
        type("Other", (type(model),), {}).load(tmp_path / "m.npz")
    (tmp_path / "m.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:200])
    with pytest.raises(RecommendError, match="is no saved recommender"):
        type(model).load(tmp_path / "m.npz")


def test_a_seed_repeats_bit_for_bit_and_touches_nothing_else(model: FactorRecommender) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = model.fit(TRAIN).item_factors_
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    np.testing.assert_array_equal(clone(model).fit(TRAIN).item_factors_, one)
    if "seed" in model.get_params():
        other = clone(model).set_params(seed=1).fit(TRAIN).item_factors_
        assert not np.array_equal(other, one)


def test_what_every_recommender_refuses(model: FactorRecommender) -> None:
    with pytest.raises(NotFitted, match="call fit first"):
        model.recommend([0])
    with pytest.raises(NotFitted):
        _ = model.user_factors_
    model.fit(TRAIN)
    with pytest.raises(RecommendError, match="no user 60"):
        model.scores([60])
    with pytest.raises(RecommendError, match="row numbers"):
        model.scores(["a"])
    with pytest.raises(RecommendError, match="k = 0"):
        model.recommend([0], k=0)
    with pytest.raises(RecommendError, match="2 users and 2 items"):
        model.evaluate(Interactions.from_pairs([1], [1]))
    assert model.scores([]).shape == (0, PLANTED.num_items)
    assert model.recommend([], k=3)[0].shape == (0, 3)


def test_trained_ones_beat_popularity_where_there_are_communities() -> None:
    options: dict[str, Any] = {**SMALL, "epochs": 40}
    floor = Popularity().fit(TRAIN).evaluate(TEST, k=5).recall
    for model in (
        MatrixFactorization(**options),
        LightGCN(**options),
        UltraGCN(**options, negatives=20),
    ):
        assert model.fit(TRAIN).evaluate(TEST, k=5).recall > 2 * floor, type(model).__name__


def test_the_best_validated_epoch_is_kept() -> None:
    seen: list[Validated] = []
    model = MatrixFactorization(**{**SMALL, "epochs": 60, "patience": 4, "lr": 0.1})
    model.fit(FIT, validation=VALIDATION, callback=seen.append)
    recalls = [v.ranking.recall for v in seen]
    assert [v.epoch for v in seen] == list(range(1, model.epochs_ + 1))
    best = int(np.argmax(recalls)) + 1
    assert model.best_epoch_ == best
    assert model.epochs_ == best + 4 < 60
    shorter = clone(model).set_params(epochs=best, patience=None).fit(FIT, validation=VALIDATION)
    np.testing.assert_array_equal(shorter.item_factors_, model.item_factors_)
    plain = clone(model).set_params(epochs=best, patience=None).fit(FIT)
    np.testing.assert_array_equal(plain.item_factors_, model.item_factors_)


@pytest.mark.parametrize("name", ["mf", "lightgcn", "ultragcn"])
def test_an_interrupted_run_goes_on_as_if_it_were_not(name: str, tmp_path: Path) -> None:
    model: Any = clone(MODELS[name]).set_params(epochs=4)
    whole = clone(model).fit(FIT, validation=VALIDATION)

    def interrupt(found: Validated) -> None:
        if found.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(FIT, validation=VALIDATION, output=tmp_path, callback=interrupt)
    assert not hasattr(model, "tables_")
    model.fit(FIT, validation=VALIDATION, output=tmp_path)
    np.testing.assert_array_equal(model.item_factors_, whole.item_factors_)
    assert [v.epoch for v in model.history_] == [3, 4], "two epochs were on the disk"
    for changed in ({"l2": 0.5}, {"lr": 0.5}):
        with pytest.raises(CheckpointError, match="another run"):
            clone(model).set_params(**changed).fit(FIT, validation=VALIDATION, output=tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        clone(model).fit(FIT, validation=TEST, output=tmp_path)


def test_losses_that_are_not_finite_stop_and_the_last_good_epoch_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = MatrixFactorization(**{**SMALL, "epochs": 9})
    two = clone(model).set_params(epochs=2).fit(TRAIN)
    steps_per_epoch = math.ceil(len(TRAIN) / SMALL["batch"])
    finite = PairObjective.loss
    calls = 0

    def breaks(self: PairObjective, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        output = finite(self, *arguments)
        if calls > 2 * steps_per_epoch + 1:
            output.loss.data.fill_(math.nan)
        return output

    monkeypatch.setattr(PairObjective, "loss", breaks)
    with pytest.raises(Diverged, match="keeps its vectors of epoch 2"):
        model.fit(TRAIN)
    np.testing.assert_array_equal(model.item_factors_, two.item_factors_)
    fresh = clone(model)
    with pytest.raises(Diverged):
        fresh.fit(TRAIN)  # not finite from the first step
    assert not hasattr(fresh, "tables_")


def test_a_terminated_run_says_so_and_goes_on(tmp_path: Path) -> None:
    model = MatrixFactorization(**{**SMALL, "epochs": 4})
    whole = clone(model).fit(FIT, validation=VALIDATION)

    def terminate(found: Validated) -> None:
        if found.epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingError, match="terminated in epoch 2"):
        model.fit(FIT, validation=VALIDATION, output=tmp_path, callback=terminate)
    model.fit(FIT, validation=VALIDATION, output=tmp_path)
    np.testing.assert_array_equal(model.item_factors_, whole.item_factors_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"lr": 0.0}, "lr = 0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"init": -1.0}, "init = -1"),
        ({"patience": 0}, "patience = 0"),
        ({"evaluate_every": 0}, "evaluate_every = 0"),
        ({"l2": -1.0}, "l2 = -1"),
    ],
)
def test_bad_parameters_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    for make in (MatrixFactorization, LightGCN, UltraGCN):
        with pytest.raises(RecommendError, match=message):
            make(**options).fit(TRAIN)


def test_bad_data_is_refused_and_untrained_ids_are_counted() -> None:
    with pytest.raises(RecommendError, match="nothing to train on"):
        MatrixFactorization().fit(Interactions.from_pairs([], []))
    with pytest.raises(RecommendError, match="at least two"):
        MatrixFactorization().fit(np.ones((3, 1)))
    with pytest.raises(RecommendError, match="are trained on"):
        MatrixFactorization().fit(TRAIN, validation=TRAIN)
    with pytest.raises(RecommendError, match="layers = -1"):
        LightGCN(layers=-1).fit(TRAIN)
    idle = Interactions(TRAIN.user, TRAIN.item, TRAIN.num_users + 2, TRAIN.num_items + 1)
    with pytest.warns(UserWarning, match="2 users and 1 items have no interaction"):
        model = UltraGCN(**SMALL, negatives=3).fit(idle)
    assert np.isfinite(model.user_factors_).all()
    assert np.isfinite(model.item_factors_).all()


def test_negatives_are_uniform_and_avoid_positives() -> None:
    generator = torch.Generator().manual_seed(0)
    users = torch.zeros(4000, dtype=torch.int64) + 2
    drawn = NegativeSampler(TRAIN, 5, False, generator).draw(users)
    counts = np.bincount(drawn.flatten().numpy(), minlength=PLANTED.num_items)
    assert abs(counts / counts.mean() - 1).max() < 0.25, "a deviation is 5 % of 400"
    positives = TRAIN.by_user()[2].tolist()
    assert set(positives) & set(drawn.unique().tolist())
    drawn = NegativeSampler(TRAIN, 5, True, generator).draw(users)
    rest = np.isin(drawn.numpy(), positives).mean()
    assert rest < 4 * (len(positives) / PLANTED.num_items) ** 4
    with pytest.raises(RecommendError, match="user 1 has all 2 items"):
        NegativeSampler(Interactions.from_pairs([0, 1, 1], [0, 0, 1]), 1, True, generator)
    with pytest.raises(RecommendError, match="negatives = 0"):
        NegativeSampler(TRAIN, 0, False, generator)
