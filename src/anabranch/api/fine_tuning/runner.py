"""Runs the store's fine-tuning jobs on the models. It alone talks to the engine about jobs."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.api.fine_tuning.handover import Handover
from anabranch.api.fine_tuning.reports import RESULT, report_of
from anabranch.api.fine_tuning.results import metrics_csv
from anabranch.api.fine_tuning.spec import KIND, Spec
from anabranch.api.fine_tuning.trainable import Trainable
from anabranch.errors import AnabranchError, Draining
from anabranch.jobs import FINISHED, Artefact, Job, NewEvent, Report, State, Workspace, allowed
from anabranch.jobs.loop import JobLoop
from anabranch.jobs.records import Wanted

if TYPE_CHECKING:
    from anabranch.serving.coserving.job import FinetuneJob, JobEvent, JobHandle

logger = logging.getLogger("anabranch.fine_tuning")

TRAINING = "training.safetensors"
VALIDATION = "validation.safetensors"
OUTPUT = "output"
"""What lies in a job's folder."""


@dataclass
class _Held:
    """A job that this process runs, or has paused. ``state`` is what the store has of it."""

    job: Job
    spec: Spec
    handle: JobHandle
    state: State
    wanted: Wanted = "run"
    """What the handle was told last."""
    since: dict[str, Any] = field(default_factory=dict)


