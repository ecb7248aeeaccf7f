"""Claims: what published systems promise, what was measured here, and measuring again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from nicegui import ui
from starlette.requests import Request

from anabranch.console.claims import ClaimRow, claim_rows
from anabranch.console.components.chart import Chart
from anabranch.console.components.frame import button, frame, heading
from anabranch.console.components.job_list import JobList
from anabranch.console.components.pieces import Badge, Notice, facts, row, table
from anabranch.console.console import Console
from anabranch.console.jobs import ConsoleKind, JobRow
from anabranch.console.pages.access import page, root_path, until_left
from anabranch.console.pages.jobs import KEEPS_NONE
from anabranch.console.processes import EVALUATE
from anabranch.console.sessions import Visitor
from anabranch.console.text import ago_iso_text, seconds_text
from anabranch.errors import AnabranchError
from anabranch.evaluation.plotting import Plot
from anabranch.jobs import FINISHED

EXPLANATION = (
    "Each claim runs a published method against its baseline on this machine; the threshold was "
    "fixed beforehand. One that falls short says so."
)
SLOW = "Measuring takes minutes of processor time, at low priority beside what is served."


def register(console: Console) -> None:
    """``/claims`` and ``/claims/ID``."""

    @page(console, "/claims")
    async def claims(request: Request, visitor: Visitor) -> None:
        rows = await asyncio.to_thread(claim_rows)
        with frame(console, "claims", "Claims"):
            with heading("Claims", f"{EXPLANATION} {_summary(rows)}"):
                pass
            with ui.element("div").classes("stack"):
                await _show_measurements(console.job_kinds.get(EVALUATE), visitor)
                with ui.element("div").classes("card"):
                    _show_table(rows)

    @page(console, "/claims/{claim_id}")
    async def claim(request: Request, visitor: Visitor) -> None:
        rows = await asyncio.to_thread(claim_rows)
        wanted = request.path_params["claim_id"]
        found = next((each for each in rows if each.claim.id == wanted), None)
        with frame(console, "claims", wanted if found else "Claims"):
            if found is None:
                ui.context.client.status_code = 404
                with heading("Claims", "There is no such claim; the Claims page lists them all."):
                    pass
                return
            await _show_claim(console.job_kinds.get(EVALUATE), visitor, found)


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


async def _show_claim(kind: ConsoleKind | None, visitor: Visitor, found: ClaimRow) -> None:
    claim, newest = found.claim, found.newest
    refusal = KEEPS_NONE if kind is None else kind.refusal
    with heading(f"{claim.id} {claim.system}"):
        Badge(found.verdict)
        if kind is not None and not refusal:
            again = button("Measure again" if newest else "Measure", "again", "main")
            again.mark("measure").on_click(lambda: measure(kind))
    with ui.element("div").classes("stack"):
        notice = Notice()
        if refusal:
            ui.label(f"It cannot be measured from here. {refusal}").classes("dim")
        await _show_measurements(kind, visitor)
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

    async def measure(kind: ConsoleKind) -> None:
        notice.clear()
        try:
            request = {"claims": [claim.id]}
            job_id = await asyncio.to_thread(kind.create, request, visitor.owner)
        except AnabranchError as error:
            notice.wrong(error)
        else:
            ui.navigate.to(f"/jobs/{kind.name}/{job_id}")


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


class Measurements:
    """The visitor's measurements that wait or run, as links to their jobs."""

    def __init__(self, kind: ConsoleKind, owner: str | None, rows: Sequence[JobRow]) -> None:
        with ui.element("div").classes("stack") as self._box:
            with ui.element("h2"):
                ui.label("Being measured")
            self._list = JobList([], root_path(), "")
        self.show(rows)
        until_left(kind.watch_rows(owner, self.show))

    def show(self, rows: Sequence[JobRow]) -> None:
        """Bring it up to date."""
        unfinished = [row for row in rows if row.state not in FINISHED]
        self._box.set_visibility(bool(unfinished))
        self._list.show(unfinished)


async def _show_measurements(kind: ConsoleKind | None, visitor: Visitor) -> None:
    if kind is not None:
        Measurements(kind, visitor.owner, await asyncio.to_thread(kind.rows, visitor.owner))
