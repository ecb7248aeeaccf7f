"""A recipe's seven stages as one run that can be interrupted anywhere and continued.

data, initialise, set up, train, evaluate, deploy, monitor (Parthasarathy et al. 2024, section 2).
What a stage found is in the output folder before the next one begins::

    run.json            the resolved recipe, versions, fingerprints, stages, status
    data.json           what became of every row
    evaluation/         base.json and tuned.json: scores of every held-out row
    training/           checkpoints and metrics.jsonl, the trainer's own
    adapter/            the result in PEFT's format (or model/, if all weights are trained)
    report.md, report.html, loss.svg
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch import adapters
from anabranch.errors import ConfigurationError
from anabranch.files import write_json
from anabranch.models.progress import Progress, silent, within
from anabranch.training import deploy
from anabranch.training.checks import ALL_WEIGHTS, check
from anabranch.training.data import prepare
from anabranch.training.environment import environment
from anabranch.training.example import Item
from anabranch.training.recipe import Recipe
from anabranch.training.report import write_report
from anabranch.training.run_record import RunRecord, read_json
from anabranch.training.scores import Scores, compare, regression
from anabranch.training.setup import Setup, load_base
from anabranch.training.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    ``status``: ``finished``, ``refused`` (trained and evaluated, but the gate let nothing pass) or
    ``interrupted`` (a checkpoint is left; the same call continues). ``message`` says it in words.
    """

    status: str
    message: str
    folder: Path
    figures: Mapping[str, Any] = field(default_factory=dict)
    published: Path | None = None


