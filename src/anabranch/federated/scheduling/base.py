"""What a schedule is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from anabranch.federated.events import Action, Event
from anabranch.federated.messages import Task
from anabranch.federated.server import Update
from anabranch.federated.timeline import Timeline


class View(Protocol):
    """What a schedule may ask of the federation. All of it is the same in a resumed run."""

    @property
    def version(self) -> int:
        """Commits so far."""

    @property
    def clients(self) -> Sequence[str]:
        """Clients that are there, sorted."""

    @property
    def in_flight(self) -> Mapping[int, Task]:
        """Tasks whose reply is awaited, by id."""

    def now(self) -> float:
        """Seconds since the run began: the time of the event being handled."""

    def held(self, group: str | None = None) -> int:
        """Updates that wait for a commit, of one group or all."""

    def busy(self, client: str) -> bool:
        """Whether a task of this client is under way."""

    def rng(self, *words: int | str) -> np.random.Generator:
        """A generator for one purpose; the same words give the same numbers."""


class Schedule(ABC):
    """A dataclass: fields with ``init=True`` are options, the others state."""

    @abstractmethod
    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """What to do now. Actions are carried out in order, before the next event."""

    def group(self, update: Update) -> str:
        """Under which name an update waits; :class:`Commit` may name some groups only."""
        return ""

    def admits(self, update: Update) -> bool:
        """Whether an update still counts; if not, :class:`Failed` follows."""
        return True

    def timeline(self) -> Timeline | None:
        """Who worked when, for schedules whose groups are worth a look."""
        return None

    def settings(self) -> dict[str, Any]:
        """The options as JSON values."""
        options = {f.name: getattr(self, f.name) for f in self._fields() if f.init}
        plain = {
            name: repr(value) if dataclasses.is_dataclass(value) else value
            for name, value in options.items()
        }
        return {"schedule": type(self).__name__, **plain}

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {f.name: getattr(self, f.name) for f in self._fields() if not f.init}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        for name, value in state.items():
            setattr(self, name, value)

    def _fields(self) -> tuple[dataclasses.Field[Any], ...]:
        return dataclasses.fields(self)  # type: ignore[arg-type]
