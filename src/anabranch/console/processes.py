"""Jobs that run as processes of the server's machine, on the Jobs page: recipes, federations, ...

One class serves every kind: the form follows from the kind's spec, and what is wrong from its own
check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from anabranch.api.body import problems
from anabranch.api.service import Service
from anabranch.console.curves import read_curves
from anabranch.console.jobs import Action, ConsoleKind, Field, JobReport, JobRow
from anabranch.console.text import seconds_text
from anabranch.errors import AnabranchError, InvalidRequest
from anabranch.jobs import Job
from anabranch.jobs.kinds import JobKind, Terms
from anabranch.jobs.layout import OUTPUT, RESULT
from anabranch.jobs.records import Wanted
from anabranch.jobs.service import Jobs

EVALUATE = "evaluate"
SHOWN_JOBS = 100
SHOWN_EVENTS = 200
LOG_BYTES = 20_000
REFUSAL = (
    "This server takes no such jobs from clients, because their processes may read what it can "
    "read. Start it with --run-jobs to allow that."
)

_WANTED: Mapping[Action, Wanted] = {"pause": "pause", "resume": "run", "cancel": "cancel"}
_LABELS = {
    "limits.seconds": "Seconds at most",
    "limits.memory_mb": "MiB of memory at most",
    "limits.threads": "Threads",
}
_HINTS = {
    "retries": "New attempts after the process was killed.",
    "overrides": "key=value, one a line.",
    "claims": "Ids (S46) or names, one a line.",
}


class Processes(ConsoleKind):
    """The jobs of one kind of :attr:`anabranch.jobs.service.Jobs.kinds`."""

    def __init__(self, service: Service, jobs: Jobs, kind: JobKind[Any]) -> None:
        super().__init__()
        self._service = service
        self._jobs = jobs
        self._kind = kind
        self.name = kind.name
        self.title = kind.heading or kind.name.capitalize()
        self.example = kind.example
        self.explanation = (kind.spec.__doc__ or "").replace("``", "")
        self.refusal = "" if service.options.run_jobs else REFUSAL

    def fields(self, owner: str | None) -> Sequence[Field]:
        """One for each text, number and list of the spec, the kind's own first."""
        found = _fields(self._kind.spec)
        return sorted(found, key=lambda field: field.key.partition(".")[0] in Terms.model_fields)

    def check(self, request: Mapping[str, Any]) -> None:
        """The spec, and what the kind knows of the recipe, job or claims in it."""
        for field, problem in self.problems(request).items():
            raise InvalidRequest(field, problem)

    def problems(self, request: Mapping[str, Any]) -> Mapping[str, str]:
        """What the kind refuses although every field is of its type is about its first field."""
        if found := problems(dict(request), self._kind.spec):
            return found
        try:
            self._kind.check(request)
        except AnabranchError as error:
            return {self.fields(None)[0].key: str(error)}
        return {}

    def create(self, request: Mapping[str, Any], owner: str | None) -> str:
        """Queue it; refused where clients may not start processes."""
        if self.refusal:
            raise InvalidRequest("kind", self.refusal)
        self.check(request)
        job = self._jobs.submit(self.name, request, owner=owner)
        self._service.poke_jobs()
        return job.id

    def rows(self, owner: str | None) -> Sequence[JobRow]:
        """The newest :data:`SHOWN_JOBS`."""
        page = self._jobs.store.find(self.name, owner=owner, limit=SHOWN_JOBS)
        return [_row(job) for job in page.items]

    def report(self, job_id: str, owner: str | None) -> JobReport:
        """One job with its newest events, the end of its log and what it has made."""
        store = self._jobs.store
        job = store.get(job_id, owner, kind=self.name)
        folder = self._jobs.workspace.job_folder(job.id)
        facts = _facts(job) | _verdicts(folder / RESULT)
        try:
            axis, curves = read_curves(folder / OUTPUT)
        except AnabranchError as error:
            axis, curves = "step", {}
            facts["Loss"] = f"cannot be read: {error}"
        return JobReport(
            row=_row(job),
            facts=facts,
            curves=curves,
            axis=axis,
            events=store.events(job.id, limit=SHOWN_EVENTS, descending=True).items,
            error=job.error,
            artefacts=list(store.artefacts(job.id)[job.id].values()),
            log=self._jobs.log(job.id, owner, LOG_BYTES),
        )

    def ask(self, job_id: str, action: Action, owner: str | None) -> None:
        """Whoever runs it obeys; the page shows when that has happened."""
        job = self._jobs.store.get(job_id, owner, kind=self.name)
        self._jobs.ask(job.id, _WANTED[action], owner)
        self._service.poke_jobs()


def _fields(section: type[BaseModel], inside: str = "") -> Iterator[Field]:
    for name, info in section.model_fields.items():
        key, annotation = f"{inside}{name}", info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _fields(annotation, f"{key}.")
        elif (kind := _field_kind(annotation)) is not None:  # the rest can be said in YAML
            label = _LABELS.get(key, name.replace("_", " ").capitalize())
            hint = _HINTS.get(key, "")
            yield Field(key, label, kind, hint, required=info.is_required())


def _field_kind(annotation: Any) -> Literal["long", "lines", "number"] | None:
    if get_origin(annotation) is list:
        return "lines" if get_args(annotation) == (str,) else None
    types = {annotation}
    if get_origin(annotation) in (Union, UnionType):
        types = set(get_args(annotation)) - {type(None)}
    if types == {str}:
        return "long"
    return "number" if types and types <= {int, float} else None


def _row(job: Job) -> JobRow:
    return JobRow(
        id=job.id,
        kind=job.kind,
        title=job.name,
        state=job.state,
        created=job.created,
        fraction=job.progress.get("fraction"),
        steps=job.progress.get("message", ""),
    )


def _facts(job: Job) -> dict[str, str]:
    facts = {}
    if (seconds := job.progress.get("seconds")) is not None:
        facts["Running time"] = seconds_text(seconds)
    if (attempt := job.progress.get("attempt", 0)) > 1:
        facts["Attempt"] = str(attempt)
    return facts


def _verdicts(result: Path) -> dict[str, str]:
    """Of the claims that a process has measured so far; empty for one that prints no such lines."""
    found = {}
    try:
        lines = result.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            value = json.loads(line)
            found[str(value["id"])] = str(value["verdict"])
        except (ValueError, TypeError, KeyError):
            continue  # other kinds print what they like
    return found
