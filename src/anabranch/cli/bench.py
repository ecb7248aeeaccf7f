"""``anabranch bench``: how fast this machine is, and why."""

from __future__ import annotations

import os
from typing import Annotated, cast

import typer
from rich.table import Table

from anabranch.cli.output import out, print_json, progress
from anabranch.models.packaged import DEFAULT

app = typer.Typer(help="How fast this machine is, and why.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """One command for each thing to measure."""


@app.command("step")
def step(
    model: Annotated[str, typer.Option(help="A model that the fused runner can run.")] = DEFAULT,
    weights: Annotated[str, typer.Option(help="bf16 or int8.")] = "bf16",
    profile: Annotated[
        bool, typer.Option("--profile", help="Show the share of each part.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Time engine steps of several shapes, beside the least time that they could take.

    The roofline is the larger of two times: moving the weights and the cache at the bandwidth
    measured now, and multiplying at the speed of a large matrix product measured now.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    with progress() as report:
        report("loading the model", None)
        from anabranch import models
        from anabranch.evaluation.steps import Ceilings, profile_steps
        from anabranch.serving.options import EngineOptions, WeightFormat
        from anabranch.serving.runner.fused import FusedRunner

        options = EngineOptions(weights=cast("WeightFormat", weights))
        loaded = models.load(model, dtype="float32", device="cpu", progress=report)
        runner = FusedRunner(
            loaded.network, loaded.card.context_length, options.page_size, options.weights
        )
        report("measuring the machine", None)
        ceilings = Ceilings.measure(weights)
        report("measuring steps", None)
        rows = list(profile_steps(runner, ceilings))
    if json:
        print_json(
            {
                "bandwidth_bytes_per_second": ceilings.bandwidth,
                "operations_per_second": ceilings.operations,
                "steps": [
                    {
                        "step": str(row.shape),
                        "seconds": row.seconds,
                        "roofline_seconds": row.roofline_seconds,
                        "shares": row.shares,
                    }
                    for row in rows
                ],
            }
        )
        return
    out.print(
        f"{loaded.name}, {weights} weights; this machine reads {ceilings.bandwidth / 1e9:.0f} GB/s "
        f"and multiplies {ceilings.operations / 1e9:.0f} Gop/s"
    )
    table = Table("step", "ms", "roofline ms", "of roofline", "tokens/s", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            str(row.shape),
            f"{row.seconds * 1e3:.1f}",
            f"{row.roofline_seconds * 1e3:.1f}",
            f"{row.of_roofline:.0%}",
            f"{row.shape.sequences * row.shape.tokens / row.seconds:.0f}",
        )
    out.print(table)
    for row in rows if profile else ():
        parts = sorted(row.shares.items(), key=lambda part: -part[1])
        out.print(f"{row.shape}: " + ", ".join(f"{name} {share:.0%}" for name, share in parts))
