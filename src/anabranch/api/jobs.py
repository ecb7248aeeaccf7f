"""Jobs as the HTTP interface takes and shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from anabranch.api.fine_tuning.queries import Cursor, Integer
from anabranch.jobs import Artefact, Event, Job

State = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class JobRequest(BaseModel):
    """``POST /v1/jobs``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = Field(
        min_length=1,
        max_length=32,
        description="finetune, federate, evaluate, merge, or a plug-in.",
    )
    spec: dict[str, Any] = Field(
        description="finetune: `recipe` (YAML, or the name of a built-in one) and `overrides`; "
        "federate: `job` (YAML) and `overrides`; evaluate: `claims` and `seed`; merge: `base`, "
        "`adapter` (a folder) and `model`. All: `retries`, "
        "`limits` (`seconds`, `memory_mb`, `threads`), `metadata`."
    )
    priority: int = Field(0, ge=-1000, le=1000, description="Higher ones run first.")


class JobsQuery(BaseModel):
    """``GET /v1/jobs``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = Field("", max_length=32)
    state: State | None = None
    after: Cursor = Field("", description="The id of the last job of the page before.")
    limit: Integer = Field(20, ge=1, le=1000)


class ArtefactItem(BaseModel):
    """A file or folder that a job made; the digest of a folder is empty."""

    name: str
    size: int
    sha256: str


class ArtefactItems(BaseModel):
    """What a job has made, by name."""

    object: Literal["list"]
    data: list[ArtefactItem]


class JobView(BaseModel):
    """A job. Times are seconds since 1970."""

    id: str
    object: Literal["job"]
    kind: str
    name: str
    state: State
    wanted: Literal["run", "pause", "cancel"]
    priority: int
    spec: dict[str, Any]
    progress: dict[str, Any]
    error: str | None
    created: float
    started: float | None
    finished: float | None
    artefacts: list[ArtefactItem]


class JobViews(BaseModel):
    """A page of jobs, newest first."""

    object: Literal["list"]
    data: list[JobView]
    has_more: bool


def job_view(job: Job, made: dict[str, Artefact]) -> dict[str, Any]:
    """A job, without whom it belongs to and who runs it."""
    shown = ("id", "kind", "name", "state", "wanted", "priority", "error")
    return {
        "object": "job",
        **{name: getattr(job, name) for name in shown},
        "spec": dict(job.spec),
        "progress": dict(job.progress),
        **{name: getattr(job, name) for name in ("created", "started", "finished")},
        "artefacts": [artefact_view(one) for one in made.values()],
    }


def artefact_view(made: Artefact) -> dict[str, Any]:
    """An artefact, without where it lies."""
    return {"name": made.name, "size": made.size, "sha256": made.sha256}


def event_view(event: Event) -> dict[str, Any]:
    """Something that happened to a job."""
    shown = ("job_id", "sequence", "time", "level", "kind", "message")
    return {**{name: getattr(event, name) for name in shown}, "data": dict(event.data)}
