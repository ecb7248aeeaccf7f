"""One job: how far it is, its losses, what happened, and what can be asked of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nicegui import ui
from starlette.requests import Request

from anabranch.console.components.chart import Chart
from anabranch.console.components.frame import button, download_link, frame, heading
from anabranch.console.components.pieces import Badge, Bar, Notice, empty, facts, row, table
from anabranch.console.console import Console
from anabranch.console.jobs import Action, ConsoleKind, JobReport
from anabranch.console.pages.access import page, until_left
from anabranch.console.pages.downloads import artefact_address
from anabranch.console.sessions import Visitor
from anabranch.console.text import NONE, ago_text, bytes_text, clock_text
from anabranch.errors import AnabranchError
from anabranch.jobs import Artefact, Event

ACTIONS: dict[Action, tuple[str, str]] = {
    "pause": ("Pause", "plain"),
    "resume": ("Resume", "main"),
    "cancel": ("Cancel", "danger"),
}
_LEVELS = {"warn": "warn", "error": "bad"}


def register(console: Console) -> None:
    """``/jobs/KIND/ID``."""

    @page(console, "/jobs/{kind}/{job_id}")
    async def job(request: Request, visitor: Visitor) -> None:
        kind = console.job_kinds.get(request.path_params["kind"])
        job_id = request.path_params["job_id"]
        with frame(console, "jobs", "Job"):
            try:
                if kind is None:
                    raise AnabranchError("this server has no jobs of this kind")
                report = await asyncio.to_thread(kind.report, job_id, visitor.owner)
            except AnabranchError as error:
                ui.context.client.status_code = 404
                with heading("Job"):
                    pass
                empty("There is no such job", f"{error}; the Jobs page lists those that there are.")
                return
            view = JobView(kind, visitor.owner, report)
        until_left(kind.watch_report(job_id, visitor.owner, view.show))


class JobView:
    """A job's page, brought up to date about once a second."""

    def __init__(self, kind: ConsoleKind, owner: str | None, report: JobReport) -> None:
        self._kind = kind
        self._owner = owner
        self._id = report.row.id
        self._shown_facts: dict[str, str] = {}
        self._shown_artefacts: Sequence[Artefact] = ()
        self._newest_event = 0
        self._model = ""
        with heading(report.row.title):
            self._badge = Badge(report.row.state)
            self._buttons = {action: self._make_button(action) for action in ACTIONS}
            self._chat = button("Chat with it", "chat", "main").mark("chat-with")
            self._chat.on_click(lambda: ui.navigate.to(f"/?model={self._model}"))
        with ui.element("div").classes("stack"):
            self._notice = Notice()
            with ui.element("div").classes("card stack"):
                self._bar = Bar("Progress", report.row.fraction)
                self._line = ui.label().classes("number").mark("progress")
                self._facts = ui.element("div")
            with ui.element("div").classes("card") as self._chart_card:
                self._chart = Chart("Loss", {}, x_label=report.axis)
            with ui.element("div").classes("card stack") as self._artefacts_card:
                with ui.element("h2"):
                    ui.label("Artefacts")
                with table(("name", "size", "SHA-256", ""), "Artefacts") as self._artefacts:
                    pass
            with ui.element("div").classes("card stack"):
                with ui.element("h2"):
                    ui.label("Events")
                self._events = ui.element("div").classes("events")
                self._events.props('tabindex=0 role=region aria-label="Events, newest first"')
            with ui.element("div").classes("card stack") as self._log_card:
                with ui.element("h2"):
                    ui.label("Log")
                self._log = ui.label().classes("lines").mark("log")
                self._log.props('tabindex=0 role=region aria-label="The end of the log"')
        self.show(report)

    def show(self, report: JobReport) -> None:
        """Bring it up to date; nothing is sent for what is as it was."""
        job = report.row
        self._badge.show(job.state)
        for action, made in self._buttons.items():
            made.set_visibility(action in job.actions)
        self._bar.show(job.fraction)
        self._line.text = job.progress
        self._chart.show(report.curves)
        self._chart_card.set_visibility(bool(report.curves))
        self._log.text = report.log
        self._log_card.set_visibility(bool(report.log))
        if report.error:
            self._notice.wrong(f"{report.error}. The events below say what led to it.")
        self._show_facts(report)
        self._show_chat(report)
        self._show_artefacts(report.artefacts)
        self._show_events(report.events)

    def _show_facts(self, report: JobReport) -> None:
        if report.facts != self._shown_facts:
            self._shown_facts = dict(report.facts)
            self._facts.clear()
            with self._facts:
                facts({**report.facts, "Created": ago_text(report.row.created), "Id": self._id})

    def _show_chat(self, report: JobReport) -> None:
        self._model = report.model or ""
        self._chat.set_visibility(report.model is not None)

    def _show_artefacts(self, artefacts: Sequence[Artefact]) -> None:
        self._artefacts_card.set_visibility(bool(artefacts))
        if artefacts == self._shown_artefacts:
            return
        self._shown_artefacts = artefacts
        self._artefacts.clear()
        with self._artefacts:
            for each in artefacts:
                digest = each.sha256 or NONE
                classes = ("break", "nowrap", "break digest", "right")
                cells = row(each.name, bytes_text(each.size), digest, "", classes=classes)
                with cells[-1]:
                    download_link(each.name, artefact_address(self._id, each.name), "small")

    def _show_events(self, events: Sequence[Event]) -> None:
        fresh = [event for event in events if event.sequence > self._newest_event]
        if not fresh:
            return
        self._newest_event = fresh[0].sequence
        with self._events:
            for event in reversed(fresh):
                _event(event).move(target_index=0)

    def _make_button(self, action: Action) -> ui.button:
        text, kind = ACTIONS[action]
        made = button(text, "", kind).mark(action)
        return made.on_click(lambda: self._ask(action))

    async def _ask(self, action: Action) -> None:
        self._notice.clear()
        for made in self._buttons.values():
            made.disable()
        try:
            await asyncio.to_thread(self._kind.ask, self._id, action, self._owner)
            self.show(await asyncio.to_thread(self._kind.report, self._id, self._owner))
        except AnabranchError as error:
            self._notice.wrong(error)
        finally:
            for made in self._buttons.values():
                made.enable()


def _event(event: Event) -> ui.element:
    with ui.element("div").classes("event") as made:
        ui.label(clock_text(event.time)).classes("dim number")
        ui.label(event.message).classes("break " + _LEVELS.get(event.level, ""))
    return made
