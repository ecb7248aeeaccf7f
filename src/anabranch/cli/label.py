"""``anabranch label``: models propose labels, people reject wrong ones, a small model learns."""

from __future__ import annotations

import json as json_module
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch.cli.output import errors, out, print_json, progress
from anabranch.models.packaged import DEFAULT

if TYPE_CHECKING:
    from anabranch.training.annotation import Asker, Review, ReviewQueue
    from anabranch.training.tasks.classification import ClassificationTask

app = typer.Typer(help="Label texts: models propose, people reject.", no_args_is_help=True)

Queue = Annotated[Path, typer.Argument(help="The queue file.")]
Table = Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet with a column of texts.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
TextColumn = Annotated[str, typer.Option("--text", help="The column of texts.")]
IdColumn = Annotated[str, typer.Option("--id", help="The column of ids, if there is one.")]
Context = Annotated[int, typer.Option(min=16, help="Tokens of prompt and answer.")]


@app.command()
def propose(
    table: Table,
    queue: Annotated[Path, typer.Option("--queue", "-q", help="The queue file to make.")],
    labels: Annotated[str, typer.Option(help="Labels with commas between them.")],
    coder: Annotated[list[str], typer.Option(help="Who will review; give it several times.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Who proposes; give it several times.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Has {text}; each model is asked with each.")
    ] = None,
    kind: Annotated[str, typer.Option(help="single, multi or valued.")] = "single",
    coders_per_row: Annotated[int, typer.Option(min=1)] = 1,
    overlap: Annotated[float, typer.Option(help="Share of rows for one coder more.")] = 0.1,
    template: Annotated[str, typer.Option(help="chat, alpaca, raw or a .jinja file.")] = "chat",
    text: TextColumn = "text",
    id_column: IdColumn = "id",
    context: Context = 1024,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Let models label a table and make a queue for people to review."""
    from anabranch.errors import ConfigurationError
    from anabranch.training.annotation import (
        Crowd,
        Labeller,
        ModelLabeller,
        ReviewQueue,
        read_documents,
    )
    from anabranch.training.tasks.classification import ClassificationTask

    if queue.exists():
        raise ConfigurationError(f"{queue} exists; review it, or choose another name")
    options: dict[str, Any] = {"labels": [x.strip() for x in labels.split(",")], "kind": kind}
    asked: list[dict[str, Any]] = [{"prompt": one} for one in prompt or ()] or [{}]
    tasks = [ClassificationTask(**options, **one) for one in asked]
    documents = read_documents(table, text, id_column)
    with progress() as report:
        members: list[Labeller] = []
        for name in model or [DEFAULT]:
            loaded = _load(name, report)
            for number, task in enumerate(tasks, 1):
                asker = _asker(loaded, task, template, context)
                who = f"{name} prompt {number}" if len(tasks) > 1 else name
                members.append(ModelLabeller(who, asker, task))
        crowd = Crowd(members)
        proposals = crowd.propose(documents, report)
    single = kind == "single"
    with ReviewQueue.create(
        queue, documents, proposals, coder, single, coders_per_row, overlap, seed, options
    ) as made:
        for member, count in crowd.unread.items():
            if count:
                errors.print(f"{member}: {count} of {len(documents)} answers could not be read")
        if nothing := made.unproposed():
            errors.print(f"{len(nothing)} rows have no proposal and will not be shown")
        for one in made.coders:
            out.print(f"{one}: {made.remaining(one)} rows; anabranch label review {queue} -c {one}")


@app.command()
def review(
    queue: Queue,
    coder: Annotated[str, typer.Option("--coder", "-c", help="Who you are.")],
) -> None:
    """Judge proposed labels: Enter for right, x for wrong, u to undo, q to stop.

    Every verdict is kept at once; the same command goes on.
    """
    from anabranch.training.annotation import ReviewQueue

    with ReviewQueue.open(queue) as reviews:
        while shown := reviews.next(coder):
            _show(shown, reviews.remaining(coder))
            if not _judge(reviews, coder, shown):
                return
        out.print("everything is judged")


@app.command()
def export(
    queue: Queue,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL to write.")],
    json: Json = False,
) -> None:
    """Write the labelled rows, and say how far the coders agree."""
    from anabranch.training.annotation import ReviewQueue, agreement
    from anabranch.training.annotation.export import labelled_rows

    with ReviewQueue.open(queue) as reviews:
        task = _task(reviews)
        found = labelled_rows(reviews, task.kind, task.labels)
        agreed = agreement(reviews.export())
    _write_rows(output, found.rows)
    figures = {
        "rows": len(found.rows),
        "waiting": len(found.waiting),
        "unlabelled": len(found.unlabelled),
        "tied": found.tied,
        "judged_by_several": agreed.shared,
        "observed_agreement": agreed.observed,
        "fleiss_kappa": agreed.fleiss,
        "cohen_kappa": {" and ".join(pair): k for pair, k in agreed.cohen.items()},
        "prevalence_adjusted": dict(agreed.prevalence_adjusted),
    }
    if json:
        # Agreement without shared rows is NaN, which JSON does not have.
        print_json({k: None if v != v else v for k, v in figures.items()})
        return
    for name, value in figures.items():
        out.print(f"{name.replace('_', ' ')}: {value}")


@app.command()
def train(
    queue: Queue,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.lr=1e-4.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe to start from.")] = "text_classification",
    json: Json = False,
) -> None:
    """Fine-tune a model on the reviewed rows, by a recipe."""
    from anabranch.cli.finetune import finetune
    from anabranch.errors import AnabranchError
    from anabranch.training.annotation import ReviewQueue
    from anabranch.training.annotation.export import labelled_rows

    with ReviewQueue.open(queue) as reviews:
        task = _task(reviews)
        options = reviews.task
        found = labelled_rows(reviews, task.kind, task.labels)
    if not found.rows:
        raise AnabranchError(
            f"{queue} has no labelled row yet ({len(found.waiting)} are waiting for review)"
        )
    rows = output.with_name(output.name + ".rows.jsonl")
    _write_rows(rows, found.rows)
    errors.print(f"{len(found.rows)} labelled rows in {rows}, {len(found.waiting)} still waiting")
    target = "label" if task.kind == "single" else "labels"
    data = {
        "name": "reviewed",
        "source": "jsonl",
        "path": str(rows.absolute()),
        "task": {"name": "classification", **options},
        "split": {"train": 0.9, "test": 0.1} | ({"stratify": target} if target == "label" else {}),
    }
    own = [f"recipe={output.name}", f"data={json_module.dumps([data])}"]
    finetune(recipe, [*own, *(overrides or [])], output, dry_run=False, force=False, json=json)


@app.command()
def apply(
    queue: Queue,
    table: Table,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL to write, or go on with.")],
    adapter: Annotated[Path | None, typer.Option(help="The adapter folder of a run.")] = None,
    model: Annotated[str, typer.Option(help="The base model.")] = DEFAULT,
    template: Annotated[str, typer.Option(help="That of the recipe.")] = "raw",
    text: TextColumn = "text",
    id_column: IdColumn = "id",
    context: Context = 1024,
    audit: Annotated[float, typer.Option(min=0, max=1, help="Share of rows to check.")] = 0.01,
    json: Json = False,
) -> None:
    """Label a corpus with a trained model; the task is that of the queue.

    A sample for people to check is written beside the output; label shares far from the reviewed
    ones (stability index above 0.2) are reported.
    """
    from anabranch.training.annotation import ReviewQueue, read_documents
    from anabranch.training.annotation.apply import apply as label_all
    from anabranch.training.annotation.apply import stability_index
    from anabranch.training.annotation.export import labelled_rows

    with ReviewQueue.open(queue) as reviews:
        task = _task(reviews)
        known = labelled_rows(reviews, task.kind, task.labels).rows
    documents = read_documents(table, text, id_column)
    with progress() as report:
        loaded = _load(model, report)
        asker = _asker(loaded, task, template, context, adapter)
        done = label_all(asker, task, documents, output, audit, progress=report)
    chosen = set(done.audit)
    sample = output.with_name(output.name + ".audit.jsonl")
    _write_rows(sample, [{"id": d.id, "text": d.text} for d in documents if d.id in chosen])
    before: Counter[str] = Counter()
    for row in known:
        before.update(row["labels"] if "labels" in row else [row["label"]])
    shift = stability_index(before, done.labels)
    figures = {
        "rows": done.rows,
        "labels": dict(done.labels),
        "unread": done.unread,
        "cut": len(done.cut),
        "stability_index": round(shift, 4),
        "audit_sample": str(sample),
    }
    if json:
        print_json(figures)
        return
    for name, value in figures.items():
        out.print(f"{name.replace('_', ' ')}: {value}")
    if known and shift > 0.2:
        errors.print("labels are distributed unlike the reviewed ones; check the audit sample")


def _show(shown: Review, remaining: int) -> None:
    out.print(f"\n{shown.text}\n", style="bold")
    value = f" = {shown.value}" if shown.value else ""
    out.print(f"  {shown.label}{value}", style="cyan", end="")
    out.print(f"   ({', '.join(shown.models)}; {remaining} rows left)", style="dim")


def _judge(reviews: ReviewQueue, coder: str, shown: Review) -> bool:
    """Ask until there is a verdict; False to stop."""
    while True:
        try:
            answer = input("right? [Enter, x, u, q] ").strip().lower()
        except EOFError:
            return False
        if answer in ("", "y"):
            reviews.accept(coder, shown)
        elif answer in ("x", "n"):
            reviews.reject(coder, shown)
        elif answer == "u":
            taken = reviews.undo(coder)
            out.print(f"took back {taken.label!r}" if taken else "nothing to take back")
        elif answer == "q":
            return False
        else:
            out.print("Enter: right; x: wrong; u: undo; q: stop")
            continue
        return True


def _task(reviews: ReviewQueue) -> ClassificationTask:
    from anabranch.training.errors import DataError
    from anabranch.training.tasks.classification import ClassificationTask

    if not reviews.task:
        raise DataError(f"{reviews.path} does not say what its labels are; propose made no task")
    return ClassificationTask(**reviews.task)


def _load(name: str, report: Any) -> Any:
    from anabranch import models

    return models.load(name, dtype="float32", progress=report)


def _asker(
    loaded: Any,
    task: ClassificationTask,
    template: str,
    context: int,
    adapter: Path | None = None,
) -> Asker:
    from anabranch import adapters
    from anabranch.training.annotation import Asker
    from anabranch.training.template import Template

    eos = loaded.generation.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    network = adapters.load(loaded.network, adapter) if adapter else loaded.network
    rendering = Template(template, loaded.tokenizer, ends)
    context = min(context, loaded.card.context_length)
    return Asker(network, loaded.tokenizer, rendering, task, context)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json_module.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)
