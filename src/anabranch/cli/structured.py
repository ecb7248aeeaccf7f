"""``anabranch structured``: how well answers keep to schemas, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.output import out, print_json, progress
from anabranch.models.packaged import DEFAULT

app = typer.Typer(help="Constrained answers: coverage, cost, quality.", no_args_is_help=True)

Backends = Annotated[
    list[str] | None, typer.Option("--backend", help="May be repeated. Default: all installed.")
]
Datasets = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="May be repeated. Default: all below ANABRANCH_DATA."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Schemas drawn from each data set.")]
Seed = Annotated[int, typer.Option(min=0)]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("masks")
def masks(
    backend: Backends = None,
    dataset: Datasets = None,
    limit: Limit = None,
    by: Annotated[str, typer.Option(help="Rows: backend, dataset or category.")] = "dataset",
    timeout: Annotated[float, typer.Option(help="Seconds to compile one schema.")] = 40.0,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    json: Json = False,
) -> None:
    """Run MaskBench: which schemas each back-end honours, how exactly, and how fast.

    No model is needed. The exit status is 1 if an accepted schema let an invalid answer through.
    """
    from anabranch.evaluation.structured_output import load, maskbench
    from anabranch.evaluation.structured_output.report import COLUMNS, cells

    if by not in ("backend", "dataset", "category"):
        raise typer.BadParameter("must be backend, dataset or category", param_hint="--by")
    cases = load(dataset, limit, seed)
    with progress() as report:
        found = maskbench(
            cases, backend or installed(), timeout=timeout, seed=seed, progress=report
        )
    if output is not None:
        output.write_text(found.markdown(by), encoding="utf-8")
    if json:
        print_json(found.to_dict())
    else:
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for summary in found.summaries(by):
            table.add_row(*cells(summary))
        out.print(table)
        for name in backend or installed():
            reasons = found.refused_keywords(name).most_common(8)
            out.print(f"{name} refuses: " + ", ".join(f"{why} {n}" for why, n in reasons))
        for result in found.failures("under-constrained"):
            out.print(f"{result.backend} {result.name}: {result.reason}")
    raise typer.Exit(0 if all(summary.sound for summary in found.summaries()) else 1)


@app.command("coverage")
def coverage(
    model: Annotated[str, typer.Option()] = DEFAULT,
    backend: Annotated[str, typer.Option(help="auto, llguidance or xgrammar.")] = "auto",
    dataset: Datasets = None,
    limit: Limit = 40,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    concurrency: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Have a model answer every schema greedily, with and without its constraint."""
    from dataclasses import asdict

    from anabranch.evaluation.structured_output import coverage as measure
    from anabranch.evaluation.structured_output import load, summarise

    cases = load(dataset, limit, seed)
    rows: dict[str, Any] = {}
    with progress() as report:
        generator = generator_of(model, backend, concurrency, report)
        for constrained in (True, False):
            name = backend if constrained else "no constraint"
            report(f"{name}: {len(cases)} answers", None)
            rows[name] = summarise(measure(cases, generator, constrained, max_tokens))
    if json:
        print_json(
            {
                name: asdict(row) | {"empirical": row.empirical, "compliance": row.compliance}
                for name, row in rows.items()
            }
        )
        return
    columns = (
        "",
        "schemas",
        "declared",
        "ended",
        "valid",
        "compliance",
        "first token ms",
        "ms/token",
    )
    table = Table(*columns, box=None, pad_edge=False)
    for name, row in rows.items():
        table.add_row(
            name,
            str(row.schemas),
            str(row.declared),
            str(row.finished),
            str(row.valid),
            f"{row.compliance:.1%}",
            f"{row.first_token_seconds * 1e3:.0f}",
            f"{row.seconds_per_token * 1e3:.1f}",
        )
    out.print(table)


@app.command("quality")
def quality(
    model: Annotated[str, typer.Option()] = DEFAULT,
    backend: Annotated[str, typer.Option(help="auto, llguidance or xgrammar.")] = "auto",
    task: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    questions: Annotated[int, typer.Option(min=1)] = 20,
    concurrency: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 8,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare exact answers with and without a constraint."""
    from dataclasses import asdict

    from anabranch.evaluation.structured_output import TASKS
    from anabranch.evaluation.structured_output import quality as measure

    with progress() as report:
        generator = generator_of(model, backend, concurrency, report)
        results = []
        for name in task or ("last-letter", "shuffled-objects"):
            report(name, None)
            results.append(measure(name, questions, generator, seed))
    if json:
        print_json([asdict(result) for result in results])
        return
    table = Table("task", "questions", "constrained", "free", "free, readable", box=None)
    for result in results:
        counts = (result.questions, result.constrained, result.free, result.free_readable)
        table.add_row(result.task, *map(str, counts))
    out.print(table)
    out.print(f"tasks: {', '.join(TASKS)}", style="dim")


def generator_of(model: str, backend: str, concurrency: int, report: Any) -> Any:
    """The engine on a loaded model."""
    from anabranch import models
    from anabranch.evaluation.structured_output.generation import EngineGenerator

    report("loading the model", None)
    loaded = models.load(model, dtype="float32", device="cpu", progress=report)
    return EngineGenerator(loaded, backend, concurrency)


def installed() -> list[str]:
    """Back-ends whose library is there."""
    from importlib.util import find_spec

    from anabranch import registry

    return [name for name in registry.available("constraints") if find_spec(name) is not None]
