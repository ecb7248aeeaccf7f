"""What people and programs do with jobs: submit, look, steer. The command line and HTTP use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch import registry
from anabranch.errors import UnknownName
from anabranch.jobs.kinds import JobKind
from anabranch.jobs.layout import LOG
from anabranch.jobs.records import Job, NewEvent, Wanted
from anabranch.jobs.runner import CommandRunner
from anabranch.jobs.workspace import Workspace


class Jobs:
    """The jobs of one workspace. With an ``owner`` a caller sees and steers its own only."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.store = workspace.jobs
        self.kinds: dict[str, JobKind[Any]] = {
            name: kind() for name, kind in registry.available("jobs").items()
        }

    def runner(self, max_jobs: int = 1) -> CommandRunner:
        """What runs them, in this process."""
        return CommandRunner(self.workspace, self.kinds, max_jobs)

    def submit(
        self,
        kind: str,
        spec: Mapping[str, Any],
        *,
        priority: int = 0,
        owner: str | None = None,
    ) -> Job:
        """Check a spec and queue the job. Raises :class:`UnknownName`, :class:`ConfigurationError`.

        What is stored is what was given, checked again when it runs: a later version of the program
        may know more options.
        """
        if kind not in self.kinds:
            raise UnknownName("kind of job", kind, self.kinds)
        checked = self.kinds[kind].check(spec)
        return self.store.create(
            kind,
            spec,
            name=self.kinds[kind].title(checked)[:255],
            priority=priority,
            owner=owner,
            notes=[NewEvent("message", "Queued")],
        )

    def ask(self, job_id: str, wanted: Wanted, owner: str | None = None) -> Job:
        """Pause a job, let it go on, or give it up. It is obeyed by whoever runs it."""
        return self.store.ask(job_id, wanted, owner)

    def log(self, job_id: str, owner: str | None = None, last_bytes: int | None = None) -> str:
        """What its process said, or the end of that; empty for one that has not begun."""
        path = self._folder(job_id, owner) / LOG
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                file.seek(max(0, size - last_bytes) if last_bytes else 0)
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def _folder(self, job_id: str, owner: str | None) -> Path:
        return self.workspace.job_folder(self.store.get(job_id, owner).id)
