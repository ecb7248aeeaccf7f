"""A round's mean from a tree of aggregators that exist only while updates arrive (LIFL).

Qi, Ramakrishnan and Lee, "LIFL: A Lightweight, Event-driven Serverless Platform for Federated
Learning", MLSys 2024. Nodes are stores of their own; between them sums travel over TCP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from anabranch.closing import Closing
from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation.mean import Mean
from anabranch.federated.aggregation.tree.agent import Agent
from anabranch.federated.aggregation.tree.gateway import Gateway, Link
from anabranch.federated.aggregation.tree.layout import Layout
from anabranch.federated.aggregation.tree.plan import TreePlan, plan_hierarchy
from anabranch.federated.aggregation.tree.round import Round
from anabranch.federated.aggregation.tree.slots import Input
from anabranch.federated.aggregation.tree.store import SharedStore
from anabranch.federated.errors import EmptyRound, FederationError, ReplyRefused, TopologyError
from anabranch.federated.scheduling.placement import Ewma, Residual, best_fit
from anabranch.federated.server import Server

Place = Callable[[Residual, int], dict[str, int]]


@dataclass
class Node:
    """One machine: its store, its door, and its aggregators."""

    name: str
    capacity: float
    store: SharedStore
    gateway: Gateway
    agent: Agent
    address: tuple[str, int] | None = None
    load: Ewma = field(default_factory=Ewma)


class Hierarchy(Closing):
    """Aggregates rounds of updates on one or several nodes.

    ``capacity`` maps node names to the updates that each can take at once; a number of nodes gives
    each 20. ``memory`` are bytes of each node's store. ``fan_in`` updates go to a leaf. ``eager``
    aggregators add an update when it arrives, others when the last one is there. ``accumulate``:
    sums are ``f64``, in which no order shows, or ``f32``, half as large. ``place`` chooses nodes
    for clients. Aggregators stay for ``keep_alive`` seconds without work.

    Example::

        with Hierarchy(fan_in=8) as hierarchy:
            round = hierarchy.begin(server.expects("", "train"), clients)
            round.submit("client-1", body, examples=120)
            ...
            server.commit(round.result(timeout=60).accumulator())
    """

    def __init__(
        self,
        capacity: int | Mapping[str, float] = 1,
        *,
        memory: int = 2**30,
        fan_in: int = 2,
        eager: bool = True,
        accumulate: Literal["f64", "f32"] = "f64",
        place: Place = best_fit,
        keep_alive: float = 30.0,
        timeout: float = 60.0,
    ) -> None:
        if isinstance(capacity, int):
            capacity = {f"node-{number}": 20.0 for number in range(capacity)}
        if not capacity or not all(value > 0 for value in capacity.values()):
            raise ConfigurationError(f"every node has a capacity above 0, not {dict(capacity)}")
        if fan_in < 2:
            raise ConfigurationError(f"fan_in is at least 2, not {fan_in}")
        if accumulate not in ("f64", "f32"):
            raise ConfigurationError(f"sums are f64 or f32, not {accumulate!r}")
        self.fan_in, self.eager, self.place = fan_in, eager, place
        self.accumulate = accumulate
        self.round: Round | None = None
        self.cross_bytes = 0
        """Bytes of sums that went from node to node."""
        self.lock = threading.RLock()
        self.nodes: dict[str, Node] = {}
        for name, room in sorted(capacity.items()):
            store = SharedStore(memory, timeout)
            agent = Agent(store, keep_alive=keep_alive, lock=self.lock)
            gateway = Gateway(store, self._desk)
            self.nodes[name] = Node(name, room, store, gateway, agent)
        if len(self.nodes) > 1:
            for node in self.nodes.values():
                node.address = node.gateway.listen_tcp()

    def begin(
        self, expects: Mapping[str, Tensor], clients: Sequence[str], plan: TreePlan | None = None
    ) -> Round:
        """Open a round: place the clients and plan the tree, or follow a plan.

        ``expects`` are tensors of the names, shapes and types that every update has.
        """
        if self.round is not None and not self.round.over:
            raise FederationError("the round before is not over; ask for its result first")
        if not clients:
            raise EmptyRound("a round without clients")
        layout = Layout.of(expects)
        small = {n: node.store.capacity for n, node in self.nodes.items()}
        if min(small.values()) < layout.size:
            raise ConfigurationError(f"an update of {layout.size:,} bytes fits into no store")
        placed = self.place({n: node.capacity for n, node in self.nodes.items()}, len(clients))
        if plan is None:
            queue = {n: self.nodes[n].load.add(count) for n, count in placed.items()}
            plan = plan_hierarchy(queue, self.fan_in)
        elif missing := placed.keys() - plan.leaves.keys():
            raise ConfigurationError(f"the plan has no leaf on {', '.join(sorted(missing))}")
        self.round = Round(self, layout, clients, placed, plan)
        return self.round

    def send_sum(self, target: str, given: Input, origin: str) -> None:
        """Carry a node's sum to the node of the top."""
        source, address = self.nodes[origin], self.nodes[target].address
        assert address is not None
        link = Link(address, self.nodes[target].gateway.token, local=False)
        try:
            values = source.store.get(given.key)
            self.cross_bytes += len(values)
            more = {"weight": given.weight, "updates": given.updates, "sum": True}
            link.deliver(origin, 0, b"", values, **more)
        finally:
            link.close()
            source.store.release(given.key)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all aggregators, without that of this process."""
        return sum(node.agent.cpu_seconds for node in self.nodes.values())

    def close(self) -> None:
        """End aggregators and free stores."""
        for node in self.nodes.values():
            node.gateway.close()
        for node in self.nodes.values():
            node.agent.close()
            node.store.close()

    def _desk(self) -> Round:
        if self.round is None or self.round.over:
            raise ReplyRefused("no round is under way")
        return self.round


def require_mean(server: Server) -> None:
    """Raise :class:`TopologyError` unless a server only wants the weighted mean of its updates."""
    rule = getattr(getattr(server, "options", None), "rule", None)
    if not (server.associative and isinstance(rule, Mean)):
        raise TopologyError(
            f"aggregators in processes add up weighted means; {type(server).__name__} folds "
            f"updates in another way: use Tree, or a star"
        )
