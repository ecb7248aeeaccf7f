"""``anabranch federation search``: the best options of a job, by successive halving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from anabranch.cli.output import errors, out, print_json, progress

if TYPE_CHECKING:
    from anabranch.federated.search import Search

INTERRUPTED = 130


def search(
    file: Annotated[Path, typer.Argument(help="A job file, see docs/federation.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="Such as recipe.train.lr=1e-4,1e-3; repeat."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Of the best trial; default: the job's.")
    ] = None,
    factor: Annotated[int, typer.Option(min=2, help="One trial in so many goes on.")] = 3,
    least: Annotated[int, typer.Option(min=1, help="Rounds of the first rung, at least.")] = 1,
    trials: Annotated[
        int | None, typer.Option(min=1, help="So many combinations, drawn; default: all.")
    ] = None,
    metric: Annotated[str, typer.Option(help="A figure of a version; lower is better.")] = (
        "valid/loss"
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/<job>-search.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Try options of a job: all of them for a few rounds, the best for more.

    Killed or interrupted, the same command goes on with the trial that it was at.
    """
    from anabranch.federated.job import load_job

    given = [*(overrides or ()), *([] if rounds is None else [f"schedule.rounds={rounds}"])]
    folder = output or Path("runs") / f"{load_job(file, given).federate}-search"
    with progress() as report:
        report("importing torch", None)
        from anabranch.federated.search import search as run

        try:
            found = run(
                file,
                vary or (),
                folder,
                given,
                factor=factor,
                least=least,
                trials=trials,
                metric=metric,
                progress=report,
            )
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json(found.to_dict())
    else:
        show(found)


def show(found: Search) -> None:
    """A row for each trial, the furthest and best first, and where the best is."""
    keys = list(found.trials[0].values)
    rungs = [rung.rounds for rung in found.rungs]
    made = Table("trial", *keys, *(f"round {rounds}" for rounds in rungs), "", box=None)
    ranked = sorted(
        found.trials,
        key=lambda t: (
            bool(t.error),
            -max(t.scores, default=0),
            t.scores.get(max(t.scores, default=0), 0.0),
        ),
    )
    for trial in ranked:
        note = "best" if trial is found.best else trial.error[:60]
        scores = [f"{trial.scores[r]:.4f}" if r in trial.scores else "" for r in rungs]
        made.add_row(str(trial.number), *(str(trial.values[key]) for key in keys), *scores, note)
    out.print(made)
    whole = len(found.trials) * rungs[-1]
    out.print(f"{found.rounds} rounds in all; {whole} would run every trial to the end")
    if found.best is None:
        errors.print("all trials failed", style="red")
        raise typer.Exit(1)
    where = found.to_dict()["best"]["output"]
    out.print(f"best by {found.metric}: trial {found.best.number}; see {where}", style="green")
