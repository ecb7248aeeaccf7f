"""The testbeds are what they say they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anabranch.evaluation.testbeds import digits, tinyops
from anabranch.models.cache import root


def test_digits():
    train, test = digits.images()
    assert train.pixels.shape == (1437, 64) and test.pixels.shape == (360, 64)
    assert float(train.pixels.min()) == 0 and float(train.pixels.max()) == 1
    model = digits.perceptron()
    assert sum(p.numel() for p in model.parameters()) == 4810
    assert torch.equal(next(model.parameters()), next(digits.perceptron().parameters()))
    assert 0 <= digits.accuracy(model) <= 0.3


EXPECTED = {
    "copy": [3, 15, 0, 7, 9],
    "reverse": [9, 7, 0, 15, 3],
    "sort": [0, 3, 7, 9, 15],
    "rotate": [9, 3, 15, 0, 7],
    "increment": [4, 0, 1, 8, 10],
    "swap": [9, 15, 0, 7, 3],
    "maximum": [15] * 5,
    "mirror": [12, 0, 15, 8, 6],
}


@pytest.mark.parametrize(("name", "operation"), tinyops.OPERATIONS)
def test_operations_by_hand(name, operation):
    assert operation(np.array([[3, 15, 0, 7, 9]])).tolist() == [EXPECTED[name]]


def test_sequences_are_seeded_and_trained_on_their_outputs_only():
    rows = tinyops.sequences(5, 10, "x", 1)
    assert rows.shape == (10, 11) and (rows[:, 0] == 21).all()
    assert (rows == tinyops.sequences(5, 10, "x", 1)).all()
    assert (rows != tinyops.sequences(5, 10, "x", 2)).any()
    (example,) = tinyops.items(5, 1, "x")[0]
    assert example.targets == 5 and list(example.trained) == [False] * 6 + [True] * 5


def test_the_network_has_about_the_size_it_should():
    assert sum(p.numel() for p in tinyops.network().parameters()) == 103_744
    figures = tinyops.score(tinyops.network())
    assert figures["accuracy"] < 0.2 and set(figures) > {"loss", "loss/mirror", "accuracy/swap"}


def test_pretraining_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyops, "root", lambda: tmp_path)
    first = tinyops.pretrained(steps=3)
    (file,) = (tmp_path / "testbeds").iterdir()
    written = file.stat().st_mtime_ns
    again = tinyops.pretrained(steps=3)
    assert file.stat().st_mtime_ns == written
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )
    assert root() is not None
