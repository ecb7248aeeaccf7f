"""The command line: one file a group of commands, nothing heavy imported before it is needed.

Belongs here: options, prompts and how results are shown. What the commands do lives elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from anabranch import __version__
from anabranch.cli import (
    adapters,
    bench,
    chat,
    claims,
    federate,
    federation,
    federation_compare,
    federation_plan,
    federation_search,
    federation_timeline,
    finetune,
    geometry,
    graph,
    jobs,
    label,
    models,
    registry,
    serve,
    structured,
    top,
)
from anabranch.cli.output import show_error
from anabranch.errors import AnabranchError

__all__ = ["app", "main"]


class Commands(TyperGroup):
    """Errors that a user can cause end the program with a message only, and their own status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; ``--debug`` lets the traceback through."""
        try:
            return super().invoke(ctx)
        except AnabranchError as error:
            if ctx.params.get("debug"):
                raise
            show_error(error)
            raise typer.Exit(error.exit_code) from error


app = typer.Typer(
    name="anabranch",
    cls=Commands,
    help="Adapt, federate, compress, serve and compose language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(serve.up)
app.command("chat")(chat.chat)
app.command("top")(top.top)
app.command("finetune")(finetune.finetune)
app.command("federate")(federate.federate)
federation.app.command("compare")(federation_compare.compare)
federation.app.command("search")(federation_search.search)
federation.app.command("plan")(federation_plan.plan)
federation.app.command("timeline")(federation_timeline.timeline)
app.add_typer(federation.app, name="federation")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.command("list")(registry.list_)
app.add_typer(adapters.app, name="adapters")
app.add_typer(label.app, name="label")
app.add_typer(graph.app, name="graph")
app.add_typer(geometry.app, name="geometry")
app.add_typer(claims.app, name="claims")
app.add_typer(bench.app, name="bench")
app.add_typer(structured.app, name="structured")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"anabranch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that come before a command."""


def main() -> None:
    """The program ``anabranch``."""
    app()
