"""A site's side of the protocol, the same under every runtime: each task takes effect once.

A reply is stored in the same write as the personal state that it left behind. If a task comes again
because the coordinator or the network was cut off, the stored reply is returned. Replies are kept
until the coordinator says that it has them for good (:attr:`Task.settled`).

An exchange of several messages may hold what cannot be stored, such as an autograd graph. Its
tasks are stored instead, with the state before it: after a crash they are run again, with the same
result, before the exchange goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError
from anabranch.federated.client import Client, ClientContext
from anabranch.federated.codecs import Codec, Identity
from anabranch.federated.errors import ExchangeLost, FederationError
from anabranch.federated.messages import Reply, Task
from anabranch.federated.payload import Payload, Value
from anabranch.federated.randomness import derive_seed, generator, seeded
from anabranch.federated.store import ClientStore
from anabranch.federated.wire import Wire
from anabranch.training.state import map_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Agreement:
    """What both sides of a run must have alike.

    ``up`` and ``down`` are the codecs of the two directions. ``folder`` is where sites of this
    process store their state; None: in memory only.
    """

    client: Client
    seed: int
    wire: Wire
    up: Codec
    down: Codec
    folder: Path | None = None


@dataclass
class _Exchange:
    """Tasks of the exchange under way, and the personal state before it."""

    id: int
    before: dict[str, Any]
    tasks: list[Task] = field(default_factory=list)


class Node:
    """One site: takes tasks, gives replies.

    ``strict`` lets exceptions through that are no :class:`AnabranchError`; otherwise every failure
    becomes a reply with an error, and the state is as before the task.
    """

    def __init__(
        self, name: str, agreement: Agreement, data: Any, model: Any = None, strict: bool = False
    ) -> None:
        self.name = name
        self._agreement = agreement
        self._data = data
        self._model = model
        self._strict = strict
        self._store = ClientStore(agreement.folder, name) if agreement.folder else None
        self._replies: dict[int, Reply] = {}
        self._settled = 0
        self._memory: dict[str, Any] = {}
        self._exchange: _Exchange | None = None
        self._in_memory: int | None = None
        """The exchange that ``_memory`` belongs to."""
        self._undo: dict[str, Any] = {"task": 0, "codec": {}}
        self._personal: dict[str, Any] = {"state": {}, "codec": {}}
        if not self._load():
            self._setup()

    @property
    def state(self) -> Mapping[str, Any]:
        """The personal state after the last task."""
        return self._personal["state"]

    def handle(self, task: Task) -> Reply:
        """Do a task, or return the stored reply if it was done before."""
        if task.id in self._replies:
            return self._replies[task.id]
        if task.id < self._settled:
            raise FederationError(
                f"{self.name} has forgotten task {task.id}: the coordinator said that it would not "
                f"ask again below {self._settled}"
            )
        self._settled = max(self._settled, task.settled)
        self._replies = {id_: r for id_, r in self._replies.items() if id_ >= task.settled}
        if task.exchange == task.id:
            self._exchange, self._memory, self._in_memory = None, {}, task.id
            if task.accepted < self._undo["task"] < task.awaited:
                # The last reply was in vain: what its codec held back is owed as before it.
                self._personal = {**self._personal, "codec": self._undo["codec"]}
        before = self._personal
        try:
            self._recover(task)
            before = self._personal
            reply = self._execute(task)
        except Exception as error:
            self._personal, self._exchange, self._memory, self._in_memory = before, None, {}, None
            if self._strict and not isinstance(error, AnabranchError):
                raise
            logger.warning("client %s, task %d: %r", self.name, task.id, error)
            text = f"{type(error).__name__}: {error}"
            reply = Reply(task.id, self.name, task.kind, task.version, error=text)
        else:
            self._note_exchange(task, before)
            self._undo = {"task": task.id, "codec": before["codec"]}
        self._replies[task.id] = reply
        self._save()
        return reply

    def _recover(self, task: Task) -> None:
        """Bring back the memory of the exchange that a task continues."""
        if task.exchange == task.id or self._in_memory == task.exchange:
            return
        if self._exchange is None or self._exchange.id != task.exchange:
            raise ExchangeLost(
                f"{self.name} was asked to go on with exchange {task.exchange}, which it does not "
                f"know; begin it again"
            )
        self._personal, self._memory = self._exchange.before, {}
        for earlier in self._exchange.tasks:
            self._execute(earlier)
        self._in_memory = task.exchange

    def _note_exchange(self, task: Task, before: dict[str, Any]) -> None:
        if not self._memory:
            self._exchange = None
        elif self._exchange is None:
            self._exchange = _Exchange(task.exchange, before, [task])
        else:
            self._exchange.tasks.append(task)

    def _execute(self, task: Task) -> Reply:
        # On a copy, so that a client that fails half-way leaves no trace.
        working = map_tensors(self._personal, lambda tensor: tensor.clone())
        agreed = self._agreement
        ctx = self._context(task, working["state"])
        with seeded(derive_seed(agreed.seed, "task", self.name, *task.draw)):
            payload = agreed.down.decode(agreed.wire.decode("down", task.kind, task.body))
            answer, examples = agreed.client.run(ctx, task.kind, payload)
        coded: Payload = answer
        if not isinstance(agreed.up, Identity):
            rng = generator(agreed.seed, "codec", self.name, *task.draw)
            coded = agreed.up.encode(answer, working["codec"], rng)
        body = agreed.wire.encode("up", task.kind, coded)
        self._personal = working
        return Reply(
            task.id,
            self.name,
            task.kind,
            task.version,
            examples=int(examples),
            units=float(ctx.units),
            metrics={name: float(value) for name, value in ctx.metrics.items()},
            body=body,
        )

    def _context(self, task: Task, state: dict[str, Any]) -> ClientContext:
        agreed = self._agreement
        return ClientContext(
            name=self.name,
            data=self._data,
            model=self._model,
            task=task.id,
            kind=task.kind,
            version=task.version,
            work=task.work,
            accepted=task.accepted,
            state=state,
            exchange=self._memory,
            seed=derive_seed(agreed.seed, "client", self.name, *task.draw),
            open_peer=self._open_peer,
        )

    def _open_peer(self, body: bytes, kind: str) -> dict[str, Value]:
        return self._agreement.up.decode(self._agreement.wire.decode("up", kind, body))

    def _setup(self) -> None:
        nothing = Task(0, self.name, "setup", 0, 0.0)
        with seeded(derive_seed(self._agreement.seed, "setup", self.name)):
            self._agreement.client.setup(self._context(nothing, self._personal["state"]))

    def _save(self) -> None:
        if self._store is None:
            return
        exchange = self._exchange
        self._store.save(
            {
                "personal": self._personal,
                "undo": self._undo,
                "settled": self._settled,
                "replies": [vars(reply) for reply in self._replies.values()],
                "exchange": None
                if exchange is None
                else {
                    "id": exchange.id,
                    "before": exchange.before,
                    "tasks": [task.to_bytes() for task in exchange.tasks],
                },
            }
        )

    def _load(self) -> bool:
        stored = self._store.load() if self._store else None
        if stored is None:
            return False
        self._personal, self._undo = stored["personal"], stored["undo"]
        self._settled = stored["settled"]
        self._replies = {values["task"]: Reply(**values) for values in stored["replies"]}
        if exchange := stored["exchange"]:
            tasks = [Task.from_bytes(data) for data in exchange["tasks"]]
            self._exchange = _Exchange(exchange["id"], exchange["before"], tasks)
        return True
