"""From a job to a folder with its result: the federation, evaluated and reported.

The folder holds ``run/`` (snapshots, journal and the sites' state, for going on after a crash),
``job.json``, ``adapter/``, ``report.json`` and what else a method exports; ``evaluations.json`` if
the job has any, or examples that clients hold out; the command line adds ``loss.svg``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.federated.categories import category_losses
from anabranch.federated.coordinator import Coordinator
from anabranch.federated.core import Federation
from anabranch.federated.job import FederateJob
from anabranch.federated.personal import own_losses
from anabranch.federated.publishing import Publisher
from anabranch.federated.result import RunResult
from anabranch.federated.runtimes import Runtime, Site
from anabranch.federated.shared import lent, load_shared
from anabranch.federated.store import RunStore
from anabranch.federated.strategies.fedit import save_versions
from anabranch.files import write_json
from anabranch.models.progress import Progress, silent
from anabranch.training.data import prepare
from anabranch.training.example import Item
from anabranch.training.recipe_file import difference
from anabranch.training.run_record import read_json
from anabranch.training.setup import Setup, load_base
from anabranch.training.trainer import Trainer

Observer = Callable[[Coordinator], None]
MOST_VALIDATION_ROWS = 200


@dataclass(frozen=True)
class Outcome:
    """A finished federation: its result, and the adapter (or model) that came of it.

    ``evaluations`` are those of the model ``before`` and ``after``: ``figures``, and those of each
    of the ``clients`` that hold out examples.
    """

    folder: Path
    saved: Path
    result: RunResult
    evaluations: Mapping[str, Any] = field(default_factory=dict)


def federate(
    job: FederateJob,
    folder: Path,
    progress: Progress = silent,
    observe: Observer | None = None,
) -> Outcome:
    """Run a job in a folder, or go on with it there. ``observe`` is called after each version.

    Raises :class:`ConfigurationError` if the folder holds another job.
    """
    if job.runtime == "flower":
        from anabranch.federated.runtimes.flower import jobs  # says so if Flower is missing

        return jobs.federate(job, folder, progress)
    if job.runtime == "ray":
        import anabranch.federated.runtimes.ray  # noqa: F401 - says so if Ray is missing
    claim(folder, job)
    return run_job(job, folder, deal_out(job, progress), progress, observe)


@dataclass(frozen=True)
class Dealt:
    """What a job runs on.

    ``items`` are what is trained on as far as it is known here, ``clients`` names for the topology,
    ``own`` the examples that clients hold out.
    """

    setup: Setup
    items: Sequence[Item]
    runtime: Runtime
    clients: Sequence[str] = ()
    own: Mapping[str, Sequence[Item]] = field(default_factory=dict)


def deal_out(job: FederateJob, progress: Progress = silent) -> Dealt:
    """Base, data, sites and their runtime. Nothing is started yet."""
    setup, items, parts = deal(job, progress)
    devices = job.make_devices(len(parts))
    sites = [
        Site(name, [items[index] for index in part], device)
        for (name, part), device in zip(parts.items(), devices, strict=True)
    ]
    held_out = job.clients.own([item[0].task for item in items], job.seed)
    own = {name: [items[index] for index in part] for name, part in held_out.items()}
    return Dealt(setup, items, job.make_runtime(sites, setup.model), list(parts), own)


def deal(
    job: FederateJob, progress: Progress = silent
) -> tuple[Setup, Sequence[Item], Mapping[str, np.ndarray]]:
    """Base and data of a job, the examples to train on, and which of them each client has."""
    progress("reading data", 0.0)
    prepared = prepare(job.recipe, progress)
    setup = Setup.of(job.recipe, load_base(job.recipe, progress), prepared)
    items = setup.objective.prepare(setup.train).items
    return setup, items, job.clients.divide([item[0].task for item in items], job.seed)


def run_job(
    job: FederateJob,
    folder: Path,
    dealt: Dealt,
    progress: Progress = silent,
    observe: Observer | None = None,
) -> Outcome:
    """Run a job on any runtime, or go on with it: evaluated, saved and reported."""
    setup = dealt.setup
    evaluated = _Evaluated(job, folder, setup, dealt.own, progress)
    evaluated.at("before")
    federation = make_federation(job, folder, dealt, progress, observe)
    result = run_or_resume(federation, folder)
    load_shared(setup.model, _tensors(federation.coordinator))
    saved = setup.save(folder)
    federation.server.export(folder)
    evaluated.at("after")
    found = report(job, result)
    if evaluated.found:
        found["evaluations"] = evaluated.found
    write_json(folder / "report.json", found)
    return Outcome(folder, saved, result, evaluated.found)


def run_or_resume(federation: Federation, folder: Path) -> RunResult:
    """Run it, or go on with what the folder holds."""
    return federation.resume() if RunStore(folder / "run").snapshots() else federation.run()


def make_federation(
    job: FederateJob,
    folder: Path,
    dealt: Dealt,
    progress: Progress = silent,
    observe: Observer | None = None,
    until: int | None = None,
) -> Federation:
    """The federation of a job, which scores the validation rows and publishes as the job says."""
    setup, items, runtime, clients = dealt.setup, dealt.items, dealt.runtime, dealt.clients
    local = job.make_local(setup.objective)
    strategy = job.make_strategy()
    validation = setup.valid[:MOST_VALIDATION_ROWS]
    keep = save_versions(setup.model, folder / "versions") if job.keep_versions else None
    publish = Publisher(job, setup, folder) if job.publish is not None else None
    trainer: Trainer[Any] | None = None
    if validation:  # which is all that it is for, so that nothing need be trained on here
        trainer = Trainer(
            setup.model, setup.objective, job.recipe.train, items or validation, validation
        )

    def watch(coordinator: Coordinator) -> Mapping[str, float]:
        figures: dict[str, float] = {}
        if trainer is not None and not coordinator.version % job.evaluate_every:
            with lent(setup.model, _tensors(coordinator)):
                scores = trainer.evaluate(trainer.validation)
                scores |= category_losses(trainer, trainer.validation, items)
            figures = {f"valid/{name}": value for name, value in scores.items()}
        coordinator.state.history[-1] |= figures
        if keep is not None:
            keep(coordinator)
        if publish is not None:
            publish(coordinator)
        if observe is not None:
            observe(coordinator)
        progress(_line(coordinator, job), coordinator.version / job.schedule.rounds)
        return figures

    return Federation(
        strategy.begin(setup.model),
        strategy.client(local),
        job.make_schedule(),
        runtime,
        codec=job.make_codec("up"),
        down=job.make_codec("down"),
        topology=job.make_topology(clients),
        store=folder / "run",
        seed=job.seed,
        watch=watch,
        until=until,
    )


class _Evaluated:
    """The job's evaluations and the clients' own losses, kept in ``evaluations.json``."""

    def __init__(
        self,
        job: FederateJob,
        folder: Path,
        setup: Setup,
        own: Mapping[str, Sequence[Item]],
        progress: Progress,
    ) -> None:
        self._path = folder / "evaluations.json"
        self._examine = job.make_examination(setup)
        self._progress = progress
        self._own = {}
        if own := {name: items for name, items in own.items() if items}:
            everything = [item for items in own.values() for item in items]
            trainer: Trainer[Any] = Trainer(
                setup.model, setup.objective, job.recipe.train, everything, everything
            )
            self._own = own_losses(trainer, own)
        self.found: dict[str, Any] = read_json(self._path) if self._path.exists() else {}

    def at(self, when: Literal["before", "after"]) -> None:
        """Ask the model as it is now, unless it was asked before the run was cut off."""
        if when in self.found or not (self._examine or self._own):
            return
        clients = {name: score() for name, score in self._own.items()}
        self.found[when] = {"figures": self._examine(self._progress), "clients": clients}
        write_json(self._path, self.found)


def report(job: FederateJob, result: RunResult) -> dict[str, Any]:
    """Everything that was measured, as plain values."""
    made = {
        "job": job.resolved(),
        "versions": result.version,
        "reason": result.reason,
        "clock": result.clock,
        "seconds": result.seconds,
        "history": list(result.history),
        "traffic": [
            {"direction": direction, "client": client, "kind": kind, **vars(traffic)}
            for (direction, client, kind), traffic in result.ledger.by(
                "direction", "client", "kind"
            ).items()
        ],
        "incidents": result.incidents.state_dict()["incidents"],
    }
    if result.timeline is not None:
        made["timeline"] = result.timeline.to_list()
    return made


def claim(folder: Path, job: FederateJob) -> None:
    """The folder is new, or holds the same job."""
    path = folder / "job.json"
    if path.exists():
        changed = [
            line
            for line in difference(read_json(path), job.resolved())
            if not line.startswith("publish")  # where versions are served changes none of them
        ]
        if changed:
            raise ConfigurationError(
                f"{folder} holds another job; choose another folder. " + "; ".join(changed)
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{folder} is not empty and holds no job; choose another folder")
    write_json(path, job.resolved())


def _tensors(coordinator: Coordinator) -> Mapping[str, Any]:
    tensors: Mapping[str, Any] = coordinator.server.tensors  # type: ignore[attr-defined]
    return tensors


def _line(coordinator: Coordinator, job: FederateJob) -> str:
    row = coordinator.state.history[-1]
    loss = row.get("valid/loss", row.get("loss"))
    return (
        f"version {coordinator.version} of {job.schedule.rounds}"
        + (f", loss {loss:.4f}" if loss is not None else "")
        + f", {coordinator.state.ledger.total().bytes / 2**20:.2f} MiB, {row['seconds']:.1f} s"
    )
