"""The coordinator: what happened in, what to send out, and no I/O between.

It knows neither files nor sockets, draws no random numbers that depend on an order, and reads no
clock: time is that of the last input. So the same inputs lead to the same state, whoever brings
them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.federated import events, runtimes
from anabranch.federated.codecs import Codec, Identity
from anabranch.federated.errors import (
    AggregationError,
    EmptyRound,
    FederationError,
    NotFinite,
    ReplyRefused,
)
from anabranch.federated.ledger import Account
from anabranch.federated.messages import Reply, Task, Work
from anabranch.federated.payload import Payload
from anabranch.federated.randomness import generator
from anabranch.federated.reading import NotFinitePolicy, read_reply
from anabranch.federated.result import RunResult, mean_metrics
from anabranch.federated.runtimes import Timed
from anabranch.federated.scheduling import Schedule
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.state import RunState, Timer
from anabranch.federated.topologies import Star, Topology
from anabranch.federated.trees import dump
from anabranch.federated.wire import Wire

MOST_FRUITLESS = 1000
"""Tasks in a row without a usable reply, after which a run is given up."""

Watch = Callable[["Coordinator"], Mapping[str, float] | None]


class Coordinator:
    """Decides. Built by :class:`Federation`, which documents the options.

    :attr:`outbox` collects the tasks to submit and the timers to set, until someone empties it.
    """

    def __init__(
        self,
        server: Server,
        schedule: Schedule,
        *,
        codec: Codec | None = None,
        down: Codec | None = None,
        topology: Topology | None = None,
        seed: int = 0,
        eager: bool = False,
        not_finite: NotFinitePolicy = "reject",
        patience: int = 3,
        watch: Watch | None = None,
    ) -> None:
        if not_finite not in ("reject", "zero", "raise"):
            raise ConfigurationError(f"not_finite is reject, zero or raise, not {not_finite!r}")
        self.server = server
        self.schedule = schedule
        self.codec = codec or Identity()
        self.down = down or Identity()
        self.topology = topology or Star()
        self.seed = seed
        self.eager = eager
        self.not_finite: NotFinitePolicy = not_finite
        self.patience = patience
        self.watch = watch
        self.wire = Wire()
        self.state = RunState()
        self.outbox: list[Task | tuple[int, Timer]] = []
        self._events: deque[events.Event] = deque()
        self._encoded: tuple[str, Payload, bytes] | None = None

    def set_up(self, members: Mapping[str, int]) -> None:
        """Check that the parts fit together, and tell the server who is there."""
        self.topology.check(self.server)
        if self.eager and not (self.server.associative and type(self.topology) is Star):
            raise ConfigurationError("eager needs a server that is associative, and a star")
        self.state.members = dict(members)
        self.server.setup(ServerContext(self.seed, self.state.members, self.topology))
        self.wire = Wire(self.server.schemas())
        self._refuse_codecs_of_plain_values()

    def _refuse_codecs_of_plain_values(self) -> None:
        """A message without a header has no room for what a codec makes of its tensors."""
        for (direction, kind), schema in self.wire.schemas.items():
            codec = self.codec if direction == "up" else self.down
            held = [f.name for f in schema.fields if f.type in ("f64", "f32", "f16", "bf16")]
            if held and not isinstance(codec, Identity):
                raise ConfigurationError(
                    f"{type(self.server).__name__} sends {held[0]} {direction} (kind {kind}) "
                    f"without a header, so that {codec!r} cannot be used: leave the codec away, or "
                    f"compact where the method has it"
                )

    def start(self) -> None:
        """The run begins."""
        self._dispatch(events.Started())

    def result(self) -> RunResult:
        """How the run went so far."""
        state = self.state
        return RunResult(
            state.version,
            state.stopped or "",
            state.now,
            state.history,
            state.ledger,
            state.incidents,
            timeline=self.schedule.timeline(),
        )

    def identity(self) -> dict[str, Any]:
        """What a stored run must have alike to go on."""
        return {
            "wire": self.wire.fingerprint,
            "seed": self.seed,
            "server": {"class": type(self.server).__name__, **self.server.settings()},
            "schedule": self.schedule.settings(),
            "topology": self.topology.settings(),
            "codec": repr(self.codec),
            "down": repr(self.down),
            "eager": self.eager,
            "not_finite": self.not_finite,
        }

    # What a schedule may ask

    @property
    def version(self) -> int:
        """Commits so far."""
        return self.state.version

    @property
    def clients(self) -> Sequence[str]:
        """Clients that are there, sorted."""
        return sorted(self.state.members)

    @property
    def in_flight(self) -> Mapping[int, Task]:
        """Tasks whose reply is awaited, by id."""
        return self.state.in_flight

    def now(self) -> float:
        """Seconds since the run began: the time of the last input."""
        return self.state.now

    def held(self, group: str | None = None) -> int:
        """Updates that wait for a commit."""
        held = self.state.held
        return sum(map(len, held.values())) if group is None else len(held.get(group, ()))

    def busy(self, client: str) -> bool:
        """Whether a task of this client is under way."""
        return bool(self.state.tasks_of(client))

    def rng(self, *words: int | str) -> np.random.Generator:
        """A generator for one purpose."""
        return generator(self.seed, "schedule", *words)

    # What happens

    def handle(self, happened: Timed) -> None:
        """Let one thing happen."""
        self.state.inputs += 1
        self.state.now = happened.at
        match happened.input:
            case runtimes.Arrived(reply):
                self._on_reply(reply)
            case runtimes.Lost(task, reason):
                self._give_up(task, "lost", reason)
            case runtimes.Fired(timer):
                self._on_timer(timer)
            case runtimes.ClientJoined(client, examples):
                self.state.members[client] = examples
                self._dispatch(events.Joined(client))
            case runtimes.ClientLeft(client):
                self._on_leave(client)

    def _dispatch(self, event: events.Event) -> None:
        """Tell the schedule, do what it says, and tell it what comes of that."""
        self._events.append(event)
        while self._events and self.state.stopped is None:
            for action in self.schedule.on(self._events.popleft(), self):
                self._act(action)

    def _act(self, action: events.Action) -> None:
        match action:
            case events.Send(client, kind, work, deadline):
                self._send(client, kind, work, deadline)
            case events.Commit(groups):
                self._commit(groups)
            case events.SetTimer(at, tag):
                self._set_timer(Timer(at, tag))
            case events.Cancel(number):
                if task := self.state.end(number):
                    self.state.given_up[number] = "cancelled", task
            case events.Stop(reason):
                self.state.stopped = reason

    # Sending

    def _send(
        self,
        client: str,
        kind: str,
        work: Work,
        deadline: float | None,
        follows: Task | None = None,
    ) -> None:
        state = self.state
        if client not in state.members:
            raise FederationError(
                f"{type(self.schedule).__name__} sends to {client!r}, which is not there"
            )
        number = state.next_task
        state.next_task += 1
        exchange, turn = (follows.exchange, follows.turn + 1) if follows else (number, 0)
        task = Task(
            id=number,
            client=client,
            kind=kind,
            version=state.version,
            sent=state.now,
            work=work,
            deadline=deadline,
            exchange=exchange,
            turn=turn,
            accepted=state.accepted.get(client, 0),
            awaited=state.awaited(client, default=number),
            settled=state.settled(client, default=number),
        )
        task = replace(task, body=self._encode(task))
        state.begin(task)
        account = Account("down", client, kind, state.version)
        state.ledger.record(account, len(task.body), len(task.envelope()))
        if deadline is not None:
            self._set_timer(Timer(deadline, "", number))
        self.outbox.append(task)

    def _encode(self, task: Task) -> bytes:
        client, kind = task.client, task.kind
        payload = self.server.message(client, kind)
        if not isinstance(self.down, Identity):
            memory = self.state.codec.setdefault(client, {})
            rng = generator(self.seed, "codec down", client, *task.draw)
            return self.wire.encode("down", kind, self.down.encode(payload, memory, rng))
        # The same object for a hundred clients is encoded, and stored, once.
        known = self._encoded
        if known is None or known[0] != kind or known[1] is not payload:
            known = self._encoded = kind, payload, self.wire.encode("down", kind, payload)
        return known[2]

    def _set_timer(self, timer: Timer) -> None:
        number = self.state.next_timer
        self.state.next_timer += 1
        self.state.timers[number] = timer
        self.outbox.append((number, timer))

    # What comes in

    def _on_reply(self, reply: Reply) -> None:
        state = self.state
        account = Account("up", reply.client, reply.kind, reply.version)
        state.ledger.record(account, len(reply.body), len(reply.envelope()))
        task = state.in_flight.get(reply.task)
        if task is None:
            what, _ = state.given_up.pop(reply.task, ("duplicate", None))
            state.incidents.record(what, reply.client, f"task {reply.task} was replied to in vain")
            return
        if reply.client != task.client:
            state.incidents.record(
                "impostor", reply.client, f"replied to task {task.id}, which is of {task.client}"
            )
            return
        try:
            update = read_reply(
                task,
                reply,
                version=state.version,
                now=state.now,
                declared=state.members[task.client],
                server=self.server,
                wire=self.wire,
                codec=self.codec,
                not_finite=self.not_finite,
                incidents=state.incidents,
            )
            follow_up = self.server.respond(reply, update.payload)
        except ReplyRefused as error:
            if isinstance(error, NotFinite) and self.not_finite == "raise":
                raise
            self._give_up(task.id, error.what, str(error), replied=True)
            return
        if follow_up is not None:
            state.end(task.id)
            self._send(task.client, follow_up, task.work, task.deadline, task)
            return
        if not self.schedule.admits(update):
            reason = f"{task.client} worked on version {update.version}, now {state.version}"
            self._give_up(task.id, "stale", reason, replied=True)
            return
        state.end(task.id)
        state.accepted[task.client] = max(task.id, state.accepted.get(task.client, 0))
        state.fruitless = 0
        self._hold(replace(update, group=self.schedule.group(update)))
        self._dispatch(events.Replied(task.client, task.id, task.kind, update.units, task.sent))

    def _give_up(self, number: int, what: str, reason: str, replied: bool = False) -> None:
        """A task is over without a usable reply."""
        state = self.state
        task = state.end(number)
        if task is None:
            return
        if not replied and what != "lost":
            state.given_up[number] = what, task
        state.incidents.record(what, task.client, reason)
        state.last_problem = reason
        state.fruitless += 1
        if state.fruitless > MOST_FRUITLESS:
            raise FederationError(
                f"{state.fruitless} tasks in a row had no usable reply; the last: {reason}"
            )
        self._dispatch(events.Failed(task.client, number, task.kind, what))

    def _on_timer(self, number: int) -> None:
        timer = self.state.timers.pop(number, None)
        if timer is None:
            return
        if timer.task is None:
            self._dispatch(events.TimerFired(timer.tag))
        else:
            self._give_up(timer.task, "late", f"task {timer.task} was due at {timer.at:g} s")

    def _on_leave(self, client: str) -> None:
        if self.state.members.pop(client, None) is None:
            return
        self.state.incidents.record("left", client, f"left at {self.state.now:g} s")
        for task in self.state.tasks_of(client):
            self._give_up(task.id, "lost", f"{client} left with task {task.id}")
        self._dispatch(events.Left(client))

    # Making versions

    def _hold(self, update: Update) -> None:
        if self.eager:
            partial = self.state.partial
            partial[update.group] = self.server.fold(partial.get(update.group), update)
            update = replace(update, payload={})  # only its figures are needed from here on
        self.state.held.setdefault(update.group, []).append(update)

    def _commit(self, groups: Sequence[str] | None) -> None:
        state = self.state
        chosen = sorted(state.held if groups is None else state.held.keys() & set(groups))
        updates = [update for group in chosen for update in state.held.pop(group)]
        partial = [state.partial.pop(group) for group in chosen if group in state.partial]
        try:
            if not updates:
                raise EmptyRound(
                    f"version {state.version} got no usable reply"
                    + (f"; the last problem: {state.last_problem}" if state.last_problem else "")
                )
            figures = self.server.commit(self._aggregate(updates, partial))
        except AggregationError as error:
            state.incidents.record("empty round", "", str(error))
            state.empty_in_a_row += 1
            if state.empty_in_a_row > self.patience:
                raise
            self._events.append(events.RoundEmpty(str(error)))
            return
        state.version += 1
        state.empty_in_a_row = 0
        self._encoded = None
        state.history.append({**mean_metrics(updates), **(figures or {}), "seconds": state.now})
        if self.watch is not None:
            state.history[-1] |= self.watch(self) or {}
        self._events.append(events.Committed(state.version))

    def _aggregate(self, updates: list[Update], partial: list[Accumulator]) -> Accumulator:
        if self.eager:
            acc = partial[0]
            for other in partial[1:]:
                acc = self.server.merge(acc, other)
            return acc
        # In the order of the tasks, so that the order of arrival leaves no trace.
        current = [
            replace(update, staleness=self.version - update.version)
            for update in sorted(updates, key=lambda update: update.task)
        ]
        return self.topology.aggregate(self.server, current, self._record_partial)

    def _record_partial(self, aggregator: str, partial: Accumulator) -> None:
        account = Account("up", aggregator, "partial", self.version)
        self.state.ledger.record(account, len(dump(partial)), 0)
