"""Runs jobs as processes: what the command line does, one job after the other, with its history.

A job is paused by stopping its process, which leaves a checkpoint, and goes on by starting the same
command again. So does a job whose server was killed; its process dies with the server.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import AnabranchError
from anabranch.jobs.child import Child
from anabranch.jobs.kinds import JobKind, Terms
from anabranch.jobs.loop import JobLoop
from anabranch.jobs.records import Job, Level, NewEvent, Report
from anabranch.jobs.states import State
from anabranch.jobs.workspace import Workspace

logger = logging.getLogger("anabranch.jobs")

EVENT_SECONDS = 5.0
"""Between two events that only count something up. The job's progress follows at once."""


@dataclass
class _Held:
    """A job that this process runs."""

    job: Job
    kind: JobKind[Any]
    spec: Terms
    child: Child
    before: float
    """Seconds of earlier attempts."""
    attempt: int
    stop_for: State | None = None
    """What the job becomes when it has stopped; "running": it goes on elsewhere."""
    failure: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    noted: tuple[str, float] = ("", float("-inf"))


class CommandRunner(JobLoop):
    """Runs at most ``max_jobs`` jobs of these kinds at a time."""

    def __init__(
        self,
        workspace: Workspace,
        kinds: Mapping[str, JobKind[Any]],
        max_jobs: int = 1,
        poll_seconds: float = 0.5,
    ) -> None:
        super().__init__(workspace.jobs, kinds.keys(), logger, poll_seconds)
        self._workspace = workspace
        self._by_name = kinds
        self._max_jobs = max_jobs
        self._poked = threading.Event()
        self._held: dict[str, _Held] = {}

    def poke(self) -> None:
        """Look at the store now."""
        self._poked.set()

    def _collect(self, timeout: float) -> None:
        self._poked.wait(timeout)
        self._poked.clear()

    def _write(self) -> None:
        for held in list(self._held.values()):
            status = held.child.poll()
            self._tell(held)
            if status is not None:
                self._end(held, status)

    def _obey(self) -> None:
        wishes = self._store.wishes()
        for job_id, held in list(self._held.items()):
            job = wishes.get(job_id)
            if job is None:
                logger.warning("another process has taken job %s; it is given up here", job_id)
                held.child.kill()
                del self._held[job_id]
            elif job.wanted != "run":
                self._stop(held, "paused" if job.wanted == "pause" else "cancelled")
            elif held.stop_for is None and (why := held.child.overdrawn(held.before)):
                held.failure = why
                self._stop(held, "failed")

    def _fill(self) -> None:
        while not self._closing and len(self._held) < self._max_jobs:
            job = self._store.claim(self._kinds)
            if job is None:
                return
            try:
                kind = self._by_name[job.kind]
                self._begin(job, kind, kind.check(job.spec))
            except (AnabranchError, OSError) as error:
                self._fail(job, str(error))

    def _interrupt(self) -> None:
        """Checkpoints are written; in the store the jobs are still running, and so go on."""
        for held in self._held.values():
            self._stop(held, "running")
        for held in self._held.values():
            while held.child.poll() is None:
                time.sleep(0.05)

    def _begin(self, job: Job, kind: JobKind[Any], spec: Terms) -> None:
        folder = self._workspace.job_folder(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        attempt = job.progress.get("attempt", 0) + 1
        before = job.progress.get("seconds", 0.0)
        child = Child(kind.command(spec, folder), folder, spec.limits)
        held = _Held(job, kind, spec, child, before, attempt)
        held.progress = {**job.progress, "attempt": attempt}
        self._held[job.id] = held
        message = "Started" if attempt == 1 else f"Went on, attempt {attempt}"
        self._record(held, events=[NewEvent("message", message)], progress=held.progress)

    def _tell(self, held: _Held) -> None:
        """Put how far a job is into the store."""
        news = held.child.news()
        if not news:
            return
        newest = news[-1]
        held.progress |= newest | {"seconds": round(held.before + held.child.seconds, 1)}
        stages = [one for one in news if self._worth_an_event(held, one["message"])]
        events = [NewEvent("progress", one["message"], data=one) for one in stages]
        self._record(held, events=events, progress=held.progress)

    def _worth_an_event(self, held: _Held, message: str) -> bool:
        """A new stage is; what counts something up is now and then."""
        last, at = held.noted
        stage = re.sub(r"[0-9]+", "", message)
        if stage == last and time.monotonic() - at < EVENT_SECONDS:
            return False
        held.noted = stage, time.monotonic()
        return True

    def _stop(self, held: _Held, stop_for: State) -> None:
        if held.stop_for is None or stop_for == "cancelled":
            held.stop_for = stop_for
        held.child.stop()

    def _end(self, held: _Held, status: int) -> None:
        """The process has ended: say what that means."""
        folder = self._workspace.job_folder(held.job.id)
        held.progress["seconds"] = round(held.before + held.child.seconds, 1)
        if held.kind.succeeded(status, folder):
            self._finish(held, "succeeded", "Finished")
        elif held.stop_for == "failed":
            self._finish(held, "failed", held.failure, "error")
        elif held.stop_for == "running":
            del self._held[held.job.id]
            self._record(held, progress=held.progress, events=[NewEvent("message", "Interrupted")])
        elif held.stop_for is not None:
            self._finish(held, held.stop_for, f"{held.stop_for.capitalize()} on request")
        elif status < 0 and held.attempt <= held.spec.retries:
            del self._held[held.job.id]
            message = f"Killed by signal {-status}; trying again"
            self._record(held, events=[NewEvent("message", message, "warn")])
            again = self._store.get(held.job.id)
            self._begin(again, held.kind, held.spec)
        else:
            said = held.child.last_words() or "it said nothing"
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            self._finish(held, "failed", f"{said} ({how})", "error")

    def _finish(self, held: _Held, state: State, message: str, level: Level = "info") -> None:
        del self._held[held.job.id]
        folder = self._workspace.job_folder(held.job.id)
        made = [] if state == "paused" else list(held.kind.artefacts(folder))
        self._store.record(
            [
                Report(
                    held.job.id,
                    state,
                    progress=held.progress,
                    error=message if state == "failed" else None,
                    events=[NewEvent("message", message, level)],
                    artefacts=made,
                )
            ]
        )

    def _fail(self, job: Job, error: str) -> None:
        note = NewEvent("message", f"The job failed: {error}", "error")
        self._store.record([Report(job.id, "failed", error=error, events=[note])])

    def _record(self, held: _Held, events: list[NewEvent], progress: Any = None) -> None:
        """What another process has taken meanwhile is given up at the next look."""
        self._store.record([Report(held.job.id, progress=progress, events=events)])
