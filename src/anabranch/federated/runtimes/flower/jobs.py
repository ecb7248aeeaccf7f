"""A job over Flower on this machine: the coordinator in a ServerApp, a SuperNode for each client.

Everything of Flower is in the folder ``flower`` of the job's own: keys, logs, the app, and a folder
for each node.
"""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from anabranch.errors import AnabranchError, ConfigurationError
from anabranch.federated.errors import FederationError
from anabranch.federated.job import FederateJob
from anabranch.federated.running import Dealt, Outcome, claim, deal, run_job
from anabranch.federated.runtimes.flower.deployment import Deployment
from anabranch.federated.runtimes.flower.resident import Place
from anabranch.federated.runtimes.flower.runtime import Flower
from anabranch.files import replacing, write_json, write_text
from anabranch.models.progress import Progress, silent
from anabranch.training.options import parse_options
from anabranch.training.run_record import read_json

PROJECT = """\
[project]
name = "anabranch-job"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "anabranch"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
job = ""
"""

APP = '''\
"""A federation's job. The code is that of the package; this only names it to Flower."""

from pathlib import Path

from flwr.serverapp import ServerApp

from anabranch.federated.runtimes.flower import client_app
from anabranch.federated.runtimes.flower.jobs import serve

client = client_app("anabranch.federated.runtimes.flower.jobs:site")
server = ServerApp()


@server.main()
def main(grid, context):
    serve(grid, Path(context.run_config["job"]))
'''


def federate(job: FederateJob, folder: Path, progress: Progress = silent) -> Outcome:
    """Run a job in a folder, or go on with it there.

    Raises :class:`ConfigurationError` if the job does not say how many clients there are, and
    :class:`FederationError` with what ended the run.
    """
    count = job.clients.count
    if count is None:
        raise ConfigurationError(
            "runtime: flower starts a node for each client; give clients.count"
        )
    claim(folder, job)
    place = (folder / "flower").absolute()
    write_json(place / "job.json", job.resolved())
    if not (place / "run").exists():
        write_text(place / "run", uuid.uuid4().hex)
    app = place / "app"
    write_text(app / "pyproject.toml", PROJECT)
    write_text(app / "app.py", APP)
    for name in ("outcome", "progress"):
        (place / name).unlink(missing_ok=True)
    said = 0

    def tell() -> None:
        nonlocal said
        file = place / "progress"
        lines = file.read_text().splitlines() if file.exists() else []
        for line in lines[said:]:
            progress(line, None)
        said = len(lines)

    progress(f"starting Flower with {count} nodes", None)
    # The run's name tells residents of this run from those of one that was here before.
    common = {"job": str(place), "run": (place / "run").read_text()}
    with Deployment(place, [{"index": index, **common} for index in range(count)]) as flower:
        flower.wait(flower.run(app, {"job": str(place)}), tell)
    # Written by the ServerApp, a process of ours, in a folder of ours.
    outcome = pickle.loads((place / "outcome").read_bytes())
    if isinstance(outcome, str):
        raise FederationError(outcome)
    return Outcome(folder, outcome.saved, outcome.result, outcome.evaluations)


def serve(grid: Grid, place: Path) -> None:
    """What the ServerApp does: the whole run, whose outcome it leaves in a file."""

    def say(message: str, fraction: float | None) -> None:
        with (place / "progress").open("a") as file:
            file.write(f"{message}\n")

    outcome: Outcome | str
    try:
        job = _job(place)
        setup, items, parts = deal(job, say)
        runtime = Flower(grid, clients=len(parts), run=(place / "run").read_text())
        outcome = run_job(job, place.parent, Dealt(setup, items, runtime, list(parts)), say)
    except AnabranchError as error:
        outcome = f"{type(error).__name__}: {error}"
    with replacing(place / "outcome") as draft:
        draft.write_bytes(pickle.dumps(outcome))


def site(settings: Mapping[str, Any]) -> Place:
    """A client of the job: the part of its examples with the node's number."""
    job = _job(Path(settings["job"]))
    setup, items, parts = deal(job)
    name, part = list(parts.items())[settings["index"]]
    return Place(
        name,
        job.make_strategy().client(job.make_local(setup.objective)),
        [items[index] for index in part],
        setup.model,
        len(part),
        job.make_codec("up"),
        job.make_codec("down"),
    )


def _job(place: Path) -> FederateJob:
    return parse_options(FederateJob, read_json(place / "job.json"))
