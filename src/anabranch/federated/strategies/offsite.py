"""Offsite tuning: clients train outer layers around an emulator and never see the full model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from anabranch.adapters.errors import AdapterMismatch
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import FederationError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.reading import require_same
from anabranch.federated.seeded_model import digest
from anabranch.federated.server import Server, ServerContext
from anabranch.federated.shared import shared_tensors, tensors_of
from anabranch.federated.strategies.fedavg import FedAvg, FedAvgServer, LocalClient


class Offsite(FedAvg):
    """FedAvg over a part of a model, whose rest the server sends once and keeps frozen.

    Xiao, Lin, Han 2023, "Offsite-Tuning", as federated in FederatedScope-LLM (Kuang et al. 2023,
    section 4.2). Use it where clients must not have the full model, or cannot hold it: make an
    emulator (:func:`anabranch.federated.emulator.make_emulator`), federate it, and put what was
    learned into the full model (:func:`anabranch.federated.emulator.plug_in`).

    What a model does not train goes to a client once, unless its own copy is the same already; then
    rounds exchange what is trained. A site keeps the frozen part in its personal state, which is
    written with every reply. The options are FedAvg's.
    """

    name = "offsite"

    def begin(self, model: nn.Module) -> Server:
        """Averages what is trained, and has the rest to send."""
        return OffsiteServer(self, shared_tensors(model), frozen_part(model))

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Averages; the sites must have everything else."""
        return OffsiteServer(self, start, {})

    def client(self, local: LocalTraining) -> Client:
        """Trains, with the frozen part that it was sent."""
        return OffsiteClient(local, self.upload)


class OffsiteServer(FedAvgServer):
    """FedAvg's server with frozen tensors for whoever lacks them."""

    def __init__(
        self, options: FedAvg, start: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
    ) -> None:
        super().__init__(options, start)
        self.frozen = dict(frozen)
        self.frozen_id = digest(frozen)
        self._message: tuple[Any, Payload] | None = None

    def setup(self, ctx: ServerContext) -> None:
        """Names of frozen and trained tensors must be apart."""
        if both := self.frozen.keys() & self.tensors.keys():
            raise FederationError(f"both frozen and trained: {', '.join(sorted(both))}")

    def settings(self) -> dict[str, Any]:
        """The method's, and which frozen part it is."""
        return {**super().settings(), "frozen": self.frozen_id}

    def message(self, client: str, kind: str) -> Payload:
        """The present version, and with kind ``frozen`` the rest of the model."""
        if kind == "frozen":
            return {**self.tensors, **self.frozen, _ID: self.frozen_id}
        if self._message is None or self._message[0] is not self.tensors:
            self._message = self.tensors, {**self.tensors, _ID: self.frozen_id}
        return self._message[1]

    def expects(self, client: str, kind: str) -> None:
        """Judged in :meth:`respond`, as a site that lacks the frozen part sends nothing."""
        return

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """Send the frozen part to whoever replied nothing."""
        if reply.kind == "train" and not tensors_of(payload):
            return "frozen"
        require_same(reply.client, self.tensors, payload)
        return None


class OffsiteClient(LocalClient):
    """FedAvg's client with a frozen part from the server."""

    def setup(self, ctx: ClientContext) -> None:
        """Note which frozen part the site's own model has."""
        ctx.state["held"], ctx.state["frozen"] = digest(frozen_part(ctx.model)), {}

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Weights, or their change; nothing if the frozen part is another one."""
        if kind == "frozen":
            self._keep(ctx, payload)
        if payload[_ID] not in (ctx.state["held"], _NOTHING):
            ctx.exchange["awaits"] = "frozen"  # so that a crash does not lose the exchange
            return {}, 0
        ctx.exchange.clear()
        frozen = ctx.state["frozen"]
        start = {n: t for n, t in tensors_of(payload).items() if n not in frozen}
        result = self.local.run(ctx, {**start, **frozen}, self.hooks(ctx, start))
        found = {name: result.tensors[name] for name in start}
        if self.upload == "weights":
            return found, result.examples
        return {name: found[name] - x for name, x in start.items()}, result.examples

    def _keep(self, ctx: ClientContext, payload: Mapping[str, Value]) -> None:
        names = frozen_part(ctx.model)
        received = {n: t for n, t in tensors_of(payload).items() if n in names}
        if digest(received) != payload[_ID]:
            raise AdapterMismatch(
                f"{ctx.name} has a model of another form: of the frozen part that it was sent, it "
                f"has a place for {len(received)} tensors only"
            )
        ctx.state["held"], ctx.state["frozen"] = payload[_ID], received


def frozen_part(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are not trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


_ID = "frozen part"
_NOTHING = digest({})
"""Of a server that has nothing to send."""
