"""Groups of clients that arrive together, because each does as much as it has time for."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from anabranch.errors import ConfigurationError
from anabranch.federated.events import (
    Action,
    Commit,
    Committed,
    Event,
    Failed,
    Joined,
    Left,
    Replied,
    RoundEmpty,
    Send,
    SetTimer,
    Started,
    Stop,
    TimerFired,
)
from anabranch.federated.messages import Work
from anabranch.federated.scheduling.base import Schedule, View
from anabranch.federated.server import Update
from anabranch.federated.timeline import Bar, How, Timeline

logger = logging.getLogger(__name__)

FASTEST = 1e-9
"""Seconds per step below which nothing is measured."""

Group = dict[str, Any]
"""``working`` and ``arrived``: names; ``due``: when all should be there; ``latest``: when the group
is closed, in seconds of the run. Plain values, so that it can be stored."""


@dataclass
class Compass(Schedule):
    """Each client gets so many steps that groups of them finish together (FedCompass, Li et al.
    2024, algorithms 1 and 2).

    A client's first task has ``max_steps``; its reply is a version of its own and tells its seconds
    per step, of which ``speed_momentum`` is the weight of the newest measurement. From then on it
    joins the open group in which it can do most steps, from ``min_steps`` to ``max_steps``, or
    begins one. A group is committed when all are there, or ``latest_factor`` times its duration
    after it began. Who comes later counts in the next commit of any group.

    A client that fails gets another task ``retry_after`` seconds of the run later. The last version
    holds everything that has arrived.
    """

    versions: int
    max_steps: int = 100
    min_steps: int = 20
    speed_momentum: float = 0.9
    latest_factor: float = 1.5
    retry_after: float = 1.0
    speeds: dict[str, float] = field(default_factory=dict, init=False)
    """Seconds per step of each client, transfers included."""
    groups: dict[str, Group] = field(default_factory=dict, init=False)
    """Those that are open, by name."""
    tasks: list[dict[str, Any]] = field(default_factory=list, init=False)
    """All so far, as :class:`Bar` has them."""
    last: dict[str, int] = field(default_factory=dict, init=False)
    """Where each client's newest task is among them."""
    loose: list[str] = field(default_factory=lambda: [""], init=False)
    """Names under which updates wait for the next commit of any group."""
    free: list[str] = field(default_factory=list, init=False)
    """Clients that get a task as soon as the present commit is made, in this order."""
    made: int = field(default=0, init=False)
    """Groups so far."""

    def __post_init__(self) -> None:
        if self.versions < 1:
            raise ConfigurationError(f"versions is at least 1, not {self.versions}")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ConfigurationError(
                f"steps go from at least 1 up, not from {self.min_steps} to {self.max_steps}"
            )
        if not 0 < self.speed_momentum <= 1:
            raise ConfigurationError(
                f"speed_momentum is above 0 and at most 1, not {self.speed_momentum}"
            )
        if not (self.latest_factor >= 1 and math.isfinite(self.latest_factor)):
            raise ConfigurationError(f"latest_factor is at least 1, not {self.latest_factor}")
        if not self.retry_after > 0:
            raise ConfigurationError(f"retry_after is above 0 seconds, not {self.retry_after}")

    def group(self, update: Update) -> str:
        """The open group, or the loose ones; a first result waits alone."""
        name = self._group_of(update.client)
        if not name:
            return f"first of {update.client}"
        return name if name in self.groups else ""

    def timeline(self) -> Timeline:
        """Every task as a bar: in which group, when it began, was due, and ended."""
        return Timeline.from_list(self.tasks)

    def on(self, event: Event, fed: View) -> Sequence[Action]:
        """Tasks are given after the commit, so that they carry its version."""
        match event:
            case Started():
                return [self._first(name, fed) for name in fed.clients]
            case Replied():
                return self._arrive(event, fed)
            case TimerFired(tag=name) if name in self.groups:
                if fed.held(name):
                    return self._flush(name, fed)
                self._close(name)  # nobody came in time
            case TimerFired(tag=name) if name in fed.clients and not fed.busy(name):
                return self._assign(name, fed)
            case Committed(version=version) if version >= self.versions:
                return [Stop()]
            case Committed() | RoundEmpty():
                free, self.free = self.free, []
                here = [n for n in free if n in fed.clients and not fed.busy(n)]
                return [action for name in here for action in self._assign(name, fed)]
            case Failed(client=client):
                self._end(client, "failed", fed)
                retry = SetTimer(fed.now() + self.retry_after, client)
                return [*self._leave(client, fed), retry]
            case Left(client=client):
                return self._leave(client, fed)
            case Joined(client=client) if not fed.busy(client):
                return self._assign(client, fed)
        return []

    def _arrive(self, event: Replied, fed: View) -> list[Action]:
        client = event.client
        told = self.tasks[self.last[client]]["steps"]
        done = event.units if event.units > 0 else told
        if done != told:
            logger.warning(
                "%s did %g steps and not the %d that it was given; it is as fast as what it did",
                client,
                done,
                told,
            )
        measured = max((fed.now() - event.sent) / done, FASTEST)
        before = self.speeds.get(client, measured)
        self.speeds[client] = before + self.speed_momentum * (measured - before)
        name = self._group_of(client)
        late = name and name not in self.groups
        self._end(client, "late" if late else "arrived", fed)
        if not name:
            self.free.append(client)
            return [self._commit([f"first of {client}"], fed)]
        if late:
            return self._assign(client, fed)
        group = self.groups[name]
        group["working"].remove(client)
        group["arrived"].append(client)
        return [] if group["working"] else self._flush(name, fed)

    def _flush(self, name: str, fed: View) -> list[Action]:
        group = self._close(name)
        self.free += sorted(group["arrived"], key=lambda client: (self.speeds[client], client))
        return [self._commit([name], fed)]

    def _commit(self, names: list[str], fed: View) -> Commit:
        if fed.version + 1 >= self.versions:
            return Commit()
        chosen, self.loose = (*names, *self.loose), [""]
        return Commit(chosen)

    def _close(self, name: str) -> Group:
        """The group is over; what still waits under its name is loose from now on."""
        self.loose.append(name)
        return self.groups.pop(name)

    def _leave(self, client: str, fed: View) -> list[Action]:
        """It failed or left: nobody waits for it, but what it sent counts."""
        name = self._group_of(client)
        group = self.groups.get(name)
        if group is None:
            return []
        for members in (group["working"], group["arrived"]):
            if client in members:
                members.remove(client)
        if group["working"]:
            return []
        if group["arrived"]:
            return self._flush(name, fed)
        self._close(name)
        return []

    def _first(self, client: str, fed: View) -> Send:
        return self._begin(Bar(client, "", self.max_steps, fed.now()))

    def _assign(self, client: str, fed: View) -> list[Action]:
        """Join the open group in which the client does most, or begin one."""
        if client not in self.speeds:
            return [self._first(client, fed)]
        speed, now = self.speeds[client], fed.now()
        most, joined = 0, ""
        for name, group in self.groups.items():  # of equals, the youngest
            steps = _steps(group["due"] - now, speed)
            if max(self.min_steps, most) <= steps <= self.max_steps:
                most, joined = steps, name
        actions: list[Action] = []
        if joined:
            self.groups[joined]["working"].append(client)
        else:
            most = self._new_group_steps(speed, now)
            self.made += 1
            joined = f"group {self.made}"
            duration = most * speed
            self.groups[joined] = {
                "working": [client],
                "arrived": [],
                "due": now + duration,
                "latest": now + self.latest_factor * duration,
            }
            actions = [SetTimer(self.groups[joined]["latest"], joined)]
        group = self.groups[joined]
        bar = Bar(client, joined, most, now, due=group["due"], latest=group["latest"])
        return [*actions, self._begin(bar)]

    def _group_of(self, client: str) -> str:
        """That of its newest task, even if it is closed; empty if it was its first, or none yet."""
        return self.tasks[self.last[client]]["group"] if client in self.last else ""

    def _begin(self, bar: Bar) -> Send:
        self.last[bar.client] = len(self.tasks)
        self.tasks.append(asdict(bar))
        return Send(bar.client, work=Work(steps=bar.steps))

    def _end(self, client: str, how: How, fed: View) -> None:
        self.tasks[self.last[client]] |= {"ended": fed.now(), "how": how}

    def _new_group_steps(self, speed: float, now: float) -> int:
        """As long as until an open group's next end, if its fastest member then has a whole task:
        the two can merge there.
        """
        most = -1
        for group in self.groups.values():
            if now < group["latest"]:
                members = [*group["working"], *group["arrived"]]
                fastest = min(self.speeds[name] for name in members)
                steps = _steps(group["latest"] + fastest * self.max_steps - now, speed)
                if steps <= self.max_steps:
                    most = max(most, steps)
        return self.max_steps if most < 0 else max(most, self.min_steps)


def _steps(seconds: float, speed: float) -> int:
    """Whole steps in that time; one that is whole up to rounding counts."""
    return math.floor(seconds / speed + 1e-6)
