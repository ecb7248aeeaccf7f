"""All clients in this process, on devices of given speed, in virtual time.

Messages are encoded and decoded as on a network. A task's reply arrives after the time that its
device takes, :meth:`DeviceProfile.seconds` after it was sent; what happens at the same instant
happens in a fixed order: joins and leaves, then replies by task, then timers. A device that is
given a second task before it finished the first does both at full speed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anabranch.errors import ConfigurationError
from anabranch.federated.clock import DeviceProfile
from anabranch.federated.cohort import Cohort, Postponed
from anabranch.federated.messages import Reply, Task
from anabranch.federated.node import Agreement, Node
from anabranch.federated.randomness import generator
from anabranch.federated.result import Clock
from anabranch.federated.runtimes.base import (
    Arrived,
    ClientJoined,
    ClientLeft,
    Fired,
    Input,
    Lost,
    Runtime,
    Timed,
)

Faults = Callable[[Task, Reply], Iterable[Reply | Lost]]
"""``faults(task, reply)``: what arrives instead of the reply. For tests."""


@dataclass(frozen=True)
class Site:
    """A simulated client. ``examples`` is what it declares; by default the length of ``data``.

    It is there from ``joins`` until ``leaves`` (seconds of the run).
    """

    name: str
    data: Any = None
    profile: DeviceProfile = field(default_factory=DeviceProfile)
    examples: int | None = None
    joins: float = 0.0
    leaves: float = math.inf

    @property
    def declared(self) -> int:
        """Examples that it says it has."""
        return len(self.data or ()) if self.examples is None else self.examples


class Simulation(Runtime):
    """Runs the sites one after the other. ``model`` is shared by all of them.

    ``strict`` lets errors of a method's own code through instead of counting a failed client.
    ``order`` arranges the tasks that were sent at one time before they run; it must not matter.

    ``together`` trains the sites that were given tasks at one time as one batch where it can
    (:mod:`anabranch.federated.cohort`), which for small models is several times as fast. Sums are
    rounded otherwise then: results agree with those of other runtimes to float32's precision, not
    bit for bit, and so do those of a run that was resumed with tasks under way.
    """

    clock: ClassVar[Clock] = "virtual"

    def __init__(
        self,
        sites: Sequence[Site],
        model: Any = None,
        strict: bool = True,
        faults: Faults | None = None,
        order: Callable[[list[Task]], list[Task]] | None = None,
        together: bool = False,
    ) -> None:
        self.sites = {site.name: site for site in sites}
        if len(self.sites) != len(sites):
            raise ConfigurationError("two sites have the same name")
        self.model = model
        self.strict = strict
        self.faults = faults
        self.order = order
        self.together = together
        self.nodes: dict[str, Node] = {}
        self._now = 0.0

    def open(self, agreement: Agreement, resumed: float | None = None) -> None:
        """Forget what was under way; sites that store their state find it again."""
        self._agreement = agreement
        self._now = now = resumed or 0.0
        self._sent: list[Task] = []
        self._due: list[tuple[float, int, int, int, Input]] = []
        self._count = 0
        self.nodes = {}
        for site in self.sites.values():
            if site.joins > now:
                self._push(site.joins, 0, 0, ClientJoined(site.name, site.declared))
            if now < site.leaves < math.inf:
                self._push(site.leaves, 0, 0, ClientLeft(site.name))

    def clients(self) -> Mapping[str, int]:
        """The sites that are there now."""
        return {
            site.name: site.declared
            for site in self.sites.values()
            if site.joins <= self._now < site.leaves
        }

    def submit(self, task: Task) -> None:
        """The site will work when the next input is asked for."""
        self._sent.append(task)

    def recall(self, task: Task) -> None:
        """Its reply will come when it would have come."""
        if task.client in self.sites:
            self._sent.append(task)

    def set_timer(self, at: float, timer: int) -> None:
        """A timer of the past is due at once."""
        self._push(max(at, self._now), 2, timer, Fired(timer))

    def next_input(self) -> Timed | None:
        """Let the sites work, then go on to the next thing that happens."""
        sent, self._sent = self._sent, []
        sent = self.order(sent) if self.order else sent
        if self.together and len(sent) > 1:
            sent = self._train_together(sent)
        for task in sent:
            self._work(task)
        while self._due:
            self._now, *_, happened = heapq.heappop(self._due)
            if not (isinstance(happened, Arrived) and self._gone(happened.reply.client)):
                return Timed(self._now, happened)
        return None

    def node(self, name: str) -> Node:
        """The site's side of the protocol."""
        if name not in self.nodes:
            site = self.sites[name]
            self.nodes[name] = Node(name, self._agreement, site.data, self.model, self.strict)
        return self.nodes[name]

    def _gone(self, client: str) -> bool:
        """What a site sent while it was leaving never arrives."""
        return client in self.sites and self._now >= self.sites[client].leaves

    def _train_together(self, tasks: list[Task]) -> list[Task]:
        """Do all tasks but those that go on with an exchange, which cannot be begun twice."""
        cohort = Cohort()
        postponed, left = [], []
        with cohort.gathering():
            for task in tasks:
                if task.exchange != task.id:
                    left.append(task)
                    continue
                try:
                    self._work(task)
                except Postponed:
                    postponed.append(task)
        cohort.train()
        with cohort.handing_out():
            for task in postponed:
                self._work(task)
        return left

    def _work(self, task: Task) -> None:
        profile = self.sites[task.client].profile
        seed = self._agreement.seed
        if profile.availability < 1 or profile.failure_rate > 0:
            there, lucky = generator("luck", seed, task.client, task.id).random(2)
            if there >= profile.availability:
                lost = Lost(task.id, f"{task.client} was not there")
                self._push(task.sent + profile.latency_s, 1, task.id, lost)
                return
            if lucky < profile.failure_rate:
                lost = Lost(task.id, f"{task.client} lost the task")
                self._push(task.sent + profile.seconds(len(task.body), 0, 0), 1, task.id, lost)
                return
        reply = self.node(task.client).handle(task)
        seconds = profile.seconds(
            len(task.body),
            reply.units,
            len(reply.body),
            profile.stretch(seed, task.client, task.id),
        )
        for arriving in self.faults(task, reply) if self.faults else [reply]:
            happens = arriving if isinstance(arriving, Lost) else Arrived(arriving)
            self._push(task.sent + seconds, 1, task.id, happens)

    def _push(self, at: float, rank: int, number: int, happened: Input) -> None:
        self._count += 1
        heapq.heappush(self._due, (at, rank, number, self._count, happened))
