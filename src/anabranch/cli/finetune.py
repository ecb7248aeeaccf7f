"""``anabranch finetune``: run a recipe."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from anabranch.cli.output import bytes_text, count_text, errors, out, print_json, progress

if TYPE_CHECKING:
    from anabranch.training.pipeline import Outcome, Pipeline
    from anabranch.training.preview import Preview

INTERRUPTED = 130
"""Exit status when a signal ended the run; the same command goes on."""


def finetune(
    file: Annotated[str, typer.Argument(help="A recipe file, or: anabranch list recipes.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.lr=1e-4.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/<name of the recipe>.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, counts and cost; train nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Set a run of another recipe in the folder aside.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Fine-tune a model by a recipe: data, training, evaluation, report, deployment.

    Ctrl-C or SIGTERM leaves a checkpoint; the same command goes on from it.
    """
    from anabranch.training.recipe_file import load_recipe

    recipe = load_recipe(file, overrides or ())
    if dry_run:
        with progress() as report:
            from anabranch.training.preview import preview

            found = preview(recipe, progress=report)
        if json:
            print_json(found.to_dict())
        else:
            show_preview(found)
        return
    with progress() as report:
        report("importing torch", None)
        from anabranch.training.pipeline import Pipeline

        pipeline = Pipeline(recipe, output, report)
        try:
            with stopping(pipeline):
                outcome = pipeline.run(force)
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on with the stage that was under way")
            raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json(
            {
                "status": outcome.status,
                "message": outcome.message,
                "output": str(outcome.folder),
                "published": str(outcome.published) if outcome.published else None,
                "figures": outcome.figures,
            }
        )
    else:
        show_outcome(outcome)
    if outcome.status != "finished":
        raise typer.Exit(INTERRUPTED if outcome.status == "interrupted" else 1)


@contextmanager
def stopping(pipeline: Pipeline) -> Iterator[None]:
    """Let Ctrl-C end training at the next step with a checkpoint; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        if not pipeline.stop():
            raise KeyboardInterrupt
        errors.print("stopping after this step, with a checkpoint; once more to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show_preview(found: Preview) -> None:
    """The resolved recipe, rows with what is trained on marked, counts and cost."""
    from anabranch.training.preview import marked
    from anabranch.training.recipe_file import dump_yaml

    out.print(dump_yaml(found.recipe))
    for number, row in enumerate(found.rows, 1):
        for spans in row:
            out.rule(f"row {number}: trained on {'in green' if out.is_terminal else 'in [[ ]]'}")
            if out.is_terminal:
                styles = {True: "green", False: "dim"}
                out.print(Text.assemble(*((s.text, styles[s.trained]) for s in spans)))
            else:
                out.print(marked(spans))
    out.rule("counts")
    for source in found.data.sources:
        removed = ", ".join(f"{count} {why}" for why, count in source.removed.items()) or "none"
        out.print(f"{source.name}: {source.read} rows read; left out: {removed}")
        if source.note:
            out.print(f"  {source.note}")
    items = ", ".join(f"{count} {name}" for name, count in found.items.items())
    minutes, seconds = divmod(round(found.train_seconds), 60)
    out.print(f"items: {items}; {found.tokens:,} training tokens, {found.targets:,} trained on")
    out.print(f"weights: {count_text(found.trainable)} of {count_text(found.parameters)} trained")
    out.print(
        f"cost: {found.steps} steps in about {minutes}:{seconds:02} (min:s) at "
        f"{found.tokens_per_second:,.0f} tokens/s, {bytes_text(found.peak_bytes)} of memory; "
        f"evaluation comes on top"
    )


def show_outcome(outcome: Outcome) -> None:
    """Base against tuned, and where everything is."""
    table = Table("evaluation", "figure", "base", "tuned", "difference", box=None, pad_edge=False)
    for evaluation, figures in outcome.figures.items():
        for name, figure in figures.items():
            difference = figure["difference"]
            interval = (
                f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
                if "low" in difference
                else ""
            )
            table.add_row(
                evaluation,
                name,
                f"{figure['base']['value']:.4f}",
                f"{figure['tuned']['value']:.4f}",
                f"{difference['value']:+.4f}{interval}",
            )
    if outcome.figures:
        out.print(table)
    style = {"finished": "green", "refused": "bold red", "interrupted": "yellow"}[outcome.status]
    out.print(outcome.message, style=style)
