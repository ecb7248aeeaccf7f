"""Federation: the runs in the folder of runs, as they are and as they went. Read-only."""

from __future__ import annotations

import asyncio

from nicegui import ui
from starlette.requests import Request

from anabranch.console.components.chart import Chart
from anabranch.console.components.frame import frame, heading
from anabranch.console.components.pieces import Badge, Bar, Notice, Tile, empty, row, table
from anabranch.console.console import Console
from anabranch.console.federations import FederationRun
from anabranch.console.pages.access import page, root_path
from anabranch.console.sessions import Visitor
from anabranch.console.text import ago_text, bytes_text, seconds_text
from anabranch.errors import AnabranchError

EXPLANATION = "Clients learn together and keep their data. What was measured is read from the runs."
MOST_CHARTS = 4


def register(console: Console) -> None:
    """``/federation`` and ``/federation/NAME``."""

    @page(console, "/federation")
    async def federation(request: Request, visitor: Visitor) -> None:
        runs = await asyncio.to_thread(console.federations.all)
        with frame(console, "federation", "Federation"):
            with heading("Federation", EXPLANATION):
                pass
            if not runs:
                folder = console.federations.folder.absolute()
                how = (
                    f"Start one with: anabranch federate job.yaml. They are looked for in {folder}."
                )
                empty("No federations yet", how)
            with ui.element("div").classes("stack"):
                for run in runs:
                    _item(run, root_path())

    @page(console, "/federation/{name}")
    async def one(request: Request, visitor: Visitor) -> None:
        with frame(console, "federation", "Federation"):
            try:
                name = request.path_params["name"]
                run = await asyncio.to_thread(console.federations.get, name)
            except AnabranchError as error:
                ui.context.client.status_code = 404
                with heading("Federation"):
                    pass
                empty("There is no such run", str(error))
                return
            _show(run)


def _item(run: FederationRun, root: str) -> None:
    with ui.element("a").classes("card job-item") as link:
        link._props["href"] = f"{root}/federation/{run.name}"
        with ui.element("div").classes("across"):
            ui.label(run.name).classes("job-title break")
            Badge(run.state)
            ui.element("div").classes("grow")
            ui.label(ago_text(run.changed)).classes("dim small")
        if run.wanted:
            Bar("Rounds", run.rounds / run.wanted)
        ui.label(_line(run)).classes("dim small number break")


def _line(run: FederationRun) -> str:
    if run.problem:
        return f"cannot be read: {run.problem}"
    parts = [run.strategy, f"{run.rounds} of {run.wanted} rounds", f"{len(run.clients)} clients"]
    parts.append(f"{bytes_text(run.up)} up, {bytes_text(run.down)} down")
    parts += [f"{name} {value:.4g}" for name, value in run.metrics.items()]
    return " · ".join(parts)


def _show(run: FederationRun) -> None:
    with heading(run.name):
        Badge(run.state)
    with ui.element("div").classes("stack"):
        if run.problem:
            Notice().wrong(f"The run cannot be read: {run.problem}")
            return
        with ui.element("div").classes("tiles"):
            Tile("rounds", f"{run.rounds} / {run.wanted}")
            Tile("clients", str(len(run.clients)))
            Tile("bytes up", bytes_text(run.up))
            Tile("bytes down", bytes_text(run.down))
            Tile(f"{run.clock} time", seconds_text(run.seconds))
            for name, value in list(run.metrics.items())[:MOST_CHARTS]:
                Tile(name, f"{value:.4g}")
        with ui.element("div").classes("grid2"):
            for name in list(run.metrics)[:MOST_CHARTS]:
                with ui.element("div").classes("card"):
                    Chart(name, run.curves([name]), x_label="round")
        _show_clients(run)
        _show_incidents(run)


def _show_clients(run: FederationRun) -> None:
    with ui.element("div").classes("card stack"):
        with ui.element("h2"):
            ui.label("Clients")
        numbers = ("", "right", "right", "right")
        with table(("client", "messages", "up", "down"), "Clients", right=3):
            for client in run.clients:
                up, down = bytes_text(client.up), bytes_text(client.down)
                row(client.name, f"{client.messages:,}", up, down, classes=numbers)


def _show_incidents(run: FederationRun) -> None:
    if not run.incidents:
        return
    with ui.element("div").classes("card stack"):
        with ui.element("h2"):
            ui.label("Incidents")
        with table(("what", "who", "times", "message"), "Incidents"):
            for incident in run.incidents:
                who = incident.get("client") or "coordinator"
                times, message = str(incident.get("count", 1)), incident.get("message", "")
                row(str(incident.get("what", "")), str(who), times, str(message))
