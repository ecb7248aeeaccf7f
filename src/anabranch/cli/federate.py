"""``anabranch federate``: run a federation by a job file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from anabranch.cli.output import bytes_text, errors, out, print_json, progress
from anabranch.errors import MissingExtra

if TYPE_CHECKING:
    from anabranch.federated.coordinator import Coordinator
    from anabranch.federated.running import Outcome

INTERRUPTED = 130
MOST_ROWS = 20

Publish = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Serve every version at once on this anabranch up."),
]


def federate(
    file: Annotated[Path, typer.Argument(help="A job file, see docs/federation.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/<name of the job>.")
    ] = None,
    publish: Publish = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="simulation, processes or flower of this machine, or ray."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Let clients on this machine learn together by a job: data, split, method, schedule, codecs.

    Killed or interrupted, the same command goes on where it was.
    """
    from anabranch.federated.job import load_job

    chosen = [] if runtime is None else [f"runtime={runtime}"]
    job = load_job(file, [*with_publish(overrides, publish), *chosen])
    folder = output or Path("runs") / job.federate
    with showing() as (report, observe):
        report("importing torch", None)
        from anabranch.federated.running import federate as run

        try:
            outcome = run(job, folder, report, observe)
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
    draw(outcome)
    if json:
        print_json(as_json(outcome))
    else:
        show(outcome)


def with_publish(overrides: list[str] | None, url: str | None) -> list[str]:
    """Overrides of a job, with the key that the option is short for."""
    return [*(overrides or ()), *([] if url is None else [f"publish.url={url}"])]


@contextmanager
def showing() -> Iterator[tuple[Any, Any]]:
    """``(progress, observe)``: a live table of the clients on a terminal, else lines."""
    with progress() as report:
        if not errors.is_terminal:
            yield report, None
            return
        live: Live | None = None

        def observe(coordinator: Coordinator) -> None:
            nonlocal live
            if live is None:
                live = Live(console=errors, transient=True, auto_refresh=False)
                live.start()
            live.update(clients(coordinator), refresh=True)

        def quiet(message: str, fraction: float | None) -> None:
            if live is None:
                report(message, fraction)

        try:
            yield quiet, observe
        finally:
            if live is not None:
                live.stop()


def clients(coordinator: Coordinator) -> Table:
    """Who is there, what they sent, and what is under way."""
    state = coordinator.state
    traffic = state.ledger.by("client", "direction")
    title = (
        f"version {state.version}, {state.now:.1f} s, {bytes_text(state.ledger.total().bytes)}, "
        f"{len(state.incidents)} incidents"
    )
    table = Table("client", "examples", "replies", "up", "down", "at work", title=title, box=None)
    names = sorted(state.members)
    for name in names[:MOST_ROWS]:
        up, down = (traffic.get((name, direction)) for direction in ("up", "down"))
        table.add_row(
            name,
            str(state.members[name]),
            str(up.messages if up else 0),
            bytes_text(up.bytes if up else 0),
            bytes_text(down.bytes if down else 0),
            "yes" if coordinator.busy(name) else "",
        )
    if len(names) > MOST_ROWS:
        table.add_row(f"and {len(names) - MOST_ROWS} more")
    return table


def draw(outcome: Outcome) -> None:
    """``loss.svg``: training and validation loss over the time of the run; needs matplotlib.

    ``timeline.svg`` if the schedule keeps a timeline.
    """
    from anabranch.evaluation.plotting import Plot, svg
    from anabranch.federated.timeline_plot import timeline_svg
    from anabranch.files import write_text

    history = outcome.result.history
    timed = len({row["seconds"] for row in history}) > 1
    series = {
        name: [
            (row["seconds"] if timed else index + 1, row[key])
            for index, row in enumerate(history)
            if key in row
        ]
        for name, key in (("clients", "loss"), ("validation", "valid/loss"))
    }
    series = {name: points for name, points in series.items() if points}
    axis = f"{outcome.result.clock} seconds" if timed else "version"
    timeline = outcome.result.timeline
    try:
        if series:
            picture = svg(Plot("Loss", axis, "loss", series), ink="#333333")
            write_text(outcome.folder / "loss.svg", picture)
        if timeline is not None and timeline.bars:
            picture = timeline_svg(timeline, outcome.result.clock)
            write_text(outcome.folder / "timeline.svg", picture)
    except MissingExtra as error:
        errors.print(f"no pictures: {error}", style="yellow")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """What programs want to know of a finished federation."""
    result = outcome.result
    return {
        "versions": result.version,
        "metrics": dict(result.metrics),
        "clock": result.clock,
        "seconds": result.seconds,
        "bytes": result.ledger.total().bytes,
        "incidents": len(result.incidents),
        "evaluations": dict(outcome.evaluations),
        "output": str(outcome.folder),
        "saved": str(outcome.saved),
    }


def evaluations(found: Mapping[str, Any]) -> Table:
    """Figures of the model before and after, and its losses on what each client holds out."""
    table = Table("evaluated", "before", "after", box=None, pad_edge=False)
    before, after = found["before"], found["after"]
    for name, value in after["figures"].items():
        table.add_row(name.removeprefix("task/"), f"{before['figures'][name]:.4f}", f"{value:.4f}")
    clients = list(after["clients"].items())
    for client, figures in clients[:MOST_ROWS]:
        for name, value in figures.items():
            table.add_row(
                f"{name}, {client}", f"{before['clients'][client][name]:.4f}", f"{value:.4f}"
            )
    if len(clients) > MOST_ROWS:
        table.add_row(f"and {len(clients) - MOST_ROWS} more clients; report.json has all")
    return table


def show(outcome: Outcome) -> None:
    """First and last figures, bytes, time, incidents, and where everything is."""
    result = outcome.result
    table = Table("figure", "first version", "last version", box=None, pad_edge=False)
    for name, value in result.metrics.items():
        if name != "seconds":
            first = result.history[0].get(name)
            table.add_row(name, "" if first is None else f"{first:.4f}", f"{value:.4f}")
    out.print(table)
    if outcome.evaluations:
        out.print(evaluations(outcome.evaluations))
    up, down = (result.ledger.total(direction=direction) for direction in ("up", "down"))
    out.print(
        f"{result.version} versions in {result.seconds:.1f} {result.clock} seconds; "
        f"{bytes_text(up.bytes)} up, {bytes_text(down.bytes)} down"
    )
    if result.timeline is not None:
        timeline = result.timeline
        out.print(
            f"{len(timeline.bars)} tasks in {len(timeline.groups)} groups, "
            f"{timeline.count('late')} late, {timeline.count('failed')} failed; see anabranch "
            f"federation timeline {outcome.folder}"
        )
    for incident in result.incidents:
        out.print(
            f"{incident.what} ({incident.client or 'coordinator'}, {incident.count}x): "
            f"{incident.message}",
            style="yellow",
        )
    out.print(f"finished; see {outcome.folder}, result in {outcome.saved}", style="green")
