"""Splits are partitions; devices and seeds are what they say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.federated import DeviceProfile, log_uniform, splits
from anabranch.federated.errors import SplitError
from anabranch.federated.randomness import derive_seed, generator, seeded

LABELS = [f"label-{index % 7}" for index in range(210)]


def is_partition(split, count):
    return sorted(np.concatenate(split).tolist()) == list(range(count))


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 5))
def test_iid(examples, clients, seed):
    if clients > examples:
        with pytest.raises(SplitError, match=f"{examples} examples"):
            splits.iid(examples, clients, seed)
        return
    split = splits.iid(examples, clients, seed)
    sizes = [len(part) for part in split]
    assert is_partition(split, examples) and max(sizes) - min(sizes) <= 1
    assert all(
        (a == b).all() for a, b in zip(split, splits.iid(examples, clients, seed), strict=True)
    )


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 100.0])
def test_dirichlet(alpha, balance):
    split = splits.dirichlet(LABELS, 6, alpha, min_size=5, seed=3, balance=balance)
    assert is_partition(split, len(LABELS)) and min(map(len, split)) >= 5
    again = splits.dirichlet(LABELS, 6, alpha, min_size=5, seed=3, balance=balance)
    assert all((a == b).all() for a, b in zip(split, again, strict=True))


def test_small_alpha_means_few_labels():
    def labels_seen(alpha):
        split = splits.dirichlet(LABELS, 6, alpha, seed=1)
        return np.mean([len({LABELS[i] for i in part}) for part in split])

    assert labels_seen(0.05) < labels_seen(0.5) < labels_seen(100) == 7


def test_balance_keeps_sizes_together():
    def spread(balance):
        sizes = [len(p) for p in splits.dirichlet(LABELS, 6, 0.3, seed=2, balance=balance)]
        return max(sizes) - min(sizes)

    assert spread(True) < spread(False)


def test_an_impossible_dirichlet_ends_with_the_numbers():
    with pytest.raises(SplitError, match=r"1000 draws .* 6 clients never had 34 of the 210"):
        splits.dirichlet(LABELS, 6, 0.01, min_size=34)


def test_by_category_and_shards():
    parts = splits.by_category(LABELS)
    assert list(parts) == [f"label-{index}" for index in range(7)]
    assert is_partition(list(parts.values()), 210)
    split = splits.shards(LABELS, 7, per_client=2, seed=4)
    assert is_partition(split, 210)
    assert max(len({LABELS[i] for i in part}) for part in split) <= 3
    assert {len(part) for part in split} == {30}


@pytest.mark.parametrize(
    "make",
    [
        lambda: splits.iid(3, 0),
        lambda: splits.iid(0, 1),
        lambda: splits.dirichlet(LABELS, 6, 0.0),
        lambda: splits.dirichlet([], 1, 1.0),
        lambda: splits.by_category([]),
        lambda: splits.shards(LABELS, 4, per_client=0),
        lambda: splits.shards(["a"], 4),
    ],
)
def test_splits_that_cannot_be(make):
    with pytest.raises(SplitError):
        make()


def test_devices():
    profile = DeviceProfile(0.5, 100.0, 50.0, 0.25)
    assert profile.seconds(down=200, units=3, up=100) == 0.25 + 4 + 1.5 + 1
    assert DeviceProfile().seconds(10**9, 10**9, 10**9) == 0
    many, few = log_uniform(50, seed=1), log_uniform(5, seed=1)
    assert many[:5] == few != log_uniform(5, seed=2)
    assert all(0.01 <= device.seconds_per_unit <= 0.1 for device in many)
    jitter = DeviceProfile(1.0, jitter=0.2)
    assert jitter.stretch(0, "a", 1) == jitter.stretch(0, "a", 1) != jitter.stretch(0, "a", 2)
    logs = [math.log(jitter.stretch(0, "a", task)) for task in range(2000)]
    assert abs(np.mean(logs)) < 0.02 and abs(np.std(logs) - 0.2) < 0.02


@pytest.mark.parametrize(
    "values",
    [
        {"seconds_per_unit": -1.0},
        {"up_bytes_per_s": 0.0},
        {"availability": 1.5},
        {"failure_rate": -0.1},
        {"latency_s": math.nan},
    ],
)
def test_devices_that_cannot_be(values):
    with pytest.raises(ConfigurationError):
        DeviceProfile(**values)
    with pytest.raises(ConfigurationError):
        log_uniform(1, 0, latency_s=(0.0, 1.0))


def test_seeds_belong_to_their_words():
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    assert (
        len({derive_seed(*words) for words in ((1, "a"), (1, "b"), ("1", "a"), (1, "a", 0))}) == 4
    )
    assert generator(1, "x").random() == generator(1, "x").random()


def test_seeded_randomness_leaves_no_trace():
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with seeded(7):
        inside = draw()
    assert draw() == expected
    with seeded(7):
        assert draw() == inside
