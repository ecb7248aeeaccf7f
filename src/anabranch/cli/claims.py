"""``anabranch claims``: re-measure what the published systems promise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.output import errors, out, print_json, progress

app = typer.Typer(help="Re-measure what published systems promise.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("list")
def list_(json: Json = False) -> None:
    """List the claims."""
    from anabranch import registry

    claims = sorted(registry.available("claims").values(), key=lambda claim: claim.id)
    if json:
        fields = ("id", "name", "system", "paper", "baseline", "method", "threshold")
        print_json([{field: getattr(claim, field) for field in fields} for claim in claims])
        return
    table = Table("id", "name", "system", "holds if", box=None, pad_edge=False)
    for claim in claims:
        table.add_row(claim.id, claim.name, claim.system, claim.threshold)
    out.print(table)


@app.command("run")
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Ids (S46) or slugs.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run every claim.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="First of the seeds used.")] = 0,
    json: Json = False,
) -> None:
    """Run claims; the exit status is 0 only if all of them hold.

    Each takes at most three minutes on two cores. With --json, one object per claim and line.
    Results are kept in the cache folder; ``anabranch claims report`` shows them.
    """
    from anabranch import registry
    from anabranch.claims import find, run_claim
    from anabranch.claims.store import save

    if bool(names) == everything:
        raise typer.BadParameter("name claims, or pass --all", param_hint="NAMES")
    chosen = list(registry.available("claims").values()) if everything else map(find, names or ())
    hold = True
    for claim in list(chosen):
        with progress() as report:
            result = run_claim(claim(), seed, lambda m, f, c=claim: report(f"{c.id}: {m}", f))  # type: ignore[misc]
        save(result)
        hold = hold and result.holds
        if json:
            print_json(result.to_dict(), indent=None)
        else:
            show(result)
    raise typer.Exit(0 if hold else 1)


@app.command("report")
def report(
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("claims-report"),
    json: Json = False,
) -> None:
    """Write an HTML page and a Markdown file over everything that was run here, with plots."""
    from anabranch.claims.report import write_report

    html, markdown = write_report(output)
    if json:
        print_json({"html": str(html), "markdown": str(markdown)})
        return
    out.print(str(html))
    out.print(str(markdown))


def show(result: Any) -> None:
    """A claim's verdict and figures, for people."""
    style = "bold green" if result.holds else "bold red"
    out.print(f"{result.id} {result.system}: ", style="bold", end="")
    out.print(result.verdict, style=style)
    for label in ("paper", "baseline", "method", "threshold", "note"):
        if text := getattr(result, label):
            out.print(f"  {label:<10} {text}")
    show_figures(result.figures, indent=2)
    seeds = f"{result.seeds[0]}..{result.seeds[-1]}" if len(result.seeds) > 1 else result.seeds[0]
    cores = result.machine["cores"]
    errors.print(f"  {result.seconds} s on {cores} cores, seeds {seeds}", style="dim")


def show_figures(figures: Mapping[str, Any], indent: int) -> None:
    """Nested figures as indented lines."""
    for name, value in figures.items():
        label = " " * indent + name.replace("_", " ")
        nested = isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values())
        if nested or (isinstance(value, Mapping) and len(value) > 4):
            out.print(label)
            show_figures(value, indent + 2)
        elif isinstance(value, Mapping):
            pairs = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in value.items())
            out.print(f"{label}: {pairs}")
        else:
            out.print(f"{label}: {value}")
