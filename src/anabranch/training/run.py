"""A run: steps until the end, with validation, checkpoints and a log on the way."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from anabranch.training import ranks
from anabranch.training.checkpoint import Checkpoint, CheckpointStore
from anabranch.training.ema import copy_weights
from anabranch.training.errors import CheckpointError, Diverged
from anabranch.training.metrics_log import MetricsLog
from anabranch.training.randomness import seed_all
from anabranch.training.result import RunResult, StepReport, StoppedBecause
from anabranch.training.state import differences
from anabranch.training.termination import on_sigterm

if TYPE_CHECKING:
    from anabranch.training.trainer import Trainer

logger = logging.getLogger(__name__)

Resume = Literal["auto", "force", "never"]

SAMPLED_VALUES = 16
"""Of every frozen tensor, to tell one base model from another."""


class Run:
    """One call of :meth:`Trainer.fit`. What outlives it is in the trainer or on the disk."""

    def __init__(self, trainer: Trainer[Any], resume: Resume) -> None:
        self._trainer = trainer
        self._resume = resume
        self._failed_checkpoints = 0
        self._saved_step: int | None = None
        self._store: CheckpointStore | None = None
        self._log: MetricsLog | None = None
        if trainer.output is not None:
            keep = trainer.options.checkpoint.keep
            self._store = CheckpointStore(trainer.output / "checkpoints", keep)
            # Ranks hold the same weights and see the same totals: one of them writes.
            self._log = MetricsLog(trainer.output / "metrics.jsonl") if not ranks.rank() else None

    def execute(self) -> RunResult:
        """Resume, step to the end, and put the final weights into the model."""
        trainer = self._trainer
        resumed_from = self._start()
        was_training = trainer.model.training
        try:
            with on_sigterm(self._terminate):
                while (because := self._stopped_because()) is None:
                    self._record(self._step())
                    if self._validation_due():
                        self._validate()
                    if self._checkpoint_due():
                        self._save(must_succeed=False)
        finally:
            trainer.model.train(was_training)
            trainer.stop_requested = None
            for hook in trainer.hooks:
                hook.after_run(trainer)
        if self._saved_step != trainer.steps_done:
            self._save(must_succeed=True)
        self._install_final_weights()
        return RunResult(
            steps=trainer.steps_done,
            metrics=trainer.tracker.metrics,
            stopped_because=because,
            tokens=trainer.tokens_done,
            seconds=trainer.seconds,
            best=trainer.tracker.best,
            dropped=trainer.dropped,
            skipped=trainer.skipped,
            failed_checkpoints=self._failed_checkpoints,
            resumed_from=resumed_from,
        )

    def _step(self) -> StepReport:
        try:
            return self._trainer.step(self._trainer.next_items())
        except Diverged as error:
            saved = self._store.steps() if self._store else []
            where = f"{self._store.path(saved[-1])}" if self._store and saved else "none"
            raise Diverged(f"{error}. Last good checkpoint: {where}") from None

    def _terminate(self) -> None:
        self._trainer.stop_requested = "terminated"

    def _stopped_because(self) -> StoppedBecause | None:
        trainer = self._trainer
        if trainer.tracker.exhausted:
            return "early stopping"
        if trainer.steps_done >= trainer.total_steps:
            return "finished"
        return trainer.stop_requested

    def _record(self, report: StepReport) -> None:
        trainer = self._trainer
        if not trainer.validation:
            trainer.tracker.metrics = {"loss": report.loss, **report.metrics}
        if self._log:
            self._log.append(report.to_dict())
        left = trainer.total_steps - trainer.steps_done
        trainer.progress(
            f"step {trainer.steps_done}/{trainer.total_steps}  loss {report.loss:.4f}  "
            f"{report.tokens / report.seconds:,.0f} tokens/s  "
            f"{_duration(left * trainer.seconds / trainer.steps_done)} left",
            trainer.steps_done / trainer.total_steps,
        )

    def _validation_due(self) -> bool:
        trainer = self._trainer
        if not trainer.validation:
            return False
        if trainer.steps_done == trainer.total_steps:
            return True
        every = trainer.options.evaluate_every
        return trainer.steps_done % every == 0 if every else trainer.sampler.at_epoch_end

    def _validate(self) -> None:
        trainer = self._trainer
        metrics = trainer.evaluate(trainer.validation)
        weights = trainer.ema.average if trainer.ema else trainer.trainable
        trainer.tracker.record(trainer.steps_done, metrics, weights)
        if self._log:
            self._log.append({"step": trainer.steps_done, "validation": metrics})

    def _checkpoint_due(self) -> bool:
        trainer = self._trainer
        every = trainer.options.checkpoint.every
        due = every is not None and trainer.steps_done % every == 0
        # A streak of skipped steps may end in Diverged; the checkpoint before it is the good one.
        return due and not trainer.skipped_in_a_row

    def _save(self, must_succeed: bool) -> None:
        """Checkpoint. A full disk in the middle of a run costs this checkpoint, not the run."""
        trainer = self._trainer
        if self._store is None or ranks.rank() != 0:
            return
        try:
            self._store.save(trainer.steps_done, self._identity(), trainer.live_state())
            self._saved_step = trainer.steps_done
        except CheckpointError as error:
            if must_succeed:
                raise
            self._failed_checkpoints += 1
            logger.warning("%s; training goes on", error)

    def _start(self) -> int | None:
        """Seed a new run, or load the newest checkpoint; its step."""
        if self._trainer.steps_done:
            return None  # this process trained already, and goes on from where it is
        found = self._store.newest() if self._store else None
        if found is not None:
            self._require_resumable(found)
        if self._log:
            self._log.restart_after(found.step if found else 0)
        if found is None:
            seed_all(self._trainer.options.seed)
            return None
        self._trainer.load_state_dict(found.state)
        self._saved_step = found.step
        return found.step

    def _require_resumable(self, found: Checkpoint) -> None:
        assert self._store is not None
        if self._resume == "never":
            raise CheckpointError(
                f"{self._store.folder} has checkpoints up to step {found.step}; resume from them, "
                f"or choose another output folder"
            )
        changed = differences(dict(found.identity), self._identity())
        if changed and self._resume != "force":
            raise CheckpointError(
                f"{self._store.path(found.step)} belongs to another run:\n  "
                + "\n  ".join(changed)
                + "\nUse the same values, another output folder, or force the resumption"
            )
        for line in changed:
            logger.warning("resuming with a change: %s", line)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued."""
        trainer = self._trainer
        return {
            "options": trainer.options.model_dump(mode="json"),
            **trainer.objective.settings(),
            "items": trainer.objective.fingerprint(trainer.items),
            "validation": trainer.objective.fingerprint(trainer.validation),
            **_describe(trainer.model, set(trainer.trainable)),
        }

    def _install_final_weights(self) -> None:
        trainer = self._trainer
        if trainer.tracker.exhausted and trainer.tracker.best_weights:
            copy_weights(trainer.trainable, trainer.tracker.best_weights)
        elif trainer.ema:
            copy_weights(trainer.trainable, trainer.ema.average)


def _describe(model: nn.Module, trainable: set[str]) -> dict[str, str]:
    """Names, shapes and, of frozen weights, a few values: enough to notice another model."""
    count = 0
    shapes, frozen = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        shapes.update(f"{name}{list(parameter.shape)}".encode())
        if name in trainable:
            count += parameter.numel()
        else:
            frozen.update(
                parameter.detach().flatten()[:SAMPLED_VALUES].double().cpu().numpy().tobytes()
            )
    return {
        "weights": f"{count} values, {shapes.hexdigest()[:12]}",
        "base": frozen.hexdigest()[:12],
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
