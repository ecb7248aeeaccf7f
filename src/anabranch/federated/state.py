"""Everything that a coordinator knows and that must outlive it, in one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from anabranch.federated.incidents import Incidents
from anabranch.federated.ledger import Ledger
from anabranch.federated.messages import Task, Work
from anabranch.federated.server import Accumulator, Update


@dataclass(frozen=True)
class Timer:
    """A schedule's timer, or the deadline of a task."""

    at: float
    tag: str
    task: int | None = None


@dataclass
class RunState:
    """The state of a run between two inputs, without those of server, schedule and clients.

    ``members`` maps the clients that are there to the examples that they declared. ``given_up``
    holds tasks that nobody waits for although their reply may still come, and why. ``accepted`` is
    each client's newest task whose reply counts. ``held`` are updates by group, ``partial``
    accumulators if updates are folded as they come.
    """

    version: int = 0
    now: float = 0.0
    inputs: int = 0
    next_task: int = 1
    next_timer: int = 1
    members: dict[str, int] = field(default_factory=dict)
    in_flight: dict[int, Task] = field(default_factory=dict)
    given_up: dict[int, tuple[str, Task]] = field(default_factory=dict)
    timers: dict[int, Timer] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    held: dict[str, list[Update]] = field(default_factory=dict)
    partial: dict[str, Accumulator] = field(default_factory=dict)
    codec: dict[str, Any] = field(default_factory=dict)
    """What the codec of messages to clients remembers, by client."""
    empty_in_a_row: int = 0
    fruitless: int = 0
    """Tasks in a row without a usable reply."""
    last_problem: str = ""
    stopped: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    incidents: Incidents = field(default_factory=Incidents)

    def __post_init__(self) -> None:
        self._of_client: dict[str, set[int]] = {}

    def begin(self, task: Task) -> None:
        """A task is under way."""
        self.in_flight[task.id] = task
        self._of_client.setdefault(task.client, set()).add(task.id)

    def end(self, number: int) -> Task | None:
        """It no longer is; None if it never was."""
        task = self.in_flight.pop(number, None)
        if task is not None:
            self._of_client[task.client].discard(number)
        return task

    def tasks_of(self, client: str) -> list[Task]:
        """Tasks of a client that are under way, in the order in which they were sent."""
        return [self.in_flight[number] for number in sorted(self._of_client.get(client, ()))]

    def awaited(self, client: str, default: int) -> int:
        """The oldest task of a client that is under way."""
        return min(self._of_client.get(client, ()), default=default)

    def settled(self, client: str, default: int) -> int:
        """No reply of this client to an earlier task than this will be asked for again."""
        abandoned = [n for n, (_, task) in self.given_up.items() if task.client == client]
        return min([self.awaited(client, default), *abandoned])

    def to_tree(self) -> dict[str, Any]:
        """Nested dicts and lists of tensors, bytes and JSON values."""
        tree = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return tree | {
            "in_flight": [_task_tree(task) for task in self.in_flight.values()],
            "given_up": [[why, _task_tree(task)] for why, task in self.given_up.values()],
            "timers": {str(number): asdict(timer) for number, timer in self.timers.items()},
            "held": [vars(update) for group in self.held.values() for update in group],
            "ledger": self.ledger.state_dict(),
            "incidents": self.incidents.state_dict(),
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> RunState:
        """What :meth:`to_tree` gave."""
        made = cls(**{name: value for name, value in tree.items() if name not in _OWN_FORM})
        for values in tree["in_flight"]:
            made.begin(_task_of(values))
        for why, values in tree["given_up"]:
            task = _task_of(values)
            made.given_up[task.id] = why, task
        made.timers = {int(number): Timer(**values) for number, values in tree["timers"].items()}
        for values in tree["held"]:
            update = Update(**values)
            made.held.setdefault(update.group, []).append(update)
        made.ledger.load_state_dict(tree["ledger"])
        made.incidents.load_state_dict(tree["incidents"])
        return made


_OWN_FORM = ("in_flight", "given_up", "timers", "held", "ledger", "incidents")
"""Fields that are stored in another form than they have."""


def _task_tree(task: Task) -> dict[str, Any]:
    return {**vars(task), "work": asdict(task.work)}


def _task_of(tree: Mapping[str, Any]) -> Task:
    return Task(**{**tree, "work": Work(**tree["work"])})
