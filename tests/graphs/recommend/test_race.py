"""The race of UltraGCN and LightGCN on planted interactions, at a small size."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import recommenders_race
from benchmarks.recommenders import sizes


def test_both_sides_choose_a_setting_and_the_ratio_is_that_of_their_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recommenders_race, "SMALL", 120)
    monkeypatch.setattr(recommenders_race, "COMMUNITY", 30)
    monkeypatch.setattr(recommenders_race, "MOST_EPOCHS", 4)
    said: list[str] = []
    found = recommenders_race.race(200, 150, 20, 0, say=said.append)
    assert found["data"]["users"] == 200 and 1_000 < found["data"]["train"] < 200 * 20
    setting = {name: found["lightgcn"][name] for name in ("lr", "batch", "init")}
    assert setting in recommenders_race.LIGHT
    assert 1 <= found["lightgcn"]["epochs"] <= 4
    ratio = found["times_faster"]
    if ratio is None:
        assert found["ultragcn"]["recall@20"] < found["lightgcn"]["recall@20"]
    else:
        assert found["ultragcn"]["recall@20"] >= found["lightgcn"]["recall@20"]
        assert found["times_faster_to_98_percent"] is not None
    assert any(line.startswith("UltraGCN, small part") for line in said)


def test_a_size_is_three_numbers() -> None:
    assert sizes("20000x300x68") == (20000, 300, 68)
    for text in ("20000", "1x2", "0x5x5", "axbxc", "1x2x3x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="20000x20000x68"):
            sizes(text)
