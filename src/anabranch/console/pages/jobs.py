"""Jobs: what runs and ran, and the form for a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nicegui import ui
from starlette.requests import Request

from anabranch.console.components.frame import button, frame, heading
from anabranch.console.components.job_form import JobForm
from anabranch.console.components.pieces import Badge, Bar, empty
from anabranch.console.console import Console
from anabranch.console.jobs import JobKind, JobRow
from anabranch.console.pages import job
from anabranch.console.pages.access import page, root_path, until_left
from anabranch.console.sessions import Visitor
from anabranch.console.text import ago_text

NO_JOBS = "Upload a file of examples and press New job: the model learns while it serves."
KEEPS_NONE = "This server keeps no jobs. One that was started with anabranch up does."


def register(console: Console) -> None:
    """``/jobs`` and ``/jobs/KIND/ID``."""
    job.register(console)

    @page(console, "/jobs")
    async def jobs(request: Request, visitor: Visitor) -> None:
        with frame(console, "jobs", "Jobs"):
            if not console.job_kinds:
                with heading("Jobs"):
                    pass
                empty("No jobs here", KEEPS_NONE)
                return
            for kind in console.job_kinds.values():
                await _show_kind(kind, visitor.owner, opened="new" in request.query_params)


async def _show_kind(kind: JobKind, owner: str | None, opened: bool) -> None:
    fields, rows = await asyncio.gather(
        asyncio.to_thread(kind.fields, owner), asyncio.to_thread(kind.rows, owner)
    )
    with heading(kind.title):
        new = button("New job", "plus", "main").mark("new-job")
    root = root_path()

    def created(job_id: str) -> None:
        ui.navigate.to(f"/jobs/{kind.name}/{job_id}")

    with ui.element("section").classes("card").style("margin-bottom: 20px") as panel:
        panel.props('aria-label="New job"')
        JobForm(kind, owner, fields, created)
    panel.set_visibility(opened)
    new.on_click(lambda: panel.set_visibility(not panel.visible))
    shown = JobList(rows, root)
    until_left(kind.watch_rows(owner, shown.show))


class JobList:
    """The newest jobs. A job that goes on changes in place."""

    def __init__(self, rows: Sequence[JobRow], root: str) -> None:
        self._root = root
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
                empty("No jobs yet", NO_JOBS)


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
