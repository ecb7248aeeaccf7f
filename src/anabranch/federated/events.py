"""What a schedule hears, and what it may answer.

A schedule decides from these alone. It never sees bytes, clocks or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.federated.messages import UNSPECIFIED, Work


@dataclass(frozen=True)
class Started:
    """The run begins; the clients that are there are in ``fed.clients``."""


@dataclass(frozen=True)
class Replied:
    """A client's reply was accepted and is held for the next commit of its group."""

    client: str
    task: int
    kind: str
    units: float
    """Work that the task took, as the client says."""
    sent: float
    """When the task was sent, in seconds of the run."""


@dataclass(frozen=True)
class Failed:
    """A task is over without a usable reply: refused, lost, too late, or its client left."""

    client: str
    task: int
    kind: str
    what: str


@dataclass(frozen=True)
class TimerFired:
    """A timer of :class:`SetTimer` is due."""

    tag: str


@dataclass(frozen=True)
class Committed:
    """There is a new version."""

    version: int


@dataclass(frozen=True)
class RoundEmpty:
    """A commit failed for want of usable updates; they are dropped, the version is the same."""

    reason: str


@dataclass(frozen=True)
class Joined:
    """A client came, or came back."""

    client: str


@dataclass(frozen=True)
class Left:
    """A client went. :class:`Failed` came before for each of its tasks."""

    client: str


Event = Started | Replied | Failed | TimerFired | Committed | RoundEmpty | Joined | Left


@dataclass(frozen=True)
class Send:
    """Give a client a task. After ``deadline`` (seconds of the run) it counts as failed."""

    client: str
    kind: str = "train"
    work: Work = UNSPECIFIED
    deadline: float | None = None


@dataclass(frozen=True)
class Commit:
    """Make a new version of the updates held in these groups; None: of all."""

    groups: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SetTimer:
    """Ask for a :class:`TimerFired` at this time (seconds of the run; at once if it is past)."""

    at: float
    tag: str


@dataclass(frozen=True)
class Cancel:
    """Do not wait for a task; its reply will be ignored."""

    task: int


@dataclass(frozen=True)
class Stop:
    """End the run."""

    reason: str = "finished"


Action = Send | Commit | SetTimer | Cancel | Stop
