"""The coordinator's job over a network: what :func:`federate` does, with sites that come by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.federated.job import FederateJob
from anabranch.federated.running import Dealt, Observer, Outcome, claim, run_job
from anabranch.federated.runtimes.network.runtime import Network
from anabranch.models.progress import Progress, silent
from anabranch.training.data import Prepared, prepare
from anabranch.training.recipe import TEMPLATES, Recipe
from anabranch.training.setup import Setup, load_base


@dataclass(frozen=True)
class Place:
    """Where sites come to, and how many are waited for. See :class:`Network`."""

    host: str = "127.0.0.1"
    port: int = 0
    clients: int | None = None
    address: str | None = None
    insecure: bool = False
    absent_after: float = 60.0


def serve(
    job: FederateJob,
    folder: Path,
    place: Place,
    progress: Progress = silent,
    observe: Observer | None = None,
    listening: Callable[[Network], None] = lambda network: None,
    own_data: bool = True,
) -> Outcome:
    """Run a job with the sites that join, or go on with it.

    The recipe's own data are only evaluated on; without ``own_data`` nothing is evaluated.
    ``listening(network)`` is called when sites can come: invite them there.
    """
    check(job)
    count = place.clients or job.clients.count
    if count is None:
        raise ConfigurationError("say how many sites to wait for: --clients N")
    claim(folder, job)
    recipe = without_evaluations(job.recipe)
    prepared = Prepared()
    if own_data:
        progress("reading data", 0.0)
        prepared = prepare(recipe, progress)
    setup = Setup.of(recipe, load_base(recipe, progress), prepared)

    def waiting(names: list[str]) -> None:
        there = f": {', '.join(names)}" if names else ""
        progress(f"waiting for sites, {len(names)} of {count} are there{there}", None)

    network = Network(
        folder / "network",
        place.host,
        place.port,
        clients=count,
        address=place.address,
        insecure=place.insecure,
        absent_after=place.absent_after,
        plan=plan(job, setup),
        waiting=waiting,
    )
    try:
        network.listen()
        listening(network)
        items = setup.objective.prepare(setup.train).items
        return run_job(job, folder, Dealt(setup, items, network), progress, observe)
    finally:
        network.close()


def check(job: FederateJob) -> None:
    """Raise :class:`ConfigurationError` for what cannot be done over a network."""
    if job.tree is not None:
        raise ConfigurationError("tree: over a network all sites send to the coordinator")
    if job.recipe.template not in TEMPLATES:
        raise ConfigurationError(
            f"recipe.template: sites do not have the file {job.recipe.template}; use one of "
            f"{', '.join(TEMPLATES)}"
        )


def plan(job: FederateJob, setup: Setup) -> dict[str, Any]:
    """What sites are shown before they join: the job, and which base it is for."""
    resolved = job.resolved()
    resolved["publish"] = None
    for data in resolved["recipe"]["data"]:
        # Where the coordinator's own rows are, and what it serves, is its own business.
        data["path"] = None if data["path"] is None else "(given by --data)"
    return {
        "job": resolved,
        "base": {"name": setup.base.card.name, "fingerprint": setup.base.card.fingerprint},
        "shared": {
            name: list(parameter.shape)
            for name, parameter in setup.model.named_parameters()
            if parameter.requires_grad
        },
    }


def without_evaluations(recipe: Recipe) -> Recipe:
    """A federation evaluates versions by itself."""
    return recipe.model_copy(update={"evaluate": []})
