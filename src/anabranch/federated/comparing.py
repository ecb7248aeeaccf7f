"""A job in four modes, as one table: ``modes.json`` in a folder, filled mode by mode.

The modes are those of :mod:`anabranch.federated.compare`. Figures are of the recipe's validation
rows, of each client's own held-out examples (``loss/own``), and of the job's evaluations. A
comparison that was cut off goes on with the modes that it lacks, and within the federation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.federated.categories import category_losses
from anabranch.federated.compare import MODES, Mode, ModeResult, compare
from anabranch.federated.job import FederateJob
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Work
from anabranch.federated.personal import own_losses
from anabranch.federated.running import MOST_VALIDATION_ROWS, claim
from anabranch.federated.runtimes import Site
from anabranch.files import write_json
from anabranch.models.progress import Progress, silent
from anabranch.training.data import prepare
from anabranch.training.run_record import read_json
from anabranch.training.setup import Setup, load_base
from anabranch.training.trainer import Trainer

TABLE = "modes.json"
OWN_SHARE = 0.1
"""Of each client's examples, where the job does not say."""


def compare_job(
    job: FederateJob,
    folder: Path,
    progress: Progress = silent,
    modes: Sequence[Mode] = MODES,
) -> dict[Mode, ModeResult]:
    """These modes of a job, and those that the folder has already.

    Raises :class:`ConfigurationError` if the folder holds another job, for a mode that there is
    not, or without validation rows or steps.
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ConfigurationError(f"no mode {unknown[0]!r}; there are {', '.join(MODES)}")
    steps = job.local.steps
    if steps is None:
        raise ConfigurationError("a comparison counts steps: give local.steps instead of epochs")
    if job.clients.held_out is None:
        clients = job.clients.model_copy(update={"held_out": OWN_SHARE})
        job = job.model_copy(update={"clients": clients})
    claim(folder, job)
    table = folder / TABLE
    found: dict[Mode, ModeResult] = {}
    if table.exists():
        stored: Mapping[str, Any] = read_json(table)
        found = {mode: ModeResult(**stored[mode]) for mode in MODES if mode in stored}
    missing = [mode for mode in MODES if mode in modes and mode not in found]
    if not missing:
        return found
    progress("reading data", 0.0)
    prepared = prepare(job.recipe, progress)
    setup = Setup.of(job.recipe, load_base(job.recipe, progress), prepared)
    validation = setup.valid[:MOST_VALIDATION_ROWS]
    if not validation:
        raise ConfigurationError(
            "a comparison needs validation rows; give data.split.valid a share"
        )
    items = setup.objective.prepare(setup.train).items
    labels = [item[0].task for item in items]
    parts, own = job.clients.divide(labels, job.seed), job.clients.own(labels, job.seed)
    devices = job.make_devices(len(parts))
    sites = [
        Site(name, [items[index] for index in part], device)
        for (name, part), device in zip(parts.items(), devices, strict=True)
    ]
    examine = job.make_examination(setup)
    trainer: Trainer[Any] = Trainer(
        setup.model, setup.objective, job.recipe.train, items, validation
    )

    def score() -> Mapping[str, float]:
        figures = trainer.evaluate(trainer.validation)
        return figures | category_losses(trainer, trainer.validation, items) | examine(progress)

    def keep(mode: Mode, result: ModeResult) -> None:
        found[mode] = result
        write_json(table, {name: asdict(made) for name, made in found.items()})

    privacy = job.privacy.build(job.schedule.rounds) if job.privacy else None

    def training(steps: int) -> LocalTraining:
        options = job.recipe.train.model_copy(update={"steps": steps, "epochs": None})
        return LocalTraining(setup.objective, options, privacy)

    compare(
        job.make_strategy(),
        setup.model,
        training(steps),
        sites,
        job.schedule.build(job.make_strategy(), Work()),
        score,
        rounds=job.schedule.rounds,
        seed=job.seed,
        modes=missing,
        own=own_losses(
            trainer, {name: [items[index] for index in part] for name, part in own.items()}
        ),
        tuning=training(job.local.personal or steps),
        store=folder / "federated",
        done=keep,
        progress=progress,
        codec=job.make_codec("up"),
        down=job.make_codec("down"),
        topology=job.make_topology([site.name for site in sites]),
    )
    return {mode: found[mode] for mode in MODES if mode in found}
