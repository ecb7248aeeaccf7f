"""One round of updates on its way through the tree.

Updates come in at the gateways of their clients' nodes, which ask the round about each. Leaves and
a middle on every node, and a top on one, add them up.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation.mean import Mean
from anabranch.federated.aggregation.tree.aggregator import TYPES, Addend, Runs
from anabranch.federated.aggregation.tree.layout import Layout
from anabranch.federated.aggregation.tree.plan import TreePlan
from anabranch.federated.aggregation.tree.slots import Input, Level, Slot
from anabranch.federated.errors import (
    EmptyRound,
    FederationError,
    NotFinite,
    PayloadError,
    ReplyRefused,
)

if TYPE_CHECKING:
    from anabranch.federated.aggregation.tree.hierarchy import Hierarchy, Node

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Total:
    """What a round came to: weighted sums by name, and the weight of all of them.

    ``refused`` says which clients' updates do not count and why.
    """

    sums: dict[str, Tensor]
    weight: float
    updates: int
    like: Mapping[str, Tensor]
    refused: Mapping[str, str] = field(default_factory=dict)

    def mean(self) -> dict[str, Tensor]:
        """The weighted mean, in the types of the updates."""
        return Mean().finish(self.accumulator()).tensors

    def accumulator(self) -> dict[str, Any]:
        """For :meth:`Server.commit` of a server that averages, as if it had folded the updates."""
        types = {name: self.sums[name].new_empty(0, dtype=t.dtype) for name, t in self.like.items()}
        sums = {name: total.double() for name, total in self.sums.items()}
        return {"sums": sums, "types": types, "weight": self.weight, "removed": []}


class Round:
    """One round of updates; made by :meth:`Hierarchy.begin`."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        layout: Layout,
        clients: Sequence[str],
        placed: Mapping[str, int],
        plan: TreePlan,
    ) -> None:
        self.layout, self.plan = layout, plan
        self.sum_runs: Runs = ((hierarchy.accumulate, layout.elements),)
        self.summit = plan.top if len(placed) > 1 else next(iter(placed))
        """The node where the total will be; a node alone is its own."""
        self.over = False
        self.refused: dict[str, str] = {}
        self.at: dict[str, str] = {}
        """The node of each client."""
        self._hierarchy = hierarchy
        self._open = set(clients)
        if len(self._open) != len(clients):
            raise ConfigurationError("a client takes part twice")
        self._ended = threading.Event()
        self._senders: list[threading.Thread] = []
        self._total: Total | None = None
        self._error: Exception | None = None
        self._parts: dict[str, Part] = {}
        self.top: Slot | None = None
        if len(placed) > 1:  # with one node its middle, or its only leaf, is the top
            self.top = self._slot("top", "top", self.summit, len(placed), self._finish)
            hierarchy.nodes[self.summit].agent.open(self.top)
        left = list(clients)
        for node, count in placed.items():
            self.at |= dict.fromkeys(left[:count], node)
            del left[:count]
            self._parts[node] = Part(self, hierarchy.nodes[node], count, plan.leaves[node])

    def submit(self, client: str, body: bytes, examples: int) -> None:
        """Take a client's update: an encoded payload. Waits while the store is full.

        Raises :class:`ReplyRefused` if it is of another form, :class:`StoreFull` after the store's
        timeout; either way the round no longer waits for this client. NaN and infinity are found
        when the update is added: it is then among the :attr:`refused` of the total.
        """
        node = self._hierarchy.nodes[self._node_of(client)]
        offer = {"client": client, "examples": examples}
        try:
            values = self.layout.values(client, body)
        except ReplyRefused as error:
            self.refuse(offer, error)
            raise
        node.gateway.put(offer, values)

    def fail(self, client: str, reason: str) -> None:
        """Nothing will come from this client."""
        with self._hierarchy.lock:
            if client in self._open:
                self._open.remove(client)
                self.refused[client] = reason
                self._parts[self.at[client]].less()

    def result(self, timeout: float | None = None) -> Total:
        """Wait for the total; clients that are not there after ``timeout`` seconds are left out.

        Raises :class:`EmptyRound` if nobody is left.
        """
        if not self._ended.wait(timeout):
            for client in sorted(self._open):
                self.fail(client, f"nothing came within {timeout:g} s")
            self._ended.wait()
        for sender in self._senders:
            sender.join()  # afterwards the stores are as they were
        if self._error is not None:
            raise self._error
        assert self._total is not None
        return self._total

    # What the gateways ask

    def check(self, offer: dict[str, Any]) -> int:
        """Whether an offer may be taken in."""
        if offer.get("sum"):
            return self.layout.elements * TYPES[self._hierarchy.accumulate]
        client = str(offer["client"])
        self._node_of(client)
        if "header" in offer:
            header = bytes.fromhex(offer["header"])
            self.layout.check_header(client, header, int(offer["size"]))
        examples = offer["examples"]
        if type(examples) is not int or examples < 0:
            raise PayloadError(f"{client} says that it used {str(examples)[:80]} examples")
        return self.layout.size

    def take(self, offer: dict[str, Any], key: bytes) -> None:
        """Values are there: pass their key on."""
        hierarchy = self._hierarchy
        if offer.get("sum"):
            assert self.top is not None
            given = Input(key, self.sum_runs, 1.0, float(offer["weight"]), int(offer["updates"]))
            hierarchy.nodes[self.summit].agent.deliver(self.top, given)
            return
        client, weight = str(offer["client"]), float(offer["examples"])
        with hierarchy.lock:
            node = self._node_of(client)
            self._open.remove(client)
            self._parts[node].add(Input(key, self.layout.runs, weight, weight, client=client))

    def refuse(self, offer: dict[str, Any], error: Exception) -> None:
        """An update is not taken in."""
        logger.warning("%s: %s", offer["client"], error)
        self.fail(str(offer["client"]), str(error))

    def exclude(self, given: Input, count: int) -> None:
        """An update that was taken in has so many values that are not finite."""
        assert given.client is not None
        error = NotFinite(given.client, "the update", count)
        logger.warning("%s", error)
        self.refused[given.client] = str(error)

    def _node_of(self, client: str) -> str:
        if client not in self._open:
            known = "has sent its update or is given up" if client in self.at else "is not in it"
            raise ReplyRefused(f"{client} {known} in this round")
        return self.at[client]

    # What comes of it

    def pass_up(self, node: Node, made: Input | None) -> None:
        """A node is done."""
        agent = self._hierarchy.nodes[self.summit].agent
        if self.top is None:
            self._finish(made)
        elif made is None:
            agent.expect(self.top, self.top.expected - 1)
        elif node.name == self.summit:
            agent.deliver(self.top, made)
        else:
            sender = threading.Thread(target=self._send, args=(made, node.name), daemon=True)
            self._senders.append(sender)
            sender.start()

    def _send(self, made: Input, origin: str) -> None:
        try:
            self._hierarchy.send_sum(self.summit, made, origin)
        except (FederationError, OSError) as error:
            self.give_up(FederationError(f"the sum of {origin} did not reach the top: {error}"))

    def _finish(self, made: Input | None) -> None:
        if made is None or not made.weight > 0:
            reasons = "; ".join(f"{client}: {why}" for client, why in self.refused.items())
            error = EmptyRound(f"no update has a weight above 0{reasons and ': '}{reasons}")
            if made is not None:
                self._hierarchy.nodes[self.summit].store.release(made.key)
            self._end(None, error)
            return
        store = self._hierarchy.nodes[self.summit].store
        # Private memory: what is left of the round does not fill the store.
        sums = Addend(store.get(made.key), self.sum_runs).part(0, self.layout.elements).copy()
        store.release(made.key)
        total = Total(
            self.layout.tensors(sums),
            made.weight,
            made.updates,
            self.layout.like,
            self.refused,
        )
        self._end(total, None)

    def give_up(self, error: Exception) -> None:
        """The round cannot end well."""
        with self._hierarchy.lock:
            for part in self._parts.values():
                part.drop()
            if self.top is not None:
                self._hierarchy.nodes[self.summit].agent.drop(self.top)
            self._end(None, error)

    def _end(self, total: Total | None, error: Exception | None) -> None:
        if not self.over:
            self._total, self._error, self.over = total, error, True
            self._ended.set()

    def _slot(
        self,
        name: str,
        level: Level,
        node: str,
        expected: int,
        done: Callable[[Input | None], None],
        refused: Callable[[Input, int], None] | None = None,
    ) -> Slot:
        return Slot(
            f"{name} on {node}",
            level,
            self.sum_runs,
            expected,
            done,
            self.give_up,
            refused or _sums_are_not_refused,
            self._hierarchy.eager,
        )


