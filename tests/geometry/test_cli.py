"""The commands ``anabranch geometry nbody``."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.models.geometry import nbody

SMALL = ("--systems", 8, "--test", 6, "--batch", 4, "--width", 8, "--layers", 1)


@pytest.fixture(autouse=True)
def small_simulations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    for name, value in {"RECORDED": 60, "FIRST": 4, "LAST": 9, "BLOCK": 6}.items():
        monkeypatch.setattr(nbody, name, value)


def run(*arguments: object, status: int = 0) -> str:
    ran = CliRunner().invoke(app, ["geometry", "nbody", *map(str, arguments)])
    assert ran.exit_code == status, ran.output
    return ran.stdout if status == 0 else ran.output


@pytest.mark.parametrize("model", ["ponita", "egnn"])
def test_train_evaluate_and_error(model: str, tmp_path: Path) -> None:
    folder, plot = tmp_path / "net", tmp_path / "e.svg"
    arguments = ("train", "-o", folder, "--model", model, "--steps", 3, *SMALL, "--json")
    trained = json.loads(run(*arguments))
    assert (trained["model"], trained["steps"]) == (model, 3)
    assert json.loads(run(*arguments))["test_mse"] == trained["test_mse"]  # nothing left to do
    evaluated = json.loads(run("evaluate", folder, "--test", 6, "--json"))
    assert evaluated["mse"] == pytest.approx(trained["test_mse"], abs=2e-6)
    assert evaluated["linear_motion_mse"] > 0
    options = ("error", folder, "--test", 3, "--axes", 2, "--plot", plot, "--json")
    rows = json.loads(run(*options))["by_angle"]
    assert [row["degrees"] for row in rows] == [15.0 * k for k in range(13)]
    assert rows[0]["largest"] < 1e-5
    assert all(row["mean"] <= row["largest"] for row in rows)
    if model == "egnn":
        assert max(row["largest"] for row in rows) < 1e-4
    assert ElementTree.fromstring(plot.read_text()).tag.endswith("svg")


def test_for_people(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    said = run("train", "-o", folder, "--seconds", 0.2, *SMALL)
    assert "mean squared error" in said
    assert str(folder) in said
    assert "straight lines" in run("evaluate", folder, "--test", 6)
    assert "largest" in run("error", folder, "--test", 2, "--axes", 1)


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert "one of the two" in run("train", "-o", tmp_path / "x", status=2)
    egnn = ("train", "-o", tmp_path / "x", "--model", "egnn", "--steps", 1, "--orientations", 6)
    assert "egnn has no directions" in run(*egnn, status=2)
    said = run("train", "-o", tmp_path / "x", "--steps", 1, "--orientations", 2, *SMALL, status=2)
    assert "cannot represent a vector" in said
    assert "no folder that" in run("evaluate", tmp_path / "nothing", status=2)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "no folder that" in run("error", tmp_path, status=2)
