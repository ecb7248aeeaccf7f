"""Loss curves of a run: as PNG and SVG, and as one line for a terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import MissingExtra
from anabranch.training.errors import DataError
from anabranch.training.metrics_log import read_metrics

BARS = "▁▂▃▄▅▆▇█"
SMOOTHING = 0.9
"""Weight of the past in the smoothed curve."""


def plot_losses(log: Path, output: Path, title: str = "") -> list[Path]:
    """Draw ``output``.png and ``output``.svg from a ``metrics.jsonl``; returns both paths.

    The raw loss of every step, its moving average, and the validation loss. Raises
    :class:`MissingExtra` without matplotlib and :class:`DataError` for a log without steps.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "train") from None
    entries = list(read_metrics(log))
    steps = [(e["step"], e["loss"]) for e in entries if e.get("loss") is not None]
    if not steps:
        raise DataError(f"{log} has no training step with a loss to plot")
    numbers, losses = zip(*steps, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    axes.plot(numbers, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss")
    axes.plot(numbers, smoothed(losses), color="tab:blue", linewidth=1.8, label="moving average")
    validations = [(e["step"], e["validation"].get("loss")) for e in entries if "validation" in e]
    validations = [(step, loss) for step, loss in validations if loss is not None]
    if validations:
        axes.plot(*zip(*validations, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="optimiser step", ylabel="loss", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = [output.with_name(f"{output.name}.{suffix}") for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def smoothed(values: Sequence[float], past: float = SMOOTHING) -> list[float]:
    """Exponential moving average without the bias towards its start (as in Adam, section 3)."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = past * average + (1 - past) * value
        weight = past * weight + (1 - past)
        result.append(average / weight)
    return result


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve in one line of text; each column is the mean of the values that fall in it.

    Values that are not finite are left out; no values give an empty string.
    """
    finite = [value for value in values if math.isfinite(value)]
    width = min(width, len(finite))
    bounds = [round(column * len(finite) / width) for column in range(width + 1)] if width else []
    means = [sum(finite[start:stop]) / (stop - start) for start, stop in itertools.pairwise(bounds)]
    if not means:
        return ""
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((m - low) / span * len(BARS)))] for m in means)