def _sums_are_not_refused(given: Input, count: int) -> None:
    raise AssertionError(f"a sum is none of a client's updates: {given}, {count}")


class Part:
    """The part of a round's tree that lies on one node.

    Leaves are filled one after the other in the order of arrival, so that few are open at a time;
    if a client fails, the last one waits for one update less.
    """

    def __init__(self, round_: Round, node: Node, clients: int, leaves: int) -> None:
        self._node, self._agent = node, node.agent
        self._clients, self._arrived = clients, 0
        self._excluded: Counter[int] = Counter()
        """Updates that turned out not to be finite, by leaf."""
        self._round = round_
        self._size = -(-clients // leaves)
        count = -(-clients // self._size)

        def up(made: Input | None) -> None:
            round_.pass_up(node, made)

        self._middle: Slot | None = None
        done = up
        if count > 1:
            self._middle = round_._slot("middle", "middle", node.name, count, up)
            self._agent.open(self._middle)
            done = self._from_leaf
        self._leaves = [
            round_._slot(
                f"leaf {n}", "leaf", node.name, self._expected(n), done, partial(self._exclude, n)
            )
            for n in range(count)
        ]
        for leaf in self._leaves:
            self._agent.open(leaf)

    def add(self, given: Input) -> None:
        """An update is there."""
        leaf = self._leaves[self._arrived // self._size]
        self._arrived += 1
        self._agent.deliver(leaf, given)

    def less(self) -> None:
        """A client fewer."""
        self._clients -= 1
        number = self._clients // self._size
        self._agent.expect(self._leaves[number], self._expected(number))

    def drop(self) -> None:
        """Forget everything."""
        for slot in [*self._leaves, *([self._middle] if self._middle else [])]:
            self._agent.drop(slot)

    def _expected(self, leaf: int) -> int:
        places = max(0, min(self._size, self._clients - leaf * self._size))
        return places - self._excluded[leaf]

    def _exclude(self, leaf: int, given: Input, count: int) -> None:
        self._excluded[leaf] += 1
        self._round.exclude(given, count)

    def _from_leaf(self, made: Input | None) -> None:
        assert self._middle is not None
        if made is None:
            self._agent.expect(self._middle, self._middle.expected - 1)
        else:
            self._agent.deliver(self._middle, made)
