"""Claims: what published systems promise, what was measured here, and measuring again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from nicegui import ui
from starlette.requests import Request

from anabranch.console.claims import ClaimRow, ClaimRun
from anabranch.console.components.chart import Chart
from anabranch.console.components.frame import button, frame, heading
from anabranch.console.components.pieces import Badge, Notice, facts, row, table
from anabranch.console.console import Console
from anabranch.console.pages.access import page, root_path, until_left
from anabranch.console.sessions import Visitor
from anabranch.console.text import ago_iso_text, seconds_text
from anabranch.errors import AnabranchError
from anabranch.evaluation.plotting import Plot

EXPLANATION = (
    "Each claim runs a published method against its baseline on this machine; the threshold was "
    "fixed beforehand. One that falls short says so."
)
SLOW = "Measuring takes minutes of processor time, at low priority beside what is served."


def register(console: Console) -> None:
    """``/claims`` and ``/claims/ID``."""

    @page(console, "/claims")
    async def claims(request: Request, visitor: Visitor) -> None:
        rows = await asyncio.to_thread(console.claims.rows)
        with frame(console, "claims", "Claims"):
            with heading("Claims", f"{EXPLANATION} {_summary(rows)}"):
                pass
            with ui.element("div").classes("stack"):
                _show_running(console)
                with ui.element("div").classes("card"):
                    _show_table(rows)

    @page(console, "/claims/{claim_id}")
    async def claim(request: Request, visitor: Visitor) -> None:
        rows = await asyncio.to_thread(console.claims.rows)
        wanted = request.path_params["claim_id"]
        found = next((each for each in rows if each.claim.id == wanted), None)
        with frame(console, "claims", wanted if found else "Claims"):
            if found is None:
                ui.context.client.status_code = 404
                with heading("Claims", "There is no such claim; the Claims page lists them all."):
                    pass
                return
            _show_claim(console, found)


def _show_table(rows: Sequence[ClaimRow]) -> None:
    root = root_path()
    with table(("id", "system", "verdict", "held", "holds if", "documented figure"), "Claims"):
        for each in rows:
            with ui.element("tr"):
                with ui.element("td"), ui.element("a") as link:
                    link._props["href"] = f"{root}/claims/{each.claim.id}"
                    ui.label(each.claim.id).classes("nowrap")
                with ui.element("td").style("min-width: 150px; font-weight: 550"):
                    ui.label(each.claim.system)
                with ui.element("td"):
                    Badge(each.verdict)
                with ui.element("td"):
                    ui.label(each.held).classes("nowrap number")
                for text in (each.claim.threshold, each.documented):
                    with ui.element("td").classes("small dim").style("min-width: 200px"):
                        ui.label(text)


def _summary(rows: Sequence[ClaimRow]) -> str:
    counts = Counter(row.verdict for row in rows)
    return (
        f"Here, {counts['holds']} hold, {counts['falls short']} fall short and "
        f"{counts['not measured']} were not measured."
    )


def _show_running(console: Console) -> None:
    """The claim that is being measured, whatever page began it."""
    box = ui.element("div").classes("card stack")
    with box:
        RunView(console)
    box.set_visibility(console.claims.busy)

    def show(run: ClaimRun) -> None:
        box.set_visibility(True)  # also what it ended with

    until_left(console.claims.watchers.add(show))


def _show_claim(console: Console, found: ClaimRow) -> None:
    claim, newest = found.claim, found.newest
    with heading(f"{claim.id} {claim.system}"):
        Badge(found.verdict)
        again = button("Measure again" if newest else "Measure", "again", "main").mark("measure")
    with ui.element("div").classes("stack"):
        notice = Notice()
        RunView(console, claim.id)
        with ui.element("div").classes("card"):
            told = {
                "The paper says": claim.paper,
                "Baseline": claim.baseline,
                "Method": claim.method,
                "Holds if": claim.threshold,
            }
            if found.documented:
                told["Documented figure"] = found.documented
            facts(told).style("grid-template-columns: 1fr")
        if newest is None:
            ui.label(f"Not measured on this machine yet. {SLOW}").classes("dim")
        else:
            if newest.note:
                ui.label(newest.note).classes("notice")
            with ui.element("div").classes("grid2"):
                for plot in newest.plots:
                    with ui.element("div").classes("card"):
                        _chart(plot)
            _show_figures(found)

    async def measure() -> None:
        notice.clear()
        try:
            await console.claims.start(claim.id)
        except AnabranchError as error:
            notice.wrong(error)

    again.on_click(measure)


def _show_figures(found: ClaimRow) -> None:
    newest = found.newest
    assert newest is not None
    with ui.element("div").classes("card stack"):
        with table(("figure", "newest run"), "Figures"):
            for figure in found.figures:
                row(figure.name, figure.value, classes=("", "number"))
        seeds = ", ".join(map(str, newest.seeds))
        about = (
            f"{ago_iso_text(newest.finished)} in {seconds_text(newest.seconds)}, seeds {seeds}, "
            f"{newest.machine.get('cores')} cores; held {found.held} times."
        )
        ui.label(about).classes("dim small")


def _chart(plot: Plot) -> None:
    levels = {
        name: [(x, height) for x in _ends(plot)] for name, height in (plot.levels or {}).items()
    }
    Chart(
        f"{plot.title}: {plot.y}",
        {**plot.series, **levels},
        marks=plot.marks,
        levels=list(levels),
        x_label=plot.x,
        log_x=plot.x_scale == "log",
    )


def _ends(plot: Plot) -> list[float]:
    xs = [x for points in plot.series.values() for x, _ in points]
    return [min(xs), max(xs)] if xs else []


class RunView:
    """A measurement as it goes on: of one claim, or of any."""

    def __init__(self, console: Console, claim_id: str | None = None) -> None:
        self._console = console
        self._claim_id = claim_id
        with ui.element("div").classes("stack") as self._box:
            with ui.element("div").classes("across"):
                self._badge = Badge("running")
                self._title = ui.label().style("font-weight: 600")
                ui.element("div").classes("grow")
                self._stop = button("Stop", "stop", "danger").mark("stop-claim")
                self._stop.on_click(console.claims.stop)
                self._look = button("Show the result", "", "main")
                self._look.on_click(lambda: ui.navigate.reload())
            self._lines = ui.label().classes("lines").props('role=log aria-label="Progress"')
            self._lines.props("tabindex=0")
        if console.claims.current is not None and (console.claims.busy or claim_id is None):
            self.show(console.claims.current)
        else:
            self._box.set_visibility(False)
        until_left(console.claims.watchers.add(self.show))

    def show(self, run: ClaimRun) -> None:
        """Bring it up to date."""
        if self._claim_id not in (None, run.id):
            return
        self._box.set_visibility(True)
        self._badge.show(run.state)
        self._title.text = f"Measuring {run.id}" if run.state == "running" else run.id
        self._lines.text = "\n".join(run.lines[-12:]) or "starting …"
        self._stop.set_visibility(run.state == "running")
        self._look.set_visibility(run.state == "finished" and self._claim_id is not None)
