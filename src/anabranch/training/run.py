"""A run: steps until the end, with validation, checkpoints and a log on the way."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
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
    """One call of :meth:`Trainer.fit`. What outlives it is in the trainer or on the disk.

    :meth:`execute` is all of it. Whoever computes the steps elsewhere, as the serving engine does,
    calls the parts: ``start``, then ``record``, ``record_validation`` and ``save`` when they are
    due until ``stopped_because`` gives a reason, then ``finish``.
    """

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
        resumed_from = self.start()
        was_training = trainer.model.training
        try:
            with on_sigterm(self._terminate):
                while (because := self.stopped_because()) is None:
                    self.record(self._step())
                    if self.validation_due():
                        self.record_validation(trainer.evaluate(trainer.validation))
                    if self.checkpoint_due():
                        self.save()
        finally:
            trainer.model.train(was_training)
            trainer.stop_requested = None
            for hook in trainer.hooks:
                hook.after_run(trainer)
        self.finish()
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

    def start(self) -> int | None:
        """Seed a new run, or load the newest checkpoint and return its step.

        Raises :class:`CheckpointError` if that belongs to another run.
        """
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

    def stopped_because(self) -> StoppedBecause | None:
        """Why no further step should be taken, or None."""
        trainer = self._trainer
        if trainer.tracker.exhausted:
            return "early stopping"
        if trainer.steps_done >= trainer.total_steps:
            return "finished"
        return trainer.stop_requested

    def record(self, report: StepReport) -> None:
        """Log a step that was taken."""
        trainer = self._trainer
        if not trainer.validation:
            trainer.tracker.metrics = {"loss": report.loss, **report.metrics}
        if self._log:
            self._log.append(report.to_dict())
        left = trainer.total_steps - trainer.steps_done
        trainer.progress(
            f"step {trainer.steps_done}/{trainer.total_steps}  loss {report.loss:.4f}  "
            f"{report.tokens / report.seconds:,.0f} {trainer.objective.unit}/s  "
            f"{_duration(left * trainer.seconds / trainer.steps_done)} left",
            trainer.steps_done / trainer.total_steps,
        )

    def validation_due(self) -> bool:
        """Whether the validation items are to be evaluated now."""
        trainer = self._trainer
        if not trainer.validation:
            return False
        if trainer.steps_done == trainer.total_steps:
            return True
        every = trainer.options.evaluate_every
        return trainer.steps_done % every == 0 if every else trainer.sampler.at_epoch_end

    def record_validation(self, metrics: Mapping[str, float]) -> None:
        """Log a validation of the present weights."""
        trainer = self._trainer
        weights = trainer.ema.average if trainer.ema else trainer.trainable
        trainer.tracker.record(trainer.steps_done, metrics, weights)
        if self._log:
            self._log.append({"step": trainer.steps_done, "validation": metrics})

    def checkpoint_due(self) -> bool:
        """Whether the options ask for a checkpoint now."""
        trainer = self._trainer
        every = trainer.options.checkpoint.every
        due = every is not None and trainer.steps_done % every == 0
        # A streak of skipped steps may end in Diverged; the checkpoint before it is the good one.
        return due and not trainer.skipped_in_a_row

    def save(self, must_succeed: bool = False) -> None:
        """Checkpoint. A full disk in the middle of a run costs this checkpoint, not the run."""
        self._write(self._trainer.steps_done, self._trainer.live_state(), must_succeed)

    def snapshot(self, must_succeed: bool = False) -> Callable[[], None]:
        """Copy the state now; the result writes it as :meth:`save` does, on any thread."""
        step, state = self._trainer.steps_done, self._trainer.state_dict()
        return lambda: self._write(step, state, must_succeed)

    @property
    def saved(self) -> bool:
        """Whether the newest step is on the disk."""
        return self._saved_step == self._trainer.steps_done

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step is; only for a run with an output folder."""
        assert self._store is not None
        return self._store.path(step)

    def finish(self) -> None:
        """Checkpoint the last step and put the final weights into the model."""
        if not self.saved:
            self.save(must_succeed=True)
        self._install_final_weights()

    def _write(self, step: int, state: Mapping[str, Any], must_succeed: bool) -> None:
        if self._store is None or ranks.rank() != 0:
            return
        try:
            self._store.save(step, self._identity(), state)
            self._saved_step = step
        except CheckpointError as error:
            if must_succeed:
                raise
            self._failed_checkpoints += 1
            logger.warning("%s; training goes on", error)

    def _step(self) -> StepReport:
        try:
            return self._trainer.step(self._trainer.next_items())
        except Diverged as error:
            saved = self._store.steps() if self._store else []
            where = f"{self._store.path(saved[-1])}" if self._store and saved else "none"
            raise Diverged(f"{error}. Last good checkpoint: {where}") from None

    def _terminate(self) -> None:
        self._trainer.stop_requested = "terminated"

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
