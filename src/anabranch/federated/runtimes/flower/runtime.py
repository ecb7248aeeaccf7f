"""The runtime whose clients are the nodes of a Flower deployment."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from anabranch.errors import AnabranchError, ConfigurationError
from anabranch.federated.errors import FederationError, NotEnoughClients, PayloadError
from anabranch.federated.messages import Reply, Task
from anabranch.federated.node import Agreement
from anabranch.federated.runtimes.base import Arrived, ClientJoined, ClientLeft, Lost
from anabranch.federated.runtimes.flower.letter import RECORD, VALUE, Letter
from anabranch.federated.runtimes.network import agreed
from anabranch.federated.runtimes.wall_clock import WallClock

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""How often Flower is asked for replies."""
LOOK_S = 1.0
"""How often it is asked which nodes are there."""
ASK_AGAIN_S = 10.0
"""When a node that did not say who it is, is asked once more."""


@dataclass(frozen=True)
class _Sent:
    """A letter whose answer is awaited; without a task it asked who a node is."""

    node: int
    task: Task | None


class Flower(WallClock):
    """Sends tasks through the ``grid`` that Flower gives the main function of a ServerApp.

    The federation's loop runs in that function, whatever schedule, codec or method it has; Flower
    moves the messages. Nodes run :func:`client_app`. The run begins when ``clients`` of them said
    who they are; after ``join_timeout`` seconds (None: never) it gives up. ``run`` (letters and
    digits) names the run to the nodes: give the same name again to go on with a stored one. An
    answer that takes more than ``ttl`` seconds is lost.

    Example::

        server = ServerApp()

        @server.main()
        def main(grid, context):
            Federation(FedAvg().begin(model), ..., Flower(grid, clients=2)).run()
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clients: int = 1,
        run: str = "",
        join_timeout: float | None = None,
        ttl: float = 43200.0,
    ) -> None:
        if clients < 1 or not ttl > 0:
            raise ConfigurationError("a federation needs a client, and messages a ttl above 0")
        if run and not run.isalnum():
            raise ConfigurationError(f"a run is named by letters and digits, not {run!r}")
        self.run = run or uuid.uuid4().hex
        self._grid = grid
        self._clients, self._join_timeout, self._ttl = clients, join_timeout, ttl
        self._agreed: dict[str, Any] = {}
        self._outgoing: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._members: dict[str, tuple[int, int]] = {}
        """Node and examples by name."""
        self._told: dict[str, int] | None = None
        """Examples by name, as the coordinator knows; None before it asked."""
        self._opened = False
        self._awaited: dict[str, _Sent] = {}
        self._asked: dict[int, float] = {}
        """When a node that is there was asked who it is."""
        self._silent: dict[int, str] = {}
        """Why a node did not say who it is."""
        self._looked = -LOOK_S
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    # What the federation asks for

    def clients(self) -> Mapping[str, int]:
        """Waits until enough nodes are there."""
        self._start()
        until = None if self._join_timeout is None else time.monotonic() + self._join_timeout
        while True:
            with self._lock:
                if len(self._members) >= self._clients:
                    self._told = {name: examples for name, (_, examples) in self._members.items()}
                    return dict(self._told)
                there, silent = sorted(self._members), "; ".join(self._silent.values())
            self._check()
            if until is not None and time.monotonic() >= until:
                raise NotEnoughClients(
                    f"the run waits for {self._clients} nodes; after {self._join_timeout:g} s "
                    f"there are: {', '.join(there) or 'none'}" + (f"; {silent}" if silent else "")
                )
            time.sleep(POLL_S)

    def open(self, agreement: Agreement, resumed: float | None = None) -> None:
        """Every task will say what was agreed on, so that a node may forget it."""
        super().open(agreement, resumed)
        self._agreed = agreed.to_json(agreement, absent_after=self._ttl)
        self._opened = True
        self._start()

    def submit(self, task: Task) -> None:
        """The thread that talks to Flower sends it."""
        self._outgoing.put(task)

    def recall(self, task: Task) -> None:
        """The node gives the reply that it stored, or works as it would have."""
        self.submit(task)

    def alive(self) -> bool:
        """Nodes may always come, as long as Flower answers."""
        self._check()
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Ask Flower for nothing more. Nodes stay as they are."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    # The thread that talks to Flower, and does nothing else

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._talk, name="anabranch-flower", daemon=True)
            self._thread.start()

    def _check(self) -> None:
        if self._failure is not None:
            raise FederationError(f"Flower does not answer: {self._failure}") from self._failure

    def _talk(self) -> None:
        try:
            while not self._closing.wait(POLL_S):
                self._look()
                self._tell()
                while not self._outgoing.empty():
                    self._send(self._outgoing.get())
                if self._awaited:
                    for message in self._grid.pull_messages(list(self._awaited)):
                        self._take(message)
        except Exception as error:  # of any library below; the run's own thread raises it
            logger.warning("Flower does not answer", exc_info=True)
            self._failure = error

    def _look(self) -> None:
        """Who came and went."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        there = set(self._grid.get_node_ids())
        for name, (node, _) in list(self._members.items()):
            if node not in there:
                self._leave(name, node)
        known = {node for node, _ in self._members.values()}
        self._asked = {node: at for node, at in self._asked.items() if node in there}
        for node in sorted(there - known):
            if now - self._asked.get(node, -ASK_AGAIN_S) >= ASK_AGAIN_S and not self._waits(node):
                self._asked[node] = now
                self._push(node, Letter("who"), MessageType.QUERY, None)

    def _waits(self, node: int) -> bool:
        return any(sent.node == node for sent in self._awaited.values())

    def _leave(self, name: str, node: int) -> None:
        with self._lock:
            del self._members[name]
        for number, sent in list(self._awaited.items()):
            if sent.node == node:
                del self._awaited[number]
                if sent.task is not None:
                    self.report(Lost(sent.task.id, f"the node of {name} is gone"))

    def _tell(self) -> None:
        """Report what changed since the coordinator heard of it."""
        if self._told is None or not self._opened:
            return
        for name in sorted(self._told.keys() - self._members.keys()):
            del self._told[name]
            self.report(ClientLeft(name))
        for name in sorted(self._members.keys() - self._told.keys()):
            self._told[name] = self._members[name][1]
            self.report(ClientJoined(name, self._told[name]))

    def _send(self, task: Task) -> None:
        if task.client not in self._members:
            self.report(Lost(task.id, f"the node of {task.client} is gone"))
            return
        letter = Letter("task", {"run": self.run, "agreement": self._agreed}, task.to_bytes())
        self._push(self._members[task.client][0], letter, MessageType.TRAIN, task)

    def _push(self, node: int, letter: Letter, kind: str, task: Task | None) -> None:
        content = RecordDict({RECORD: ConfigRecord({VALUE: letter.to_bytes()})})
        message = Message(content, dst_node_id=node, message_type=kind, ttl=self._ttl)
        numbers = list(self._grid.push_messages([message]))
        if numbers and numbers[0]:
            self._awaited[numbers[0]] = _Sent(node, task)
        elif task is not None:
            self.report(Lost(task.id, f"Flower did not take {len(letter.body)} bytes"))

    def _take(self, message: Message) -> None:
        sent = self._awaited.pop(message.metadata.reply_to_message_id, None)
        if sent is None:
            return  # of a node that is gone
        try:
            letter = _read(message)
            if sent.task is None:
                self._join(sent.node, letter)
            else:
                reply = Reply.from_bytes(letter.body)
                if (reply.task, reply.client) != (sent.task.id, sent.task.client):
                    raise PayloadError(f"it replied to task {reply.task} of {reply.client}")
                self.report(Arrived(reply))
        except AnabranchError as error:
            if sent.task is None:
                self._silent[sent.node] = f"node {sent.node}: {error}"
                logger.warning("%s", self._silent[sent.node])
            else:
                self.report(Lost(sent.task.id, f"{sent.task.client}: {error}"))

    def _join(self, node: int, letter: Letter) -> None:
        name, examples = letter.facts.get("name"), letter.facts.get("examples")
        if letter.kind != "here" or not isinstance(name, str) or type(examples) is not int:
            raise PayloadError("it does not say who it is")
        if name in self._members:
            raise FederationError(f"{name} is the name of another node already")
        with self._lock:
            self._members[name] = node, examples
            self._silent.pop(node, None)


def _read(message: Message) -> Letter:
    """The letter of an answer. Raises :class:`FederationError` with what went wrong instead."""
    if message.has_error():
        raise FederationError(message.error.reason or f"error {message.error.code} of Flower")
    record = message.content.config_records.get(RECORD, {})
    if not isinstance(data := record.get(VALUE), bytes):
        raise PayloadError("the answer is none of a node that runs client_app")
    letter = Letter.from_bytes(data)
    if letter.kind == "problem":
        raise FederationError(str(letter.facts.get("reason")))
    return letter
