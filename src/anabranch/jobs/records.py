"""What the store hands out and takes in. Times are seconds since 1970, UTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from anabranch.jobs.states import State

Item = TypeVar("Item")

Level = Literal["info", "warn", "error"]
Wanted = Literal["run", "pause", "cancel"]


@dataclass(frozen=True)
class Job:
    """A job as it stands.

    ``target`` is what a process must have to run it (for fine-tuning: the base model's name) and
    ``name`` what it makes or does; ``owner`` is a digest of the API key that created it. ``wanted``
    is what was asked of the job last, which its process reads. ``lease`` names that process; a job
    has one while it is running, and may keep it while it is paused.
    """

    id: str
    kind: str
    spec: Mapping[str, Any]
    state: State
    created: float
    target: str = ""
    name: str = ""
    owner: str | None = None
    priority: int = 0
    wanted: Wanted = "run"
    progress: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    started: float | None = None
    finished: float | None = None
    lease: str | None = None
    beat: float | None = None


@dataclass(frozen=True)
class NewEvent:
    """Something to note about a job. ``kind`` is a word for programs, ``message`` for people."""

    kind: str
    message: str
    level: Level = "info"
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float | None = None
    """None: when it is written."""


@dataclass(frozen=True)
class Event:
    """The ``sequence``-th thing noted about a job, from 1 without gaps."""

    job_id: str
    sequence: int
    time: float
    level: Level
    kind: str
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Artefact:
    """A file or folder that a job made. A folder's ``size`` is its files', its digest is empty.

    ``path`` is where it lies, in the job's folder, or the id of a file of the store.
    """

    name: str
    path: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Report:
    """What the process that holds a job's lease has to say; None leaves a field as it is."""

    job_id: str
    state: State | None = None
    progress: Mapping[str, Any] | None = None
    error: str | None = None
    events: Sequence[NewEvent] = ()
    artefacts: Sequence[Artefact] = ()


@dataclass(frozen=True)
class Page(Generic[Item]):
    """Some of a list, and whether more follow."""

    items: Sequence[Item]
    has_more: bool
