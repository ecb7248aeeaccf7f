"""Line charts that take new points without being drawn anew. They load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from nicegui import ui

Points = Sequence[tuple[float, float | None]]


class Chart(ui.element, component="chart.js"):
    """``series`` are points ``(x, y)`` by name, in order of x; y None leaves a gap.

    ``unit`` ``%`` shows fractions of 1 as percent, ``s`` seconds as milliseconds where they are
    short; another one is put behind the numbers. ``axis`` ``time`` takes seconds since 1970 and
    shows the last ``window`` seconds. ``marks`` names series that are points only, ``levels``
    horizontal lines, for example targets.
    """

    def __init__(
        self,
        title: str,
        series: Mapping[str, Points],
        *,
        unit: str = "",
        axis: Literal["number", "time"] = "number",
        window: float = 0.0,
        area: bool = False,
        maximum: float | None = None,
        marks: Sequence[str] = (),
        levels: Sequence[str] = (),
        x_label: str = "",
        log_x: bool = False,
    ) -> None:
        super().__init__()
        self._props["title"] = title
        self._props["unit"] = unit
        self._props["axis"] = axis
        self._props["window"] = window
        self._props["area"] = area
        self._props["maximum"] = maximum
        self._props["marks"] = list(marks)
        self._props["levels"] = list(levels)
        self._props["xLabel"] = x_label
        self._props["logX"] = log_x
        self.show(series)

    def show(self, series: Mapping[str, Points]) -> None:
        """Draw these instead; nothing is sent if they are the same."""
        values = [
            {"name": name, "points": [list(p) for p in points]} for name, points in series.items()
        ]
        if self._props.get("series") != values:
            self._props["series"] = values

    def push(self, x: float, *values: float | None) -> None:
        """A new point for every series, in their order."""
        self.run_method("push", [x, *values])
