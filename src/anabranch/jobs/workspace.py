"""One folder with everything that outlives a server: the job store, the files, the jobs' output."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from anabranch.errors import ConfigurationError
from anabranch.jobs import database
from anabranch.jobs.errors import UnknownJob
from anabranch.jobs.files import ABANDONED_SECONDS, MAX_BYTES, FileStore
from anabranch.jobs.store import JobStore


@dataclass(frozen=True)
class Workspace:
    """::

    <folder>/jobs.sqlite   the store, unless it has a URL of its own
    <folder>/files/        uploads and results, named by id
    <folder>/jobs/<id>/    what a job reads and writes
    """

    folder: Path
    jobs: JobStore
    files: FileStore

    @classmethod
    def open(
        cls,
        folder: Path,
        jobs_url: str | None = None,
        *,
        max_file_bytes: int = MAX_BYTES,
        lease_seconds: float = 30.0,
    ) -> Workspace:
        """Make or open one. Raises :class:`ConfigurationError` if it cannot be used."""
        try:
            url = jobs_url or database.sqlite_url(folder / "jobs.sqlite")
            jobs = JobStore(url, lease_seconds=lease_seconds)
            files = FileStore(jobs.engine, folder / "files", max_file_bytes)
            files.sweep()
            workspace = cls(folder, jobs, files)
            workspace._sweep()
        except OSError as error:
            raise ConfigurationError(
                f"cannot keep jobs in {folder}: {error}; choose another folder with --state"
            ) from error
        return workspace

    def job_folder(self, job_id: str) -> Path:
        """Where a job's data and results lie; not made yet for a new one."""
        return self.folder / "jobs" / job_id

    def close(self) -> None:
        """Drop the database's connections."""
        self.jobs.close()

    def _sweep(self) -> None:
        """Delete folders of jobs that a crash prevented from ever being created."""
        if not (parent := self.job_folder("any").parent).is_dir():
            return
        for folder in parent.iterdir():
            if folder.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                try:
                    self.jobs.get(folder.name)
                except UnknownJob:
                    shutil.rmtree(folder, ignore_errors=True)
