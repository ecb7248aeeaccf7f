"""One job at work: the run of its trainer, computed in pieces.

The step is :meth:`Trainer.begin_step <anabranch.training.trainer.Trainer.begin_step>` and
``finish_step``, the run around it is :class:`~anabranch.training.run.Run`; only the gradients in
between are computed here, by a :class:`~.passes.Pass`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from anabranch import adapters
from anabranch.errors import AnabranchError, ConfigurationError
from anabranch.serving.coserving.background import BackgroundWriter
from anabranch.serving.coserving.job import FINISHED, JobEvent, JobHandle, JobProgress, JobState
from anabranch.serving.coserving.pages import PagePool
from anabranch.serving.coserving.passes import Pass
from anabranch.serving.coserving.trainee import Trainee
from anabranch.serving.runner import DifferentiableRunner
from anabranch.training.errors import DataError
from anabranch.training.example import Item
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.options import TrainOptions
from anabranch.training.randomness import separate_randomness
from anabranch.training.run import Run
from anabranch.training.trainer import BegunStep, Trainer

logger = logging.getLogger(__name__)

KEPT_VERSIONS = 2
"""Published folders that stay on the disk."""

Publish = Callable[["RunningJob", Path], None]
"""Makes an adapter's folder answer requests, then calls :meth:`RunningJob.published`."""


class RunningJob:
    """Puts a new adapter on the served weights, or goes on after the last checkpoint.

    Raises an :class:`AnabranchError` if the job can never run: an unknown method, an adapter that
    the runner cannot train, rows that are too long, a checkpoint of another job.
    """

    def __init__(
        self, handle: JobHandle, runner: DifferentiableRunner, pool: PagePool, publish: Publish
    ) -> None:
        job = handle.job
        self.handle, self.job = handle, job
        self.work = 0.0
        """Seconds of computing so far, divided by the job's weight."""
        self._runner, self._pool, self._publish = runner, pool, publish
        options = _served_options(job.options)
        self._trainee = Trainee(runner, job)
        self._trainer: Trainer[Item] = Trainer(
            self._trainee.model,
            _ServedObjective.from_options(Causal(), options),
            options,
            job.items,
            job.validation,
            output=job.output,
        )
        _require_room([*self._trainer.items, *self._trainer.validation], pool)
        self._run = Run(self._trainer, "auto")
        with separate_randomness():  # the generators belong to the server
            self._run.start()
        self._trainee.refresh()
        self._writer = BackgroundWriter()
        self._step: BegunStep[Item] | None = None
        self._pass: Pass | None = None
        self._validating = False
        self._seconds = 0.0
        self._publishing: Path | None = None
        self._progress = JobProgress(
            total_steps=self._trainer.total_steps,
            step=self._trainer.steps_done,
            tokens=self._trainer.tokens_done,
            seconds=self._trainer.seconds,
        )

    # -- Before a step of the engine.

    @property
    def finished(self) -> bool:
        """Whether the job will never do anything again."""
        return self._progress.state in FINISHED

    @property
    def waiting(self) -> bool:
        """Whether the job has nothing to compute until something is written or published."""
        busy = self._publishing is not None or not self._writer.idle
        return busy and not self.finished and self._pass is None

    def ready(self) -> Pass | None:
        """Obey the submitter, then see to it that there is work. None if there is none now."""
        if self.finished:
            return None
        with _Failing(self):
            self._writer.poll()
            if self.finished:
                return None
            if self.handle.wanted == "cancel":
                self._end("cancelled")
            elif self.handle.wanted == "pause":
                if self._pass is not None:
                    self._pass.drop()
                self._set_state("paused")
            elif self._publishing is None:
                self._set_state("running")
                if self._pass is None:
                    self._begin()
                if self._pass is not None and self._pass.ready():
                    return self._pass
        return None

    # -- After it.

    def spend(self, seconds: float) -> None:
        """Account for computing time."""
        self.work += seconds / self.job.weight
        self._seconds += seconds

    def settle(self) -> None:
        """Finish the step of the trainer if its gradients are complete."""
        if self._pass is not None and self._pass.done:
            with _Failing(self):
                self._finish_validation() if self._validating else self._finish_step()

    def published(self, version: int) -> None:
        """The folder given to ``publish`` answers requests as this version."""
        folder, self._publishing = self._publishing, None
        self._progress = replace(self._progress, version=version)
        self._report("published", {"version": version, "path": str(folder)})
        if self._run.stopped_because() is not None:
            self._end("succeeded")

    def fail(self, error: BaseException) -> None:
        """Give the job up and say why. Checkpoints and published versions stay."""
        if not isinstance(error, AnabranchError):
            logger.error("job %s failed", self.job.id, exc_info=error)
        message = str(error) or type(error).__name__
        self._progress = replace(self._progress, error=message)
        self._end("failed")

    @property
    def bytes(self) -> int:
        """Memory of what is kept between steps, weights and pages not included."""
        return self._pass.bytes if self._pass is not None else 0

    # -- Steps.

    def _begin(self) -> None:
        """Begin a step, or end the run."""
        if self._run.stopped_because() is not None:
            self._complete()
            return
        self._step = self._trainer.begin_step(self._trainer.next_items())
        self._trainee.model.eval()  # dropout is replayed, see coserving.dropout
        self._pass = self._make_pass(self._step.items, gradients=True)

    def _make_pass(self, items: Sequence[Item], gradients: bool) -> Pass:
        self._seconds = 0.0
        return Pass(
            [example for item in items for example in item],
            self._trainee,
            self._runner,
            self._pool,
            gradients,
            number=self._trainer.steps_done,
            prove=gradients and self._progress.loss is None,
            name=self.job.id,
        )

    def _finish_step(self) -> None:
        assert self._step is not None and self._pass is not None
        metrics = self._metrics(self._pass)
        self._pass = None
        report = self._trainer.finish_step(self._step, metrics.pop("loss"), metrics, self._seconds)
        self._trainee.refresh()
        self._run.record(report)
        self._progress = replace(
            self._progress,
            step=report.step,
            tokens=self._trainer.tokens_done,
            seconds=self._trainer.seconds,
            loss=report.loss,
        )
        self._report("step", report.to_dict())
        if self._run.validation_due():
            self._validating = True
            self._pass = self._make_pass(self._trainer.validation, gradients=False)
        else:
            self._after_step()

    def _finish_validation(self) -> None:
        assert self._pass is not None
        metrics = self._metrics(self._pass)
        self._pass, self._validating = None, False
        self._run.record_validation(metrics)
        self._progress = replace(self._progress, validation_loss=metrics["loss"])
        self._report("validation", metrics)
        self._after_step()

    def _metrics(self, finished: Pass) -> dict[str, float]:
        sums = {"nll": finished.nll, "tokens": float(finished.trained)}
        return {
            "loss": finished.nll / finished.trained,
            **self._trainer.objective.metrics(sums),
        }

    def _after_step(self) -> None:
        """Checkpoint after every update, unless the options say less often; publish if due."""
        step, options = self._trainer.steps_done, self._trainer.options
        if step % (options.checkpoint.every or 1) == 0 and not self._trainer.skipped_in_a_row:
            self._checkpoint(must_succeed=False)
        every = self.job.publish_every
        if every and step % every == 0 and self._run.stopped_because() is None:
            self._save_version()

    # -- The disk.

    def _complete(self) -> None:
        """The run is over: the last checkpoint, then the final weights as a version."""
        if not self._writer.idle:
            return
        if not self._run.saved:
            self._checkpoint(must_succeed=True)
            return
        self._run.finish()
        self._save_version()

    def _checkpoint(self, must_succeed: bool) -> None:
        step = self._trainer.steps_done

        def report() -> None:
            path = self._run.checkpoint_path(step)
            if path.exists():  # a full disk may have cost it
                self._report("checkpoint", {"step": step, "path": str(path)})

        self._writer.submit(self._run.snapshot(must_succeed), report)

    def _save_version(self) -> None:
        """Write the adapter's folder. No work is taken meanwhile, so that its weights rest."""
        step = self._trainer.steps_done
        folder = self.job.output / "adapter" / f"step-{step}"
        self._publishing = folder

        def write() -> None:
            if not folder.exists():  # or a crash came after it was written
                adapters.save(self._trainee.model, folder)
            versions = sorted(folder.parent.glob("step-*"), key=lambda path: int(path.name[5:]))
            for old in versions[:-KEPT_VERSIONS]:
                shutil.rmtree(old, ignore_errors=True)

        self._writer.submit(write, lambda: self._publish(self, folder))

    # -- States.

    def _end(self, state: JobState) -> None:
        if self.finished:
            return
        if self._pass is not None:
            self._pass.drop()
            self._pass = None
        self._writer.close()
        self._set_state(state)

    def _set_state(self, state: JobState) -> None:
        if self._progress.state != state:
            self._progress = replace(self._progress, state=state)
            self._report("state", {})

    def _report(self, kind: Any, data: Mapping[str, Any]) -> None:
        self.handle.report(JobEvent(kind, self._progress, data))


