"""What a runtime is, and what it tells the coordinator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anabranch.federated.messages import Reply, Task
from anabranch.federated.node import Agreement
from anabranch.federated.result import Clock


@dataclass(frozen=True)
class Arrived:
    """A reply came."""

    reply: Reply


@dataclass(frozen=True)
class Lost:
    """A task will not be replied to: the client could not be reached, or lost it."""

    task: int
    reason: str


@dataclass(frozen=True)
class Fired:
    """A timer is due."""

    timer: int


@dataclass(frozen=True)
class ClientJoined:
    """A client is there, with so many examples as it says."""

    client: str
    examples: int


@dataclass(frozen=True)
class ClientLeft:
    """A client is gone."""

    client: str


Input = Arrived | Lost | Fired | ClientJoined | ClientLeft
_KINDS = {kind.__name__: kind for kind in (Lost, Fired, ClientJoined, ClientLeft)}


@dataclass(frozen=True)
class Timed:
    """An input and its time, in seconds since the run began. Never less than the one before."""

    at: float
    input: Input

    def to_tree(self) -> dict[str, Any]:
        """For the journal."""
        values = vars(self.input)
        if isinstance(self.input, Arrived):
            values = vars(self.input.reply)
        return {"at": self.at, "kind": type(self.input).__name__, "values": dict(values)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Timed:
        """What :meth:`to_tree` gave."""
        if tree["kind"] == Arrived.__name__:
            return cls(tree["at"], Arrived(Reply(**tree["values"])))
        return cls(tree["at"], _KINDS[tree["kind"]](**tree["values"]))


class Runtime(ABC):
    """Carries tasks to clients and brings back what happens.

    A runtime keeps nothing that the coordinator does not know: after a crash it is given the tasks
    and timers again. ``clock`` says whose time :meth:`next_input` tells.
    """

    clock: ClassVar[Clock] = "real"

    @abstractmethod
    def open(self, agreement: Agreement, resumed: float | None = None) -> None:
        """Begin a run, or go on with one at ``resumed`` seconds of it."""

    @abstractmethod
    def clients(self) -> Mapping[str, int]:
        """Clients that are there, with the examples that they declare."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Send a task; returns at once."""

    def recall(self, task: Task) -> None:
        """After a crash: nobody waits for this task, but its reply may still be under way."""

    @abstractmethod
    def set_timer(self, at: float, timer: int) -> None:
        """Tell when it is that time."""

    @abstractmethod
    def next_input(self) -> Timed | None:
        """Wait for what happens next; None if nothing ever will."""

    def finish(self, reason: str) -> None:
        """The run is over for good, and not only interrupted: tell clients that wait for tasks."""

    def close(self) -> None:
        """Let go of everything."""
