"""``anabranch federation timeline``: which clients worked together, when, and who was late."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from anabranch.cli.output import errors, out, print_json

if TYPE_CHECKING:
    from anabranch.federated.timeline import Bar, Group, Timeline

MOST_GROUPS = 30


def timeline(
    folder: Annotated[Path, typer.Argument(help="A federation's folder, such as runs/<job>.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it as an SVG picture.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: every task.")] = False,
) -> None:
    """Show the groups of a run, finished or not, whose schedule forms groups (fedcompass)."""
    from anabranch.federated.timeline_files import read_timeline

    found, clock = read_timeline(folder)
    if plot is not None:
        from anabranch.federated.timeline_plot import timeline_svg
        from anabranch.files import write_text

        write_text(plot, timeline_svg(found, clock))
        errors.print(f"drawn in {plot}")
    if json:
        print_json({"clock": clock, "tasks": found.to_list()})
        return
    groups = found.groups
    if len(groups) > MOST_GROUPS:
        out.print(f"the last {MOST_GROUPS} of {len(groups)} groups")
    out.print(table(groups[-MOST_GROUPS:]))
    out.print(summary(found))


def table(groups: list[Group]) -> Table:
    """A row for each group: its times, and every member's steps and how far from due it came."""
    made = Table("group", "began", "due", "closed", "clients: steps, arrival against due", box=None)
    for group in groups:
        made.add_row(
            group.name.removeprefix("group "),
            f"{group.began:.2f} s",
            f"{group.due:.2f} s",
            "open" if group.closed is None else f"{group.closed:.2f} s",
            "; ".join(_member(bar, group.due) for bar in group.bars),
        )
    return made


def summary(found: Timeline) -> str:
    """Counts in a sentence."""
    ways = [(found.count(how), how) for how in ("arrived", "late", "failed", "working")]
    return f"{len(found.bars)} tasks: " + ", ".join(f"{n} {how}" for n, how in ways if n)


def _member(bar: Bar, due: float) -> str:
    when = bar.how if bar.ended is None else f"{bar.ended - due:+.2f} s"
    ended = f", {bar.how}" if bar.how in ("late", "failed") else ""
    return f"{bar.client} {bar.steps} {when}{ended}"
