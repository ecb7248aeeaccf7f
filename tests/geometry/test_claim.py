"""The experiment of S01 with so little training that no verdict follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anabranch.claims.geometry_experiments import ponita as experiment
from anabranch.models.progress import silent


@pytest.mark.slow
def test_everything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    small = {"TRAIN": 20, "TEST": 20, "CHECKED": 250, "SECONDS": 0.5, "CURVE": 2}
    batches = {"ponita": 10, "egnn": 10}
    for name, value in {
        **small,
        "BATCHES": batches,
        "ROTATIONS": 2,
        "TURNED_CLOUDS": 5,
        "ANGLES": (0.0, 90.0),
    }.items():
        monkeypatch.setattr(experiment, name, value)
    measured = experiment.measure(3, silent)
    figures = json.loads(json.dumps(measured.figures))
    parts = figures["parts_that_hold"]
    assert measured.holds == all(parts.values())
    assert parts["exactness"] is True
    assert measured.seeds == (3, 4)
    assert figures["parameters"] == {"ponita": 34_531, "egnn": 134_088}
    spent = figures["processor_seconds"]
    assert all(0.5 <= seconds < 0.9 for both in spent.values() for seconds in both)
    turned = figures["deviation_of_the_trained_ponita_under_random_rotations"]
    assert 0 < turned["mean"] <= turned["largest"]
    learning, deviation = measured.plots
    assert len(learning.series["ponita"]) == len(learning.series["egnn"]) == 2
    assert deviation.series["largest"][0][1] < 1e-5
    assert deviation.series["largest"][1][1] > 1e-4