class _Failing:
    """An error inside fails the job, and not the engine."""

    def __init__(self, job: RunningJob) -> None:
        self._job = job

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._job.fail(error)
        return True


class _ServedObjective(LanguageObjective):
    """The objective of a model whose forward and backward pass are the engine's."""

    def check(self, model: nn.Module) -> None:
        """The first pass of a job compares with what is served."""


def _served_options(options: TrainOptions) -> TrainOptions:
    """Options that mean something here; :class:`ConfigurationError` for those that would not."""
    if options.gradient_checkpointing:
        raise ConfigurationError(
            "gradient_checkpointing: a job in the engine never keeps more than the layers' inputs; "
            "leave it out"
        )
    if options.precision not in ("auto", "fp32"):
        raise ConfigurationError(
            f"precision: a job in the engine computes gradients in fp32, not {options.precision}"
        )
    return options.model_copy(update={"precision": "fp32"})


def _require_room(items: Sequence[Item], pool: PagePool) -> None:
    for number, item in enumerate(items):
        for example in item:
            if len(example) > pool.capacity:
                raise DataError(
                    f"{example.source or f'item {number}'} has {len(example)} tokens, but a "
                    f"sequence trained while serving has at most {pool.capacity}; shorten it, "
                    f"or start the server with --finetune-tokens {len(example)}"
                )
