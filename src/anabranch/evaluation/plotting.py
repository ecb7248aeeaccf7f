"""Line plots as data, and as SVG that follows the reader's light or dark page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from anabranch.errors import MissingExtra

_INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
_SIZE = (6.0, 3.6)


@dataclass(frozen=True)
class Plot:
    """One pair of axes. ``series`` maps a name to its points ``(x, y)`` in order.

    ``marks`` are series drawn as points only, for example measurements beside a fitted curve.
    ``levels`` are named horizontal lines, for example a target.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    marks: tuple[str, ...] = ()
    levels: Mapping[str, float] | None = None
    x_scale: Literal["linear", "log"] = "linear"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plot:
        """The inverse of ``dataclasses.asdict``, also after JSON."""
        series = {k: [(x, y) for x, y in points] for k, points in values["series"].items()}
        return cls(**{**values, "series": series, "marks": tuple(values["marks"])})


def svg(plot: Plot, ink: str = "currentColor") -> str:
    """An ``<svg>`` element without background; axes and text take the colour ``ink``.

    Raises :class:`MissingExtra` without matplotlib.
    """

    def draw(axes: Any) -> None:
        for name, points in plot.series.items():
            line = "none" if name in plot.marks else "-"
            marker = "o" if name in plot.marks or len(points) < 20 else ""
            x, y = [p[0] for p in points], [p[1] for p in points]
            axes.plot(x, y, linestyle=line, marker=marker, markersize=4, label=name)
        for name, height in (plot.levels or {}).items():
            axes.axhline(height, linestyle=":", color=_INK, linewidth=1, label=name)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y, xscale=plot.x_scale)
        if len(plot.series) + len(plot.levels or {}) > 1:
            axes.legend()

    return drawn(draw, plot.title, ink)


def drawn(
    draw: Callable[[Any], None], salt: str, ink: str, size: tuple[float, float] = _SIZE
) -> str:
    """What ``draw(axes)`` draws on matplotlib's axes, as :func:`svg` gives it.

    ``size`` is in inches; the same ``salt`` and drawing give the same text.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "train") from None

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "legend.frameon": False,
    }
    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(settings | dict.fromkeys(colours, _INK)):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    found = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), count=1, flags=re.DOTALL)
    return found.replace(_INK, ink)
