"""``anabranch adapters``: which parameter-efficient methods there are, and how they compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.output import bytes_text, count_text, errors, out, print_json, progress
from anabranch.models.packaged import DEFAULT

app = typer.Typer(help="Parameter-efficient methods: list, show, compare.", no_args_is_help=True)

Adapter = Annotated[str, typer.Argument(help="A folder in PEFT's format, or a published name.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """List the methods by their place in the taxonomy."""
    from anabranch.adapters import catalogue
    from anabranch.adapters.catalogue import LEAVES

    entries = sorted(
        catalogue().values(), key=lambda info: (LEAVES.index((info.family, info.leaf)), info.name)
    )
    if json:
        print_json([facts(info) for info in entries])
        return
    line = "  {:<24}{:<11}{:<8}{:<12}{}".format
    out.print(line("method", "source", "merges", "engine", "summary"), style="dim")
    kind = ("", "")
    for info in entries:
        if kind != (info.family, info.leaf):
            kind = (info.family, info.leaf)
            out.print(", ".join(kind), style="bold")
        merges = "yes" if info.mergeable else "no"
        out.print(line(info.name, info.source, merges, info.engine, info.summary))


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A method, as in `anabranch adapters list`.")],
    model: Annotated[str, typer.Option(help="The base to count weights on.")] = DEFAULT,
    json: Json = False,
) -> None:
    """Show a method: its options with their defaults, and how many weights it trains."""
    from anabranch import models
    from anabranch.adapters import AdapterError, method, trainable_parameters

    info = method(name)
    with progress() as report:
        base = models.load(model, dtype="float32", device="cpu", progress=report)
        report("counting", None)
        trained: int | None = None
        obstacle = ""
        try:
            trained = trainable_parameters(name, base.network)
        except AdapterError as error:
            obstacle = str(error)
    total = sum(parameter.numel() for parameter in base.network.parameters())
    if json:
        counts = {"base": base.name, "base_parameters": total, "trainable": trained}
        print_json({**facts(info), "counts": counts, "obstacle": obstacle})
        return
    out.print(f"{info.name}: {info.summary}", style="bold")
    for label, text in (
        ("kind", f"{info.family}, {info.leaf}"),
        ("paper", info.paper),
        ("source", info.source),
        (
            "merges",
            ("yes" if info.mergeable else "no") + (f"; {info.merge_note}" * bool(info.merge_note)),
        ),
        ("engine", info.engine),
        ("rows", "may name different adapters" if info.mixed_batch else "all use the active ones"),
        ("needs", ", ".join(info.inputs)),
    ):
        if text:
            out.print(f"  {label:<8} {text}")
    if trained is None:
        out.print(f"  {'trains':<8} not on {base.name} with these defaults: {obstacle}")
    else:
        share = f"{trained / total:.3%}"
        out.print(
            f"  {'trains':<8} {trained:,} of {count_text(total)} weights of {base.name}, {share}"
        )
    table = Table("option", "default", "meaning", box=None, pad_edge=False)
    for option, default in info.options().items():
        table.add_row(option, str(plain(default)), info.help(option))
    out.print(table)


@app.command("compare")
def compare(
    methods: Annotated[str, typer.Option(help="Names with commas between, or `all`.")] = "lora",
    budget: Annotated[str, typer.Option(help="Weights to train: 5000, 16k, 1M.")] = "16k",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each run.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    pretraining: Annotated[int, typer.Option(min=1, help="Steps that the base was trained.")] = 400,
    full: Annotated[bool, typer.Option(help="Train all weights, too, as the reference.")] = True,
    json: Json = False,
) -> None:
    """Train methods on equal terms and compare them.

    The base is a tiny Llama that is pretrained on one synthetic language and adapted to another;
    forgetting is what the first one loses.
    """
    from anabranch import adapters
    from anabranch.evaluation import adapter_comparison as comparison
    from anabranch.evaluation.languages import adaptation_problem

    names = methods.split(",")
    if methods == "all":
        names = [name for name, info in adapters.catalogue().items() if not info.inputs]
    for name in names:
        adapters.method(name)
    wanted = parse_count(budget)
    with progress() as report:
        report("pretraining the base", None)
        base, problem = adaptation_problem(pretraining=pretraining, steps=steps, progress=report)
        result = comparison.compare(
            [comparison.FULL, *names] if full else names,
            base,
            problem,
            wanted,
            range(seeds),
            report,
        )
    if json:
        print_json(result.to_dict())
        return
    table = Table(
        *("method", "seed", "trained", "stored", "peak memory", "ms/step", "tok/s", "merged tok/s"),
        *("NLL", "gap closed", "forgetting"),
        box=None,
        pad_edge=False,
    )
    for row in result.rows:
        merged = row.merged_tokens_per_second
        table.add_row(
            row.method,
            str(row.seed),
            f"{row.trainable:,}",
            bytes_text(row.saved_bytes),
            bytes_text(row.peak_bytes),
            f"{row.step_seconds * 1e3:.1f}",
            f"{row.tokens_per_second or 0:.0f}",
            "" if merged is None else f"{merged:.0f}",
            f"{row.nll:.3f}",
            "" if row.gap_closed is None else f"{row.gap_closed:.0%}",
            f"{row.forgetting:+.3f}",
        )
    out.print(table)
    for name, reason in result.refused.items():
        errors.print(f"{name}: {reason}")


@app.command("merge")
def merge(
    base: Annotated[str, typer.Argument(help="The model that the adapter belongs to.")],
    adapter: Adapter,
    name: Annotated[str, typer.Argument(help="What the new model is called.")],
    json: Json = False,
) -> None:
    """Put an adapter into a copy of its base, which ``anabranch up --model NAME`` serves."""
    from anabranch.training.deploy import find_adapter
    from anabranch.training.merging import merge_into_base

    with progress() as report:
        folder = merge_into_base(base, find_adapter(adapter), name, report)
    if json:
        print_json({"name": name, "path": str(folder)})
    else:
        out.print(f"{name} is in {folder}; serve it with: anabranch up --model {name}")


@app.command("download")
def download(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(),
) -> None:
    """Write an adapter's files to a ZIP archive, which PEFT loads once it is unpacked."""
    from anabranch.downloads import Download
    from anabranch.training.deploy import find_adapter

    found = Download.of(find_adapter(adapter))
    out.print(f"{found.save(output)}  {bytes_text(found.size)}  sha256 {found.sha256}")


def parse_count(text: str) -> int:
    """``16k`` -> 16000; a usage error for what is no number."""
    scale = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    try:
        count = round(float(text if scale == 1 else text[:-1]) * scale)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is no number of weights; write 5000, 16k or 1M"
        ) from None
    if count < 1:
        raise typer.BadParameter(f"{text!r} is less than one weight")
    return count


def facts(info: Any) -> dict[str, Any]:
    """A method's entry as plain values."""
    return {
        "name": info.name,
        "summary": info.summary,
        "family": info.family,
        "leaf": info.leaf,
        "source": info.source,
        "paper": info.paper,
        "mergeable": info.mergeable,
        "merge_note": info.merge_note,
        "multi_adapter": info.multi_adapter,
        "mixed_batch": info.mixed_batch,
        "engine": info.engine,
        "inputs": list(info.inputs),
        "options": {option: plain(value) for option, value in info.options().items()},
    }


def plain(value: Any) -> Any:
    """A default as JSON can hold it."""
    if isinstance(value, str | int | float | bool | None):
        return getattr(value, "value", value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set):
        return [plain(item) for item in value]
    return str(value)
