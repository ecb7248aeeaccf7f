"""``anabranch federation compare``: a job together, alone, pooled and untrained, as one table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from anabranch.cli.output import bytes_text, out, print_json, progress

if TYPE_CHECKING:
    from anabranch.federated.compare import Mode, ModeResult


def compare(
    file: Annotated[Path, typer.Argument(help="A job file, see docs/federation.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/<job>-modes.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Run a job in four modes: federated, each client alone, on pooled data, and untrained.

    Killed, the same command goes on with the modes that are missing.
    """
    from anabranch.federated.job import load_job

    job = load_job(file, overrides or ())
    folder = output or Path("runs") / f"{job.federate}-modes"
    with progress() as report:
        report("importing torch", None)
        from anabranch.federated.comparing import compare_job

        found = compare_job(job, folder, report)
    if json:
        print_json({mode: asdict(result) for mode, result in found.items()})
    else:
        out.print(table(found))


def table(found: dict[Mode, ModeResult]) -> Table:
    """A row for each mode; of the clients alone the mean, and the best and worst of them."""
    made = Table("mode", "loss", "seen", "unseen", "bytes", "virtual time", "trained", box=None)
    for mode, result in found.items():
        loss = _figure(result, "loss")
        if mode == "local":
            low, high = result.spread["loss"]
            loss += f" ({low:.4f} to {high:.4f})"
        made.add_row(
            mode,
            loss,
            _figure(result, "loss/seen"),
            _figure(result, "loss/unseen"),
            bytes_text(result.bytes) if result.bytes else "",
            f"{result.seconds:.1f} s" if result.seconds else "",
            f"{result.trained:,}" if result.trained else "",
        )
    return made


def _figure(result: ModeResult, name: str) -> str:
    return f"{result.figures[name]:.4f}" if name in result.figures else ""
