"""``anabranch models``: what is on this machine, and getting or dropping it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from anabranch import models
from anabranch.cli.output import bytes_text, count_text, out, print_json, progress
from anabranch.models.card import ModelCard

app = typer.Typer(help="Base models on this machine.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A name, a folder, a GGUF file or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """List the models that can be served without a download."""
    cards = models.available()
    if json:
        print_json([card.to_dict() for card in cards])
        return
    table = Table("name", "parameters", "context", "size", "licence", box=None, pad_edge=False)
    for card in cards:
        table.add_row(
            card.name,
            count_text(card.parameters),
            str(card.context_length),
            bytes_text(card.size_bytes),
            card.licence,
        )
    out.print(table)


@app.command()
def show(name: Name, json: Json = False) -> None:
    """Show a model's card: size, limits, licence and origin."""
    _show(models.card(name), json)


@app.command()
def pull(name: Name, json: Json = False) -> None:
    """Download a model, or convert it, so that it loads at once later."""
    with progress() as report:
        card = models.pull(name, progress=report)
    _show(card, json)


@app.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete what was downloaded or converted for a model."""
    if not yes:
        typer.confirm(f"Remove {name}?", abort=True, err=True)
    freed = models.remove(name)
    if json:
        print_json({"name": name, "freed_bytes": freed})
    else:
        out.print(f"removed {name}: {bytes_text(freed)} freed")


def _show(card: ModelCard, json: bool) -> None:
    if json:
        print_json(card.to_dict())
        return
    rows = card.to_dict()
    rows["parameters"] = f"{card.parameters:,}"
    rows["size"] = bytes_text(rows.pop("size_bytes"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in rows.items():
        table.add_row(key.replace("_", " "), str(value))
    out.print(table)
