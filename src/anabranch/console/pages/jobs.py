"""Jobs: what runs and ran, and the form for a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from nicegui import ui
from starlette.requests import Request

from anabranch.console.components.frame import button, frame, heading
from anabranch.console.components.job_form import JobForm
from anabranch.console.components.job_list import JobList
from anabranch.console.components.pieces import empty
from anabranch.console.console import Console
from anabranch.console.jobs import ConsoleKind, TakesFiles
from anabranch.console.pages import job
from anabranch.console.pages.access import page, root_path, until_left
from anabranch.console.sessions import Visitor

NO_JOBS = "Press New job: what is wrong is said before it starts."
NO_JOBS_WITH_FILES = (
    "Upload a file of examples and press New job: the model learns while it serves."
)
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
            open_ones = [kind for kind in console.job_kinds.values() if not kind.refusal]
            wanted = request.query_params.get("new")
            if wanted == "" and open_ones:
                wanted = open_ones[0].name
            for kind in console.job_kinds.values():
                await _show_kind(kind, visitor.owner, opened=kind.name == wanted)
            _show_refusals(console.job_kinds.values())


async def _show_kind(kind: ConsoleKind, owner: str | None, opened: bool) -> None:
    rows = await asyncio.to_thread(kind.rows, owner)
    if kind.refusal and not rows:
        return
    with heading(kind.title):
        if not kind.refusal:
            new = button("New job", "plus", "main").mark(f"new-{kind.name}")
    if not kind.refusal:
        form = NewJob(kind, owner)
        new.on_click(form.toggle)
        if opened:
            await form.toggle()
    root = root_path()
    none = NO_JOBS_WITH_FILES if isinstance(kind, TakesFiles) else NO_JOBS
    shown = JobList(rows, root, none)
    until_left(kind.watch_rows(owner, shown.show))


def _show_refusals(kinds: Iterable[ConsoleKind]) -> None:
    """Why some kinds cannot be started here, each reason once."""
    titles: dict[str, list[str]] = {}
    for kind in kinds:
        if kind.refusal:
            titles.setdefault(kind.refusal, []).append(kind.title)
    for refusal, refused in titles.items():
        empty(", ".join(refused), refusal)


class NewJob:
    """The form for a new job, which is made when it is opened for the first time."""

    def __init__(self, kind: ConsoleKind, owner: str | None) -> None:
        self._kind = kind
        self._owner = owner
        self._made = False
        self._panel = ui.element("section").classes("card").style("margin-bottom: 20px")
        self._panel.props(f'aria-label="New job: {kind.title}"')
        self._panel.set_visibility(False)

    async def toggle(self) -> None:
        """Open it, or close it with what is written in it."""
        self._panel.set_visibility(not self._panel.visible)
        if self._made:
            return
        self._made = True
        fields = await asyncio.to_thread(self._kind.fields, self._owner)
        with self._panel:
            JobForm(self._kind, self._owner, fields, self._created)

    def _created(self, job_id: str) -> None:
        ui.navigate.to(f"/jobs/{self._kind.name}/{job_id}")
