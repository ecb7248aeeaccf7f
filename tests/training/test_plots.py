import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import MissingExtra
from anabranch.training.errors import DataError
from anabranch.training.plots import BARS, plot_losses, smoothed, sparkline


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_png_and_svg(tmp_path):
    entries = [{"step": i, "loss": 3 / i} for i in range(1, 30)]
    entries += [{"step": 10, "validation": {"loss": 0.4}}, {"step": 11, "loss": None}]
    log = write(tmp_path / "metrics.jsonl", entries)
    png, svg = plot_losses(log, tmp_path / "plots" / "loss", "a run")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()


def test_nothing_to_plot(tmp_path):
    log = write(tmp_path / "metrics.jsonl", [{"step": 1, "validation": {"loss": 1}}])
    with pytest.raises(DataError, match="no training step"):
        plot_losses(log, tmp_path / "loss")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"anabranch\[train\]"):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss")


def test_moving_average_has_no_bias_at_the_start():
    assert smoothed([5.0] * 4) == pytest.approx([5.0] * 4)
    assert smoothed([1.0, 3.0], past=0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    assert smoothed([]) == []


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert sparkline([7, 7, 0, 0], width=2) == BARS[-1] + BARS[0]
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert sparkline([4.0]) == BARS[0]


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 80))
def test_sparkline_is_as_wide_as_asked(values, width):
    assert len(sparkline(values, width)) == min(width, len(values))