class Runner(JobLoop):
    """Runs at most ``max_jobs`` jobs at a time on ``models``; paused ones do not count.

    After :meth:`close` the models stop; that ends no job, it only interrupts it.
    """

    def __init__(
        self,
        workspace: Workspace,
        models: Mapping[str, Trainable],
        max_jobs: int,
        poll_seconds: float = 1.0,
    ) -> None:
        super().__init__(workspace.jobs, {KIND}, logger, poll_seconds)
        self._workspace = workspace
        self._models = models
        self._max_jobs = max_jobs
        self._handover = Handover()
        self._collected: tuple[list[tuple[str, JobEvent]], dict[str, int]] = [], {}
        self._held: dict[str, _Held] = {}
        self._unwritten: list[Report] = []

    def poke(self) -> None:
        """Look at the store now: something was asked."""
        self._handover.poke()

    def _collect(self, timeout: float) -> None:
        self._collected = self._handover.take(timeout)

    def _obey(self) -> None:
        wishes = self._store.wishes()
        for job_id, held in list(self._held.items()):
            job = wishes.get(job_id)
            if job is None:  # cancelled while it waited for its turn, or taken by another process
                held.handle.cancel()
                del self._held[job_id]
                continue
            held.state = job.state
            if job.wanted == held.wanted:
                continue  # said once: the engine may pause a job for a reason of its own
            held.wanted = job.wanted
            if job.wanted == "cancel":
                held.handle.cancel()
            elif job.wanted == "pause":
                held.handle.pause()
            elif job.state == "running":  # the pause had not happened yet
                held.handle.resume()

    def _fill(self) -> None:
        while not self._closing and self._num_running() < self._max_jobs:
            job = self._store.claim(self._kinds, list(self._models))
            if job is None:
                return
            held = self._held.get(job.id)
            if held is not None:  # it was paused here
                held.state, held.since, held.wanted = "running", _from_here(job.progress), "run"
                held.handle.resume()
            else:
                self._begin(job)

    def _num_running(self) -> int:
        return sum(held.state == "running" for held in self._held.values())

    def _begin(self, job: Job) -> None:
        if job.progress:
            message = f"Taken up again after step {job.progress.get('step', 0)} or an earlier one"
            self._record([Report(job.id, events=[NewEvent("message", message)])])
        try:
            spec = Spec.model_validate(job.spec)
            model = self._models[job.target]
            finetune = self._finetune_job(job, spec, model)
            handle = model.submit_finetune(finetune, lambda event: self._hear(job.id, event))
        except Draining:
            self._closing = True  # its lease goes back when this process stops
        except AnabranchError as error:
            self._fail(job, str(error))
        except Exception as error:
            logger.exception("job %s could not be started", job.id)
            self._fail(job, f"it could not be started ({type(error).__name__}); see the log")
        else:
            since = _from_here(job.progress)
            self._held[job.id] = _Held(job, spec, handle, "running", since=since)

    def _finetune_job(self, job: Job, spec: Spec, model: Trainable) -> FinetuneJob:
        # These know torch.
        from anabranch.api.fine_tuning.dataset import load
        from anabranch.serving.coserving.job import FinetuneJob
        from anabranch.training.errors import CheckpointError

        if model.card.fingerprint != spec.base_fingerprint:
            raise CheckpointError(
                f"{spec.base!r} is another model now than when the job was created; create the "
                f"job again"
            )
        folder = self._workspace.job_folder(job.id)
        try:
            items = load(folder / TRAINING)
            validation = load(folder / VALIDATION) if spec.validation_rows else ()
        except OSError as error:
            raise CheckpointError(f"the job's rows cannot be read: {error}") from error
        return FinetuneJob(
            id=job.id,
            adapter=spec.adapter,
            items=items,
            options=spec.options,
            output=folder / OUTPUT,
            validation=validation,
            method=spec.method,
            method_options=spec.method_options,
            start_from=Path(spec.start_from) if spec.start_from else None,
            weight=spec.weight,
            publish_every=spec.publish_every,
        )

    def _hear(self, job_id: str, event: JobEvent) -> None:
        """The listener; called on the engine's thread."""
        if self._closing and event.kind == "state" and event.progress.state != "succeeded":
            return  # the model stops and gives its jobs up; in the store they are still running
        self._handover.put(job_id, event)

    def _write(self) -> None:
        (events, skipped), self._collected = self._collected, ([], {})
        for job_id, event in events:
            if (held := self._held.get(job_id)) is not None:  # else it was given up before
                self._unwritten.append(self._report(held, event))
        for job_id, count in skipped.items():
            message = f"{count} step reports were left out: they came faster than they were stored"
            note = NewEvent("message", message, "warn")
            self._unwritten.insert(0, Report(job_id, events=[note]))
        while self._unwritten:
            ends = [n for n, report in enumerate(self._unwritten) if report.state in FINISHED]
            first = ends[0] if ends else len(self._unwritten)
            self._record(self._unwritten[:first])
            del self._unwritten[:first]
            if ends:
                self._finish(self._unwritten[0])
                del self._unwritten[0]

    def _report(self, held: _Held, event: JobEvent) -> Report:
        if event.kind == "state" and event.progress.state == "running":
            held.since = _from_here({"step": event.progress.step})
        now = {**held.since, "at": time.time()}
        report = report_of(held.job.id, held.spec, event, now)
        if report.state is None:
            return report
        if report.state in (held.state, "queued"):  # the store knew before the engine
            return replace(report, state=None)
        if not allowed(held.state, report.state):
            message = f"the engine reported {report.state!r} for a job that is {held.state!r}"
            note = NewEvent("message", message, "warn")
            return Report(held.job.id, events=[*report.events, note])
        held.state = report.state
        return report

    def _record(self, reports: list[Report]) -> None:
        if not reports:
            return
        for job_id in self._store.record(merged(reports)):
            held = self._held.pop(job_id, None)
            if held is not None:
                logger.warning("another process has taken job %s; it is given up here", job_id)
                held.handle.cancel()

    def _finish(self, report: Report) -> None:
        """Store the metrics as a file, and then say that the job is finished."""
        held = self._held.get(report.job_id)
        if held is None:
            return  # its lease was lost
        folder = self._workspace.job_folder(report.job_id)
        try:
            stored = self._workspace.files.save(
                io.BytesIO(metrics_csv(folder / OUTPUT / "metrics.jsonl")),
                "step_metrics.csv",
                "fine-tune-results",
                owner=held.job.owner,
            )
            made = Artefact(RESULT, stored.id, stored.size, stored.sha256)
            report = replace(report, artefacts=[*report.artefacts, made])
        except (OSError, AnabranchError) as error:
            note = NewEvent("message", f"The metrics could not be stored: {error}", "warn")
            report = replace(report, events=[note, *report.events])
        self._record([report])
        self._held.pop(report.job_id, None)

    def _fail(self, job: Job, error: str) -> None:
        note = NewEvent("message", f"The job failed: {error}", "error")
        self._record([Report(job.id, "failed", error=error, events=[note])])


def merged(reports: Sequence[Report]) -> list[Report]:
    """The same in fewer reports: what a job says between two changes of state becomes one.

    A hundred steps that waited for the disk are one row to update and a hundred to insert.
    """
    groups: list[list[Report]] = []
    current: dict[str, list[Report]] = {}
    for report in reports:
        if report.state is not None or report.job_id not in current:
            current[report.job_id] = []
            groups.append(current[report.job_id])
        current[report.job_id].append(report)
    return [
        Report(
            group[0].job_id,
            group[0].state,
            next((r.progress for r in reversed(group) if r.progress is not None), None),
            next((r.error for r in reversed(group) if r.error is not None), None),
            [event for report in group for event in report.events],
            [artefact for report in group for artefact in report.artefacts],
        )
        for group in groups
    ]


def _from_here(progress: Mapping[str, Any]) -> dict[str, Any]:
    """When and where a stretch of running began."""
    return {"since": time.time(), "since_step": progress.get("step", 0)}
