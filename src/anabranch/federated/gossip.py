"""Learning without a server: peers average with their neighbours.

A :class:`Peer` makes any method's client such a peer, a :class:`Relay` hands messages on unread.
The schedule is :class:`Gossip`, the topology a :class:`Graph`::

    Federation(Relay(), Peer(client), Gossip(rounds=30), runtime, topology=graph)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import PayloadMismatch, TopologyError
from anabranch.federated.payload import Payload, Value
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.shared import shared_tensors, tensors_of
from anabranch.federated.topologies import Graph


class Relay(Server):
    """Files what each peer sends, and gives it to the neighbours as it came.

    A peer whose message did not come is represented by its last one of this round; if there is
    none, its weight goes to whoever misses it. Then the mean is not kept exactly.
    """

    opaque = True

    def __init__(self) -> None:
        self.mailbox: dict[str, tuple[str, bytes]] = {}
        """Kind and body of each peer's last message in this round."""
        self._empty: dict[str, Value] = {}

    def setup(self, ctx: ServerContext) -> None:
        """Learn who is whose neighbour."""
        if not isinstance(ctx.topology, Graph):
            raise TopologyError(
                f"peers need a graph for a topology, not {type(ctx.topology).__name__}"
            )
        self.graph = ctx.topology

    def message(self, client: str, kind: str) -> Payload:
        """Nothing to train from; to mix, the neighbours' messages and their weights."""
        if kind == "train":
            return self._empty
        payload: dict[str, Value] = {}
        own = 0.0
        for name, weight in self.graph.neighbours(client).items():
            if name == client or name not in self.mailbox:
                own += weight
            else:
                sent_as, body = self.mailbox[name]
                payload |= {
                    f"body/{name}": body,
                    f"kind/{name}": sent_as,
                    f"weight/{name}": weight,
                }
        return {**payload, "own": own}

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Keep the message."""
        return {**(acc or {}), update.client: (update.kind, update.payload["body"])}

    def commit(self, acc: Accumulator) -> Mapping[str, float] | None:
        """A round begins with training, before which there is no mail."""
        if all(kind == "train" for kind, _ in acc.values()):
            self.mailbox = {}
        self.mailbox = {**self.mailbox, **acc}
        return None

    def state_dict(self) -> dict[str, Any]:
        """The mailbox."""
        return {"mailbox": self.mailbox}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.mailbox = {name: (kind, body) for name, (kind, body) in state["mailbox"].items()}


class Peer(Client):
    """A site with a model of its own, which begins as the shared base says.

    ``client`` does the training: it is given the site's own weights and answers with weights
    or with a difference to them (``upload``).
    """

    def __init__(self, client: Client, upload: Literal["delta", "weights"] = "delta") -> None:
        self.client = client
        self.upload = upload

    def setup(self, ctx: ClientContext) -> None:
        """The first weights."""
        self.client.setup(ctx)
        ctx.state["own"] = shared_tensors(ctx.model)

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """``train`` by the client, or ``mix`` with what the neighbours sent; both answer with the
        weights that come of it.
        """
        if kind == "mix":
            ctx.state["own"] = self._mixed(ctx, payload)
            return ctx.state["own"], len(ctx.data)
        answer, examples = self.client.run(ctx, kind, dict(ctx.state["own"]))
        trained = tensors_of(answer)
        if self.upload == "delta":
            trained = {name: own + trained[name] for name, own in ctx.state["own"].items()}
        ctx.state["own"] = trained
        return trained, examples

    def _mixed(self, ctx: ClientContext, payload: Mapping[str, Value]) -> dict[str, Tensor]:
        own: dict[str, Tensor] = ctx.state["own"]
        weight = payload["own"]
        assert isinstance(weight, float)
        total = {name: tensor.to(torch.float64) * weight for name, tensor in own.items()}
        for key in sorted(key for key in payload if key.startswith("body/")):
            name = key.removeprefix("body/")
            body, kind = payload[key], payload[f"kind/{name}"]
            share = payload[f"weight/{name}"]
            assert isinstance(body, bytes) and isinstance(kind, str) and isinstance(share, float)
            theirs = tensors_of(ctx.open_peer(body, kind))
            for tensor, mine in own.items():
                if tensor not in theirs or theirs[tensor].shape != mine.shape:
                    got = list(theirs[tensor].shape) if tensor in theirs else "absent"
                    raise PayloadMismatch(name, tensor, str(list(mine.shape)), str(got))
                total[tensor] += theirs[tensor].to(torch.float64) * share
        return {name: tensor.to(own[name].dtype) for name, tensor in total.items()}
