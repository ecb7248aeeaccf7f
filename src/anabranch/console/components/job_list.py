"""Jobs in a list, as links to their pages."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from anabranch.console.components.pieces import Badge, Bar, empty
from anabranch.console.jobs import JobRow
from anabranch.console.text import ago_text


class JobList:
    """A job that goes on changes in place. ``none`` is said where there are no rows."""

    def __init__(self, rows: Sequence[JobRow], root: str, none: str) -> None:
        self._root = root
        self._none = none
        self._items: dict[str, JobItem] = {}
        self._box = ui.element("div").classes("stack")
        self._fill(rows)

    def show(self, rows: Sequence[JobRow]) -> None:
        """Bring it up to date."""
        if [row.id for row in rows] != list(self._items):
            self._fill(rows)
            return
        for row in rows:
            self._items[row.id].show(row)

    def _fill(self, rows: Sequence[JobRow]) -> None:
        self._box.clear()
        with self._box:
            self._items = {row.id: JobItem(row, self._root) for row in rows}
            if not rows:
                empty("No jobs yet", self._none)


class JobItem:
    """A job in the list, as a link to its page."""

    def __init__(self, row: JobRow, root: str) -> None:
        with ui.element("a").classes("card job-item") as link:
            link._props["href"] = f"{root}/jobs/{row.kind}/{row.id}"
            with ui.element("div").classes("across"):
                ui.label(row.title).classes("job-title break")
                self._badge = Badge(row.state)
                ui.element("div").classes("grow")
                self._created = ui.label().classes("dim small")
            self._bar = Bar("Progress", row.fraction)
            self._line = ui.label().classes("dim small number")
        self.show(row)

    def show(self, row: JobRow) -> None:
        """Bring it up to date; nothing is sent unless it changed."""
        self._badge.show(row.state)
        self._bar.show(row.fraction)
        self._created.text = ago_text(row.created)
        self._line.text = row.progress
