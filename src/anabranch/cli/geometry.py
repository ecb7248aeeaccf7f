"""``anabranch geometry``: networks of point clouds, on charged particles."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from anabranch.cli.output import count_text, errors, out, print_json, progress

app = typer.Typer(help="Networks of point clouds: PONITA and EGNN.", no_args_is_help=True)
nbody = typer.Typer(help="Charged particles: where are they later?", no_args_is_help=True)
app.add_typer(nbody, name="nbody")

Folder = Annotated[Path, typer.Argument(help="What `train` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the random numbers.")]
Test = Annotated[int, typer.Option(min=1, help="Systems to test on.")]

TEST_SEED = 1_000_000
"""Added to the seed, for systems that no training sees."""


@nbody.command("train")
def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the network.")],
    model: Annotated[Literal["ponita", "egnn"], typer.Option(help="Which network.")] = "ponita",
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Processor seconds to train.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train instead.")] = None,
    systems: Annotated[int, typer.Option(min=1, help="To train on.")] = 1000,
    test: Test = 1000,
    orientations: Annotated[
        int | None, typer.Option(min=-1, help="Directions of PONITA's grid (12); -1 is edge mode.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels; 32, of EGNN 64.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks; 3, of EGNN 4.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Systems a step.")] = 50,
    lr: Annotated[float, typer.Option(min=1e-9, help="Peak learning rate.")] = 2e-3,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Simulate systems, train, and measure on others. Call it again to go on after a kill."""
    from anabranch.models.geometry import EGNN, EGNNConfig, Ponita, PonitaConfig, charged_nbody
    from anabranch.training.point_clouds.forecasting import forecast_options, mean_squared_error
    from anabranch.training.point_clouds.forecasting import train as train_network
    from anabranch.training.randomness import seed_all

    if (seconds is None) == (steps is None):
        raise typer.BadParameter("give --seconds or --steps, one of the two")
    if model == "egnn" and orientations is not None:
        raise typer.BadParameter("--orientations belongs to ponita; egnn has no directions")
    seed_all(seed)
    features: dict[str, Any] = {"scalars_in": 2, "vectors_in": 2, "scalars_out": 0}
    network: Any
    if model == "egnn":
        network = EGNN(EGNNConfig(**features, width=width or 64, layers=layers or 4))
    else:
        sizes: dict[str, Any] = {"width": width or 32, "basis": width or 32, "layers": layers or 3}
        directions = 12 if orientations is None else orientations
        network = Ponita(PonitaConfig(**features, **sizes, orientations=directions, vectors_out=1))
    with progress() as report:
        samples = charged_nbody(systems, seed, report).samples()
        held_out = charged_nbody(test, seed + TEST_SEED, report).samples()
        options = forecast_options(
            steps=steps, batch=batch, lr=lr, seed=seed, checkpoint={"every": 200}
        )
        went = train_network(
            network, samples, options, seconds=seconds, output=output / "run", progress=report
        )
        report("testing", None)
        error = mean_squared_error(network, held_out)
    network.save_pretrained(output)
    facts = {
        "model": model,
        "parameters": network.num_parameters(),
        "steps": went.steps,
        "processor_seconds": round(went.seconds, 1),
        "test_mse": round(error, 6),
        "output": str(output),
    }
    if json:
        print_json(facts)
        return
    out.print(
        f"{count_text(facts['parameters'])} parameters, {went.steps:,} steps: "
        f"mean squared error {error:.5f} on {test:,} other systems"
    )
    out.print(str(output))


@nbody.command("evaluate")
def evaluate(folder: Folder, test: Test = 1000, seed: Seed = 0, json: Json = False) -> None:
    """Mean squared error on systems that were not trained on, beside straight lines."""
    from anabranch.models.geometry import charged_nbody, linear_motion
    from anabranch.training.point_clouds.forecasting import mean_squared_error

    network = load(folder)
    with progress() as report:
        systems = charged_nbody(test, seed + TEST_SEED, report)
        report("testing", None)
        error = mean_squared_error(network, systems.samples())
    tau, line = linear_motion(systems)
    facts = {"systems": test, "mse": round(error, 6), "linear_motion_mse": round(line, 6)}
    if json:
        print_json({**facts, "tau": round(tau, 4)})
        return
    out.print(f"{error:.5f} on {test:,} systems; straight lines x + {tau:.3f} v: {line:.5f}")


@nbody.command("error")
def error(
    folder: Folder,
    test: Annotated[int, typer.Option(min=1, help="Systems to turn.")] = 50,
    axes: Annotated[int, typer.Option(min=1, help="Random axes an angle.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="SVG of deviation against angle.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """How far the network is from equivariance: its deviation when systems are turned."""
    import torch

    from anabranch.evaluation.plotting import Plot, svg
    from anabranch.files import write_text
    from anabranch.models.geometry import charged_nbody, error_by_angle
    from anabranch.training.point_clouds import batched
    from anabranch.training.point_clouds.forecasting import predict

    angles = tuple(15.0 * k for k in range(13))
    network = load(folder)
    generator = torch.Generator().manual_seed(seed)
    about = torch.nn.functional.normalize(torch.randn(axes, 3, generator=generator), dim=-1)
    with progress() as report:
        samples = charged_nbody(test, seed + TEST_SEED, report).samples()
        cloud = batched(samples).cloud
        found = []
        for number, angle in enumerate(angles):
            report(f"turned by {angle:g} degrees", number / len(angles))
            found += error_by_angle(network, cloud, (angle,), about)
        length = float(predict(network, samples).norm(dim=-1).mean())
    rows = [
        {"degrees": angle, "largest": round(d.vectors, 7), "mean": round(d.mean_vector, 7)}
        for angle, d in zip(angles, found, strict=True)
    ]
    if plot is not None:
        series = {k: [(row["degrees"], row[k]) for row in rows] for k in ("largest", "mean")}
        title, y = "Deviation from equivariance", "of a predicted displacement"
        write_text(plot, svg(Plot(title, "degrees about random axes", y, series)))
    if json:
        print_json({"mean_length_of_a_prediction": round(length, 6), "by_angle": rows})
        return
    table = Table("degrees", "largest", "mean", box=None, pad_edge=False)
    for row in rows:
        table.add_row(f"{row['degrees']:g}", f"{row['largest']:.2e}", f"{row['mean']:.2e}")
    out.print(table)
    errors.print(f"a prediction is {length:.3f} long on average", style="dim")


def load(folder: Path) -> Any:
    """The network that ``train`` saved."""
    from anabranch.models.geometry import EGNN, GeometryError, Ponita
    from anabranch.models.quiet import quiet

    kinds: dict[str, Any] = {"ponita": Ponita, "egnn": EGNN}
    try:
        kind = json_module.loads((folder / "config.json").read_text())["model_type"]
        with quiet():
            return kinds[kind].from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeometryError(f"{folder} is no folder that `nbody train` wrote: {error}") from None
