"""What people and programs do with jobs: submit, look, steer. The command line and HTTP use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch import registry
from anabranch.downloads import Download
from anabranch.errors import UnknownName, did_you_mean
from anabranch.jobs.errors import UnknownArtefact, UnknownFile, UnknownJob
from anabranch.jobs.kinds import JobKind
from anabranch.jobs.layout import LOG
from anabranch.jobs.records import Artefact, Job, NewEvent, Wanted
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

    def kind(self, name: str) -> JobKind[Any]:
        """One kind; :class:`UnknownName` lists those that there are."""
        if name not in self.kinds:
            raise UnknownName("kind of job", name, self.kinds)
        return self.kinds[name]

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
        checked = self.kind(kind).check(spec)
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

    def artefacts(self, job_id: str, owner: str | None = None) -> list[Artefact]:
        """What a job has made, by name."""
        job = self.store.get(job_id, owner)
        made = self.store.artefacts(job.id)[job.id]
        return [made[name] for name in sorted(made)]

    def download(self, job_id: str, name: str, owner: str | None = None) -> Download:
        """An artefact, or with a slash behind its name a file inside one that is a folder.

        A folder becomes an archive. Raises :class:`UnknownArtefact` for everything that the job has
        not made or that lies outside its folder.
        """
        made = {one.name: one for one in self.artefacts(job_id, owner)}
        first, _, inside = name.partition("/")
        if first not in made:
            listed = ", ".join(made) or "nothing yet"
            raise UnknownArtefact(
                f"job {job_id} has made no {first[:100]!r}{did_you_mean(first, made)}; it made "
                f"{listed}"
            )
        artefact = made[first]
        try:
            file = self.workspace.files.get(artefact.path)
        except UnknownFile:
            path = self._inside(job_id, Path(artefact.path), inside)
        else:
            return Download(self.workspace.files.path(file), file.filename, file.size, file.sha256)
        if path is None:
            raise UnknownArtefact(f"job {job_id} has no file {name[:200]!r} among its artefacts")
        if not inside and artefact.sha256 and path.stat().st_size == artefact.size:
            return Download(path, artefact.name, artefact.size, artefact.sha256)
        return Download.of(path, None if inside else artefact.name)

    def may_read(self, path: Path, owner: str | None) -> bool:
        """False for what lies in the folder of a job that the owner may not see."""
        jobs = self.workspace.job_folder("any").parent.resolve()
        try:
            inside = path.resolve().relative_to(jobs)
        except ValueError:
            return True
        try:
            self.store.get(inside.parts[0], owner)
        except UnknownJob:
            return False
        return True

    def _inside(self, job_id: str, artefact: Path, inside: str) -> Path | None:
        """A place in an artefact that is there and in the job's folder, links followed."""
        folder = self.workspace.job_folder(job_id).resolve()
        try:
            root = artefact.resolve(strict=True)
            path = (root / inside).resolve(strict=True)
        except (OSError, ValueError):  # not there, too long, a zero byte
            return None
        return path if path.is_relative_to(root) and root.is_relative_to(folder) else None

    def _folder(self, job_id: str, owner: str | None) -> Path:
        return self.workspace.job_folder(self.store.get(job_id, owner).id)
