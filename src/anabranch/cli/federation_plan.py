"""``anabranch federation plan``: whose data will count how much, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from anabranch.cli.output import bytes_text, errors, out, print_json, progress

if TYPE_CHECKING:
    from anabranch.federated.plans import JobPlan, SchedulePlan

MOST_CLIENTS = 30


def plan(
    file: Annotated[Path, typer.Argument(help="A job file, see docs/federation.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Importance by speed, as an SVG picture.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what each schedule makes of a job's clients: arrivals, importance, seconds a version.

    Clients that are in more versions count for more, unless FedFix's weights make up for it.
    """
    from anabranch.federated.job import load_job

    job = load_job(file, overrides or ())
    with progress() as report:
        report("importing torch", None)
        from anabranch.federated.plans import plan_job

        found = plan_job(job, report)
    if plot is not None:
        draw(found, plot)
        errors.print(f"drawn in {plot}")
    if json:
        print_json(found.to_dict())
        return
    out.print(f"a task: {bytes_text(found.down)} down, {bytes_text(found.up)} up")
    out.print(overview(found))
    for schedule in found.schedules:
        out.print(table(found, schedule))


def overview(found: JobPlan) -> Table:
    """A row for each schedule, the job's own first and marked: seconds of a version, mean age of an
    update in versions, distance from the shares, and the largest weight that makes up for it."""
    made = Table("schedule", "version s", "age", "bias", "FedFix's heaviest", box=None)
    for each in found.schedules:
        made.add_row(
            _title(each),
            f"{each.seconds:.2f}",
            f"{each.equal.staleness:.2f}",
            f"{each.equal.bias:.3f}",
            f"{max(each.counting.weights.values()):.3f}",
        )
    return made


def table(found: JobPlan, schedule: SchedulePlan) -> Table:
    """A row for each client: its share of the data and seconds of a task, its updates in a version,
    and what it counts for, without and with FedFix's weights."""
    made = Table(
        "client",
        "share",
        "task s",
        "arrivals",
        "importance",
        "with FedFix",
        title=_title(schedule),
        box=None,
    )
    for client in found.clients[:MOST_CLIENTS]:
        name = client.client
        made.add_row(
            name,
            f"{client.share:.3f}",
            f"{client.seconds:.2f}",
            f"{schedule.equal.arrivals[name]:.3f}",
            f"{schedule.equal.importance[name]:.3f}",
            f"{schedule.counting.importance[name]:.3f}",
        )
    if len(found.clients) > MOST_CLIENTS:
        made.add_row(f"and {len(found.clients) - MOST_CLIENTS} more; see --json")
    return made


def draw(found: JobPlan, path: Path) -> None:
    """Importance over the seconds of a task: the share of data, and what each schedule makes of it
    without FedFix's weights. Raises :class:`MissingExtra` without matplotlib."""
    from anabranch.evaluation.plotting import Plot, svg
    from anabranch.files import write_text

    series = {"share of data": [(client.seconds, client.share) for client in found.clients]}
    for each in found.schedules:
        series[each.name] = [
            (client.seconds, each.equal.importance[client.client]) for client in found.clients
        ]
    series = {name: sorted(points) for name, points in series.items()}
    picture = Plot(
        "What each client counts for", "seconds of its task", "importance", series, x_scale="log"
    )
    write_text(path, svg(picture, ink="#333333"))


def _title(schedule: SchedulePlan) -> str:
    return schedule.name + (" (the job's own)" if schedule.own else "")