class Pipeline:
    """One run of a recipe in one folder."""

    def __init__(
        self, recipe: Recipe, output: Path | None = None, progress: Progress = silent
    ) -> None:
        self.recipe = recipe
        self.output = output or Path("runs") / recipe.recipe
        self._progress = progress
        self._trainer: Trainer[Item] | None = None

    def run(self, force: bool = False) -> Outcome:
        """All stages, from wherever an earlier call left off.

        ``force`` sets a run of another recipe aside and begins anew. Raises what
        :func:`check`, the data, the model and the trainer raise; the folder then says how far it
        got, and the same call goes on from there.
        """
        check(self.recipe)
        with _alone_in(self.output):
            record = RunRecord.open(self.output, self.recipe.resolved(), force)
            if record.status in ("finished", "refused"):
                return self._outcome(record)
            return self._run(record)

    def stop(self) -> bool:
        """Ask a training under way to checkpoint and end. False if none is: just interrupt."""
        if self._trainer is None:
            return False
        self._trainer.stop()
        return True

    def _run(self, record: RunRecord) -> Outcome:
        recipe = self.recipe
        run = record.content.setdefault("run", uuid.uuid4().hex)
        if recipe.deploy.register_as is not None:
            deploy.require_free(recipe.deploy.register_as, run)
        record.update(status="running", **environment(Path.cwd()))

        with record.stage("data"):
            prepared = prepare(recipe, within(self._progress, 0.0, 0.05))
            record.require_same("data", prepared.report.fingerprints, "data")
            write_json(self.output / "data.json", prepared.report.to_dict())
        with record.stage("initialise"):
            base = load_base(recipe, self._progress)
            record.require_same("base", {base.name: base.card.fingerprint}, "base model")
            setup = Setup.of(recipe, base, prepared)
        with record.stage("set up"):
            trainer = setup.trainer(self.output / "training", within(self._progress, 0.1, 0.8))
            record.update(
                trainable=sum(p.numel() for p in trainer.trainable.values()),
                parameters=sum(p.numel() for p in setup.model.parameters()),
            )

        before = self._scores("base", setup, within(self._progress, 0.05, 0.1), record)
        with record.stage("train"):
            self._trainer = trainer
            result = trainer.fit()
            self._trainer = None
        record.update(result=result.to_dict())
        if result.stopped_because in ("terminated", "stopped"):
            record.update(status="interrupted")
            return self._outcome(record)
        with record.stage("save"):
            setup.save(self.output)
        after = self._scores("tuned", setup, within(self._progress, 0.8, 0.95), record)

        figures = {
            evaluation.name: compare(
                setup.held_out[evaluation.name].rows,
                before[evaluation.name],
                after[evaluation.name],
                recipe.seed,
            )
            for evaluation in recipe.evaluate
        }
        record.update(figures=figures, gate=self._gate(figures))
        self._progress("writing the report", 0.95)
        card = write_report(
            self.output, record.content, prepared.report, setup.samples(before, after)
        )
        if recipe.deploy.register_as is not None and record.content["gate"]["passed"]:
            with record.stage("deploy"):
                published = self._publish(recipe.deploy.register_as, setup, record, card)
                record.update(published=str(published))
        refused = recipe.deploy.register_as is not None and not record.content["gate"]["passed"]
        record.update(status="refused" if refused else "finished")
        return self._outcome(record)

    def _scores(
        self, name: str, setup: Setup, progress: Progress, record: RunRecord
    ) -> dict[str, Scores]:
        """Scores of all evaluations, from the folder if they are there."""
        path = self.output / "evaluation" / f"{name}.json"
        if path.exists():
            return {key: Scores(**value) for key, value in read_json(path).items()}
        with record.stage(f"evaluate {name}"):
            scores = setup.evaluate(name == "base", progress)
            write_json(path, {key: value.to_dict() for key, value in scores.items()})
        return scores

    def _gate(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Whether the result may be deployed, and why."""
        gate = self.recipe.deploy.gate
        if gate is None or gate.evaluation not in figures:
            return {"passed": True, "reason": "no gate"}
        measured = figures[gate.evaluation]
        if gate.metric not in measured:
            raise ConfigurationError(
                f"deploy.gate.metric: {gate.evaluation} has no figure {gate.metric!r}; it has "
                f"{', '.join(measured)}"
            )
        worse = regression(measured[gate.metric])
        values = {side: measured[gate.metric][side]["value"] for side in ("base", "tuned")}
        passed = worse <= gate.tolerance  # NaN does not pass
        return {
            "passed": bool(passed),
            "reason": f"{gate.metric} of {gate.evaluation} went from {values['base']:.4g} to "
            f"{values['tuned']:.4g}" + ("" if passed else f", allowed: {gate.tolerance:g} worse"),
        }

    def _publish(self, name: str, setup: Setup, record: RunRecord, card: str) -> Path:
        monitor = deploy.reference_statistics(
            setup.prompt_lengths(), self.recipe.monitor.model_dump()
        )
        facts = {
            "kind": "adapter",
            "name": name,
            "run": record.content["run"],
            "base": {"name": setup.base.name, "fingerprint": setup.base.card.fingerprint},
            "licence": setup.base.card.licence,
            "recipe": record.content["recipe"],
            "figures": record.content["figures"],
        }
        if self.recipe.adapter.method not in ALL_WEIGHTS and not self.recipe.deploy.merge:
            return deploy.publish_adapter(name, self.output / "adapter", card, facts, monitor)
        network: Any = setup.model
        if self.recipe.adapter.method not in ALL_WEIGHTS:
            network = adapters.merge(network)
        return deploy.publish_model(
            name,
            network,
            setup.base.tokenizer,
            setup.base.card,
            f"{setup.base.name}, fine-tuned by recipe {self.recipe.recipe}",
            card,
            facts | {"kind": "model"},
            monitor,
        )

    def _outcome(self, record: RunRecord) -> Outcome:
        content = record.content
        published = content.get("published")
        status = record.status
        if status == "interrupted":
            steps = content["result"]["steps"]
            message = (
                f"stopped after step {steps}; the checkpoint is in {self.output / 'training'}, and "
                f"the same command goes on from it"
            )
        elif status == "refused":
            message = (
                f"not deployed: {content['gate']['reason']}; the result stays in {self.output}; "
                f"change the recipe, or deploy.gate"
            )
        else:
            message = f"finished; see {self.output / 'report.md'}"
            if published:
                message += f"; published in {published}"
        return Outcome(
            status,
            message,
            self.output,
            content.get("figures", {}),
            Path(published) if published else None,
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; raise if another process runs there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}.lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another process is running in {folder}; wait for it, or choose another --output"
            ) from None
        yield
    finally:
        os.close(descriptor)
