"""Methods with a barrier as a Flower strategy, for apps that run Flower's own loop already.

The coordinator decides in there, too; Flower's strategy only turns its tasks into messages and
replies into what happened. So sampling, warm-ups, checks and sums are those of every other runtime.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Client
from anabranch.federated.codecs import Identity
from anabranch.federated.coordinator import Coordinator
from anabranch.federated.errors import FederationError, PayloadError
from anabranch.federated.messages import UNSPECIFIED, Reply, Task, Work
from anabranch.federated.node import Agreement, Node
from anabranch.federated.payload import Payload, Value
from anabranch.federated.runtimes import Arrived, ClientJoined, ClientLeft, Input, Lost, Timed
from anabranch.federated.runtimes.network import agreed
from anabranch.federated.scheduling import Everyone, Sampler, Schedule, Sync
from anabranch.federated.server import Server
from anabranch.federated.store import ClientStore
from anabranch.federated.strategies import Strategy

logger = logging.getLogger(__name__)

EXAMPLES = "num-examples"
"""The metric that Flower's own apps weigh replies by."""
VALUES = "values"
"""The record with whatever of a payload is no tensor."""
STATE = "anabranch"
WAIT_S = 1.0


def to_flower_strategy(
    method: Strategy | Server,
    rounds: int,
    *,
    sampler: Sampler | None = None,
    work: Work = UNSPECIFIED,
    seed: int = 0,
    **options: Any,
) -> FlowerStrategy:
    """A method as a strategy of Flower, for ``rounds`` of them.

    A :class:`Strategy` begins with the arrays that Flower's loop is started with. One that must
    know the model (FedIT, Fed-SB) is given as ``method.begin(model)``. ``options`` are those of
    Flower's FedAvg, which evaluates. Clients answer by :func:`answer`, or by an app of their own:
    whatever the method wants as arrays, and the metric ``num-examples``.

    Raises :class:`ConfigurationError` for methods without a barrier or without a server.

    Example::

        strategy = to_flower_strategy(FedProx(mu=0.1), rounds=20)
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=20)
    """
    schedule: Schedule
    if isinstance(method, Server):
        name, schedule = type(method).__name__, Sync(rounds, sampler or Everyone(), work)
        decentralised = method.opaque
    else:
        name, decentralised = method.name, method.decentralised
        schedule = method.schedule(rounds, sampler)
        if isinstance(schedule, Sync):
            schedule.work = work
    if decentralised or not isinstance(schedule, Sync):
        raise ConfigurationError(
            f"{name} has no rounds with a server, which is all that a strategy of Flower can be; "
            f"the runtime Flower(grid) runs it"
        )
    return FlowerStrategy(method, schedule, seed, **options)


