"""A timeline as a picture: a row for each client, a bar for each task, a colour for each group."""

from __future__ import annotations

from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.evaluation.plotting import drawn
from anabranch.federated.timeline import Bar, Timeline

_COLOURS = [f"C{index}" for index in range(10) if index != 7]  # 7 is the grey of first tasks
_ROW = 0.28
"""Inches of a client's row."""
_THICK = 0.7
"""Of a bar, in rows."""


def timeline_svg(timeline: Timeline, clock: str = "virtual", ink: str = "#333333") -> str:
    """An ``<svg>`` element: full bars arrived, hatched ones came late or failed (crossed), hollow
    ones are under way; grey ones are first tasks, and a stroke is where a group was due.

    Raises :class:`MissingExtra` without matplotlib, :class:`ConfigurationError` without tasks.
    """
    if not timeline.bars:
        raise ConfigurationError("a timeline without tasks cannot be drawn")
    clients = timeline.clients
    rows = {client: row for row, client in enumerate(clients)}
    colours = {
        group.name: _COLOURS[index % len(_COLOURS)] for index, group in enumerate(timeline.groups)
    }
    until = timeline.until

    def draw(axes: Any) -> None:
        for bar in timeline.bars:
            colour = colours.get(bar.group, "#999999")
            axes.barh(
                rows[bar.client],
                (until if bar.ended is None else bar.ended) - bar.began,
                left=bar.began,
                height=_THICK,
                edgecolor=colour,
                linewidth=0.8,
                **_style(bar, colour),
            )
            if bar.due is not None:
                row = rows[bar.client]
                half = _THICK / 2 + 0.1
                axes.plot([bar.due, bar.due], [row - half, row + half], color=colour, linewidth=1)
        axes.set(
            title="Tasks by group",
            xlabel=f"{clock} seconds",
            yticks=range(len(clients)),
            yticklabels=clients,
        )
        axes.invert_yaxis()

    return drawn(draw, "timeline", ink, (9.0, 1.2 + _ROW * len(clients)))


def _style(bar: Bar, colour: str) -> dict[str, Any]:
    if bar.how == "arrived":
        return {"facecolor": colour, "alpha": 0.75}
    hatch = {"late": "////", "failed": "xxxx", "working": None}[bar.how]
    return {"facecolor": "none", "hatch": hatch}
