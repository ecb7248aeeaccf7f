"""Long work as the Jobs page sees it, whatever it is.

A kind of job is one :class:`ConsoleKind`: what its form asks, how a request becomes a job, and how
a job is shown. The page knows nothing else, so that another kind needs no page.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

import yaml

from anabranch.console.live import Topic, Unwatch
from anabranch.console.text import seconds_text
from anabranch.errors import InvalidRequest
from anabranch.jobs import FINISHED, Artefact, Event, State

Points = Sequence[tuple[float, float]]
Action = Literal["pause", "resume", "cancel"]


@dataclass(frozen=True)
class Field:
    """One question of a form.

    ``key`` is its dotted place in the request, as in the YAML and in error messages. ``kind``
    ``file`` is an uploaded file's id, ``choice`` one of ``choices`` (value -> what is shown),
    ``long`` a text of many lines, ``lines`` a list with one entry a line.
    """

    key: str
    label: str
    kind: Literal["text", "number", "choice", "file", "long", "lines"] = "text"
    hint: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)
    required: bool = False


@dataclass(frozen=True)
class JobRow:
    """A job in a list. ``fraction`` is how much is done, 0 to 1; times are seconds since 1970."""

    id: str
    kind: str
    title: str
    state: State
    created: float
    fraction: float | None = None
    steps: str = ""
    loss: float | None = None
    finish: float | None = None
    """When it will probably be done."""

    @property
    def progress(self) -> str:
        """Steps, loss and what is left of the time, as one line."""
        if not self.steps:
            return "" if self.state in FINISHED else "waiting for its turn"
        parts = [self.steps]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.finish is not None:
            parts.append(f"about {seconds_text(max(0.0, self.finish - time.time()))} left")
        return " · ".join(parts)

    @property
    def actions(self) -> list[Action]:
        """What can be asked of it now."""
        if self.state in FINISHED:
            return []
        return ["resume", "cancel"] if self.state == "paused" else ["pause", "cancel"]


@dataclass(frozen=True)
class JobReport:
    """Everything that a job's own page shows. ``curves`` are losses by name, over ``axis``."""

    row: JobRow
    facts: Mapping[str, str]
    curves: Mapping[str, Points]
    events: Sequence[Event]
    """Newest first."""
    error: str | None = None
    model: str | None = None
    """The name under which the result answers now."""
    axis: str = "step"
    artefacts: Sequence[Artefact] = ()
    """Files and folders that it has made."""
    log: str = ""
    """The end of what its process said."""


@dataclass(frozen=True)
class UploadedFile:
    """A file that a job may use."""

    id: str
    name: str
    size: int
    created: float


class ConsoleKind(ABC):
    """A kind of job. Every method may block: pages call them in a thread.

    ``owner`` is whose jobs and files are meant: with one, nobody else's are found.
    """

    name: str
    title: str
    example: str
    """A request as YAML, to begin with."""
    explanation: str = ""
    """What the form begins with."""
    refusal: str = ""
    """Why nobody can create such jobs here; empty if they can."""

    def __init__(self) -> None:
        self._topics: dict[tuple[str | None, str | None], Topic[Any]] = {}

    @abstractmethod
    def fields(self, owner: str | None) -> Sequence[Field]:
        """What the form asks."""

    @abstractmethod
    def check(self, request: Mapping[str, Any]) -> None:
        """Raise :class:`InvalidRequest`, with the field's place, for what can be seen at once."""

    @abstractmethod
    def problems(self, request: Mapping[str, Any]) -> Mapping[str, str]:
        """All that :meth:`check` could find, by the field's place; empty for a good request."""

    @abstractmethod
    def create(self, request: Mapping[str, Any], owner: str | None) -> str:
        """Queue a job; returns its id. Raises :class:`AnabranchError`, and then there is none."""

    @abstractmethod
    def rows(self, owner: str | None) -> Sequence[JobRow]:
        """The newest jobs, newest first."""

    @abstractmethod
    def report(self, job_id: str, owner: str | None) -> JobReport:
        """One job; :class:`UnknownJob` if there is none."""

    @abstractmethod
    def ask(self, job_id: str, action: Action, owner: str | None) -> None:
        """Pause, resume or cancel it. Raises :class:`ForbiddenTransition`."""

    def watch_rows(self, owner: str | None, watcher: Callable[[Sequence[JobRow]], None]) -> Unwatch:
        """Show a list as it changes; all tabs of an owner share the reading."""
        topic = self._topic((owner, None), lambda: self.rows(owner))
        return topic.watch(watcher)

    def watch_report(
        self, job_id: str, owner: str | None, watcher: Callable[[JobReport], None]
    ) -> Unwatch:
        """Show a job as it goes on; all tabs of an owner share the reading."""
        topic = self._topic((owner, job_id), lambda: self.report(job_id, owner))
        return topic.watch(watcher)

    def _topic(self, key: tuple[str | None, str | None], read: Callable[[], Any]) -> Topic[Any]:
        self._topics = {k: topic for k, topic in self._topics.items() if topic.watched}
        if key not in self._topics:
            self._topics[key] = Topic(lambda: asyncio.to_thread(read))
        return self._topics[key]


class TakesFiles(ConsoleKind):
    """A kind whose jobs use files that people upload."""

    @abstractmethod
    def files(self, owner: str | None) -> Sequence[UploadedFile]:
        """Uploads that a job of this kind may use, newest first."""

    @abstractmethod
    def upload(self, content: BinaryIO, name: str, owner: str | None) -> UploadedFile:
        """Keep a file, or raise what is wrong with it: then it is not kept."""


def read_yaml(text: str) -> dict[str, Any]:
    """A request written as YAML. Raises :class:`InvalidRequest` with line and column."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InvalidRequest("YAML", f"{where}{getattr(error, 'problem', error)}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("YAML", "must be keys with values, for example model: smollm2")
    return value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``; empty values are left out."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        if value in (None, ""):
            continue
        *parents, last = key.split(".")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return made


def write_yaml(request: Mapping[str, Any]) -> str:
    """A request as the YAML that :func:`read_yaml` reads."""
    return str(yaml.dump(dict(request), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """Texts of many lines are written as they are."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
