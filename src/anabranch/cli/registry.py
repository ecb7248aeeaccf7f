"""``anabranch list``: what can be plugged in."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from anabranch import registry
from anabranch.cli.output import out, print_json

Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def list_(
    kind: Annotated[str | None, typer.Argument(help="Without it, the kinds.")] = None,
    json: Json = False,
) -> None:
    """List the plug-ins of a kind, the built-in recipes, or the kinds."""
    if kind == "adapters":  # most of them are PEFT's and no plug-ins of ours
        from anabranch.cli.adapters import list_ as list_adapters

        list_adapters(json)
        return
    if kind is None:
        rows = dict(registry.KINDS)
        title = "kind"
    elif kind == "recipes":
        from anabranch.training.recipe_file import built_in_recipes

        rows, title = built_in_recipes(), kind
    else:
        rows = {name: registry.summary(cls) for name, cls in registry.available(kind).items()}
        title = kind
    if json:
        print_json([{"name": name, "summary": text} for name, text in rows.items()])
        return
    table = Table(title, "summary" if kind else "base class", box=None, pad_edge=False)
    for name, text in rows.items():
        table.add_row(name, text)
    out.print(table)
