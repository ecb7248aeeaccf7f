"""``anabranch federation compare``: a job together, alone, pooled, untrained and personal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from anabranch.cli.output import bytes_text, errors, out, print_json, progress

if TYPE_CHECKING:
    from anabranch.federated.compare import Mode, ModeResult

INTERRUPTED = 130
MOST_ROWS = 60
COLUMNS = {"loss": "loss", "loss/own": "own", "loss/seen": "seen", "loss/unseen": "unseen"}


def compare(
    file: Annotated[Path, typer.Argument(help="A job file, see docs/federation.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/<job>-modes.")
    ] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option("--mode", metavar="NAME", help="Only this one; repeat. Default: all five."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Run a job in five modes: federated, each client alone, on pooled data, untrained, personal.

    Killed or interrupted, the same command goes on with what is missing.
    """
    from anabranch.federated.job import load_job

    job = load_job(file, overrides or ())
    folder = output or Path("runs") / f"{job.federate}-modes"
    with progress() as report:
        report("importing torch", None)
        from anabranch.federated.compare import MODES
        from anabranch.federated.comparing import compare_job

        try:
            found = compare_job(job, folder, report, cast("list[Mode]", modes) or MODES)
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json({mode: asdict(result) for mode, result in found.items()})
        return
    out.print(table(found))
    if any(result.clients for result in found.values()):
        out.print()
        out.print(by_client(found))


def table(found: Mapping[Mode, ModeResult]) -> Table:
    """A column for each mode and a row for each loss and task.

    Where each client has its own model it is the mean, and worst and best below it; of a task, what
    guessing gets and the standard error.
    """
    made = Table("held out", *found, box=None, pad_edge=False)
    for name in _present(result.figures for result in found.values()):
        cells = [
            _cell(result, name, spread=mode in ("local", "personal"))
            for mode, result in found.items()
        ]
        made.add_row(_heading(name, found.values()), *cells)
    for title, cells in (
        ("bytes", [bytes_text(r.bytes) if r.bytes else "" for r in found.values()]),
        ("virtual time", [f"{r.seconds:.1f} s" if r.seconds else "" for r in found.values()]),
        ("trained", [f"{r.trained:,}" if r.trained else "" for r in found.values()]),
    ):
        made.add_row(title, *cells)
    return made


def by_client(found: Mapping[Mode, ModeResult]) -> Table:
    """A row for each client and mode: figures of its model, or of everyone's on its own rows."""
    everyone = [figures for result in found.values() for figures in result.clients.values()]
    names = _present(everyone)
    rows = [
        (client, mode, figures)
        for mode, result in found.items()
        for client, figures in result.clients.items()
    ]
    made = Table("client", "mode", *map(_title, names), box=None, pad_edge=False)
    for client, mode, figures in sorted(rows, key=lambda row: row[0])[:MOST_ROWS]:
        made.add_row(client, mode, *(_value(name, figures.get(name)) for name in names))
    if len(rows) > MOST_ROWS:
        made.add_row(f"and {len(rows) - MOST_ROWS} more rows; --json has all")
    return made


def _present(all_figures: Iterable[Mapping[str, float]]) -> list[str]:
    """Losses first, then the tasks; figures below a task's are for ``--json``."""
    there = {name: None for figures in all_figures for name in figures}
    tasks = [name for name in there if name.startswith("task/") and name.count("/") == 1]
    return [name for name in COLUMNS if name in there] + tasks


def _title(name: str) -> str:
    return COLUMNS.get(name) or name.removeprefix("task/")


def _heading(name: str, results: Iterable[ModeResult]) -> str:
    """With what guessing gets, so that a score near it is seen to be."""
    chances = [r.figures[f"{name}/chance"] for r in results if r.figures.get(f"{name}/chance")]
    return _title(name) + (f"\n  chance {100 * chances[0]:.0f} %" if chances else "")


def _cell(result: ModeResult, name: str, spread: bool) -> str:
    if name not in result.figures:
        return ""
    text = _value(name, result.figures[name])
    if spread and name in result.spread:
        low, high = (_value(name, value) for value in result.spread[name])
        return f"{text}\n{low} to {high}"
    error = result.figures.get(f"{name}/error")
    return text if error is None else f"{text}\n± {100 * error:.1f}"


def _value(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if name.startswith("task/") else f"{value:.4f}"