class FlowerStrategy(FedAvg):
    """Made by :func:`to_flower_strategy`.

    A message each way is a round of Flower's: where a method begins by an exchange of two, its
    first version takes two. A node that failed, or did not answer in time, is not waited for.
    Claims of examples are taken as they come, because nodes declare nothing beforehand.
    """

    def __init__(
        self, method: Strategy | Server, schedule: Sync, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.method, self.schedule, self.seed = method, schedule, seed
        self.coordinator: Coordinator | None = None
        """None before the first round."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The tasks of a round."""
        made = self.coordinator or self._begin(arrays, grid)
        tasks: list[Task] = []
        while not tasks:
            if made.state.stopped is not None:
                raise ConfigurationError(
                    f"this strategy was made for {self.schedule.versions} versions, which are there"
                )
            self._tell_who_is_there(made, server_round, grid)
            tasks = [item for item in made.outbox if isinstance(item, Task)]
            made.outbox.clear()
            tasks = [task for task in tasks if task.id in made.in_flight]
            if not tasks:
                time.sleep(WAIT_S)  # for nodes
        return [self._message(made, task, server_round, config) for task in tasks]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next version, and what is known of it; None and None if the round made none."""
        made = self.coordinator
        if made is None:
            raise FederationError("nothing was sent yet: configure_train comes first")
        before = made.version
        sent = {task.client: task for task in made.in_flight.values()}
        happened: dict[int, Input] = {}
        for message in replies:
            task = sent.get(str(message.metadata.src_node_id))
            if task is not None:
                happened[task.id] = _read(made, task, message)
        for task in sent.values():
            missing = Lost(task.id, f"node {task.client} did not answer in time")
            made.handle(Timed(float(server_round), happened.get(task.id, missing)))
        if made.version == before:
            return None, None
        figures = {name: float(value) for name, value in made.state.history[-1].items()}
        return to_arrays(_tensors(made.server)), MetricRecord(figures)

    def _begin(self, arrays: ArrayRecord, grid: Grid) -> Coordinator:
        start, method = from_arrays(arrays), self.method
        server = method if isinstance(method, Server) else method.server(start)
        while len(nodes := _names(grid)) < max(1, self.min_available_nodes):
            logger.info("%d of %d nodes are there", len(nodes), self.min_available_nodes)
            time.sleep(WAIT_S)
        self.coordinator = made = Coordinator(server, self.schedule, seed=self.seed)
        made.set_up(dict.fromkeys(nodes, sys.maxsize))
        made.start()
        return made

    def _tell_who_is_there(self, made: Coordinator, server_round: int, grid: Grid) -> None:
        there, known, now = _names(grid), set(made.clients), float(server_round)
        for name in sorted(known - there):
            made.handle(Timed(now, ClientLeft(name)))
        for name in sorted(there - known):
            made.handle(Timed(now, ClientJoined(name, sys.maxsize)))

    def _message(
        self, made: Coordinator, task: Task, server_round: int, config: ConfigRecord
    ) -> Message:
        agreement = Agreement(_Elsewhere(), made.seed, made.wire, Identity(), Identity())
        facts = {
            **config,
            "server-round": server_round,
            "task": replace(task, body=b"").to_bytes(),
            "agreement": json.dumps(agreed.to_json(agreement, absent_after=0.0)),
        }
        payload = made.wire.decode("down", task.kind, task.body)
        content = _records(payload, self.arrayrecord_key)
        content[self.configrecord_key] = ConfigRecord(facts)
        return Message(content, dst_node_id=int(task.client), message_type=MessageType.TRAIN)


def answer(
    message: Message, context: Context, client: Client, data: Any = None, model: Any = None
) -> Message:
    """Do a task of a :class:`FlowerStrategy` in a ClientApp, with personal state in ``context``.

    Raises :class:`FederationError` with the client's error; the state is then as before.
    """
    config: Any = next(c for c in message.content.config_records.values() if "agreement" in c)
    agreement = agreed.agree(json.loads(config["agreement"]), client)
    task = Task.from_bytes(config["task"])
    body = agreement.wire.encode("down", task.kind, _payload(message.content))
    task = replace(task, body=body)
    reply = _handle(task, agreement, context, data, model)
    if reply.error:
        raise FederationError(reply.error)
    content = _records(agreement.wire.decode("up", reply.kind, reply.body), "arrays")
    figures = {EXAMPLES: reply.examples, "units": reply.units, **reply.metrics}
    content["metrics"] = MetricRecord(figures)
    return Message(content, reply_to=message)


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Flower's record of these tensors. Raises :class:`ConfigurationError` for bfloat16."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            raise ConfigurationError(f"{name} is bfloat16, which Flower's arrays cannot be")
    return ArrayRecord({n: Array(t.detach().cpu().numpy()) for n, t in tensors.items()})


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of Flower's record, copied."""
    # Empty arrays have strides that only NumPy likes; a contiguous copy has torch's own.
    as_torch = {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}
    return {n: t.clone(memory_format=torch.contiguous_format) for n, t in as_torch.items()}


class _Elsewhere(Client):
    """The coordinator's side of an agreement has no client."""

    def run(self, ctx: Any, kind: str, payload: dict[str, Value]) -> tuple[Payload, int]:
        raise FederationError("clients work at their nodes")


def _names(grid: Grid) -> set[str]:
    return {str(node) for node in grid.get_node_ids()}


def _tensors(server: Server) -> Mapping[str, Tensor]:
    """The present version, or what of it clients are sent."""
    tensors = getattr(server, "tensors", None)
    if isinstance(tensors, Mapping):
        return tensors
    return {n: v for n, v in server.message("", "train").items() if isinstance(v, Tensor)}


def _records(payload: Payload, arrays: str) -> RecordDict:
    tensors = {name: value for name, value in payload.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in payload.items() if name not in tensors}
    return RecordDict({arrays: to_arrays(tensors), VALUES: ConfigRecord(others)})


def _payload(content: RecordDict) -> dict[str, Value]:
    records = list(content.array_records.values())
    if len(records) > 1:
        raise PayloadError(f"{len(records)} array records; one is right")
    tensors: dict[str, Value] = dict(from_arrays(records[0])) if records else {}
    return {**tensors, **content.config_records.get(VALUES, {})}


def _read(made: Coordinator, task: Task, message: Message) -> Input:
    """What a message means. The coordinator checks what is in it."""
    if message.has_error():
        return Lost(task.id, f"node {task.client}: {message.error.reason}")
    metrics = {
        n: v for record in message.content.metric_records.values() for n, v in record.items()
    }
    examples, units = metrics.pop(EXAMPLES, None), metrics.pop("units", 0.0)
    if not isinstance(examples, int | float):
        return Lost(task.id, f"node {task.client} does not say its {EXAMPLES}")
    try:
        body = made.wire.encode("up", task.kind, _payload(message.content))
    except PayloadError as error:
        return Lost(task.id, f"node {task.client}: {error}")
    figures = {name: float(v) for name, v in metrics.items() if isinstance(v, int | float)}
    return Arrived(
        Reply(
            task.id,
            task.client,
            task.kind,
            task.version,
            examples=int(examples),
            units=float(units),
            metrics=figures,
            body=body,
        )
    )


def _handle(task: Task, agreement: Agreement, context: Context, data: Any, model: Any) -> Reply:
    """A node's work with its stored state, which lives in Flower's context between messages."""
    with tempfile.TemporaryDirectory(prefix="anabranch-site-") as folder:
        file = ClientStore(Path(folder), task.client).path
        stored: Any = context.state.config_records.get(STATE)
        if stored:
            file.write_bytes(stored["file"])
        kept = replace(agreement, folder=Path(folder))
        reply = Node(task.client, kept, data, model).handle(task)
        context.state[STATE] = ConfigRecord({"file": file.read_bytes()})
    return reply
