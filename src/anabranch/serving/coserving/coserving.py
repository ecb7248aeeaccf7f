"""Fine-tuning inside the engine's step.

The engine calls, in this order: :meth:`CoServing.extend` with the inference plan, ``computed`` or
``failed`` for each forward window, and :meth:`CoServing.work` once tokens are sampled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from anabranch.errors import ConfigurationError
from anabranch.planning import CostModel
from anabranch.serving.batch import StepPlan
from anabranch.serving.coserving.job import FinetuneJob, JobHandle, Listener
from anabranch.serving.coserving.pages import PagePool
from anabranch.serving.coserving.passes import Pass
from anabranch.serving.coserving.running import Publish, RunningJob
from anabranch.serving.coserving.share import SMALLEST, Allowance, ShareModel
from anabranch.serving.runner import DifferentiableRunner, ModelRunner
from anabranch.serving.sequence import Segment, Sequence

WAIT_SECONDS = 0.002
"""Between two looks at a disk that is being written to, while there is nothing else to do."""


@dataclass
class FinetuneStatistics:
    """Totals since the engine started. A token counts once its gradients are complete."""

    tokens: int = 0
    units: int = 0
    seconds: float = 0.0


class CoServing:
    """The jobs of one engine. Used on the engine's thread only, but for :meth:`prepare`.

    ``target`` is the time between two tokens of a stream in seconds, or None (see
    :class:`~.share.Allowance`). ``publish`` is called with a job and a folder and must see to it
    that :meth:`RunningJob.published` is called on the engine's thread.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: PagePool,
        step_cost: CostModel,
        clock: Callable[[], float],
        publish: Publish,
        target: float | None = None,
    ) -> None:
        self.statistics = FinetuneStatistics()
        self.publish = publish
        self.jobs: list[RunningJob] = []
        self._runner, self._pool, self._clock = runner, pool, clock
        self._share = ShareModel(step_cost)
        self._allowance = Allowance(target)
        self._able: list[tuple[RunningJob, Pass]] = []
        self._owners: dict[Sequence, tuple[RunningJob, Pass]] = {}
        self._windows: dict[RunningJob, int] = {}
        self._began = self._seconds = 0.0
        self._inference: float | None = None
        self._trained = False  # in this step

    def prepare(self, job: FinetuneJob, listener: Listener | None = None) -> RunningJob:
        """Set a job up, on any thread; :meth:`add` lets it begin.

        Raises an :class:`AnabranchError` if the job can never run here.
        """
        if not isinstance(self._runner, DifferentiableRunner):
            raise ConfigurationError(
                f"{type(self._runner).__name__} cannot train adapters; use `anabranch finetune`"
            )
        handle = JobHandle(job, listener)
        return RunningJob(
            handle, self._runner, self._pool, lambda job, folder: self.publish(job, folder)
        )

    def add(self, job: RunningJob) -> None:
        """Let a prepared job work. It has no claim to the past that others were alone in."""
        job.work = min((other.work for other in self.jobs), default=0.0)
        self.jobs.append(job)

    def has_work(self) -> bool:
        """Whether a job could compute now, or waits for a disk; jobs obey their submitters here."""
        self._able = []
        for job in sorted(self.jobs, key=lambda job: job.work):
            work = job.ready()
            if work is not None:
                self._able.append((job, work))
        self.jobs = [job for job in self.jobs if not job.finished]
        return bool(self._able) or any(job.waiting for job in self.jobs)

    def extend(self, plan: StepPlan | None, page_size: int) -> StepPlan | None:
        """Add forward windows to the inference plan of a step; None if it remains empty."""
        self._began = self._clock()
        self._inference = self._share.step_seconds(plan)
        self._seconds = self._allowance.seconds(self._inference)
        self._owners, self._windows = {}, {}
        if not self.has_work():
            return plan
        for job, work in self._able:
            if work.phase == "forward":
                rows = self._share.forward_rows(plan, self._seconds, work)
                if not rows and plan is None:
                    rows = min(SMALLEST, work.left)  # it must go on where nothing else is done
                segments = tuple(work.segments(rows))
                if segments:
                    self._owners |= {segment.sequence: (job, work) for segment in segments}
                    self._windows[job] = rows
                    plan = _with(plan, segments, page_size)
        return plan

    def computed(self, segment: Segment) -> None:
        """A forward window is in the cache, and recorded."""
        job, work = self._owners[segment.sequence]
        if not job.finished:
            work.computed(segment)

    def failed(self, sequence: Sequence, error: BaseException) -> None:
        """A forward window could not be computed."""
        job, _ = self._owners[sequence]
        job.fail(error)

    def work(self, num_tokens: int) -> None:
        """Fill what is left of the step with units. ``num_tokens`` is the size of its batch."""
        forward = self._clock() - self._began
        for job, rows in self._windows.items():
            job.spend(forward * rows / num_tokens)
        self._trained = bool(self._windows)
        waiting = {job: work for job, work in self._able if not work.done}
        while waiting:
            job = min(waiting, key=lambda each: each.work)  # the furthest behind its share
            if not self._unit(job, waiting[job]):
                del waiting[job]
        for job, _ in self._able:
            job.settle()
        passed = self._clock() - self._began
        fine_tuning = passed - forward * (1 - sum(self._windows.values()) / max(1, num_tokens))
        self.statistics.seconds += fine_tuning
        self._allowance.used(self._inference, fine_tuning, passed)
        if self._inference is None and not self._trained:
            time.sleep(WAIT_SECONDS)

    def _unit(self, job: RunningJob, work: Pass) -> bool:
        """Run a head window or a backward unit, if one fits into the step."""
        if job.finished or work.done or work.idle or work.phase == "forward":
            return False
        began = self._clock()
        passed = began - self._began
        most = 0.0
        if not self._trained:
            most = math.inf if self._inference is None else self._allowance.most(self._inference)
        rows = self._share.unit_rows(work, self._seconds - passed, most - passed)
        if not rows:
            return False
        phase, left, tokens = work.phase, work.left, work.tokens
        try:
            work.unit(rows)
        except Exception as error:  # a defect in an adapter's code must not stop the engine
            job.fail(error)
            return False
        seconds = self._clock() - began
        self._share.observe(phase, min(rows, left), left, seconds)
        job.spend(seconds)
        self.statistics.units += 1
        self._trained = True
        self.statistics.tokens += work.tokens - tokens
        return True


def _with(plan: StepPlan | None, segments: tuple[Segment, ...], page_size: int) -> StepPlan:
    if plan is None:
        return StepPlan(segments, page_size)
    return replace(plan, segments=plan.segments + segments)
