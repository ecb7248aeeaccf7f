"""Just One Byte: peers with one model, who tell each other one byte a gradient."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import EmptyRound, FederationError, PayloadError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.randomness import derive_seed
from anabranch.federated.replay import (
    Contribution,
    Kind,
    ReplayedModel,
    ReplayLog,
    ScalarQuantiser,
    pack,
    unpack,
)
from anabranch.federated.seeded_directions import ENGINE
from anabranch.federated.seeded_model import digest, require_same_base
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.shared import shared_tensors
from anabranch.federated.slopes import Slopes, require_plain
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.wire import Direction, Field, Schema

_NUMBERS = ("base", "directions", "run", "machine", "first")
"""Whole numbers in what a peer is sent."""


class ReplicaDivergence(FederationError):
    """Replicas differ and no model is that of a majority. The run stops before it learns on."""


class DirectionsMismatch(FederationError):
    """A peer draws other directions from the same names: replaying would give another model."""


class JustOneByte(Strategy):
    """Everyone holds the model; slopes along agreed random directions travel, one byte each
    (Zelikman et al. 2023, "Just One Byte (per gradient)", section 2).

    Use it between peers on thin or changing links. They may leave at any time, and whoever joins
    replays the log of bytes instead of downloading weights. The coordinator is a relay: it files
    the list of contributions that count, and never needs the model.

    In an iteration every peer measures as many slopes as the job's ``local`` section has steps
    (its optimiser and rate are not used). ``eps`` is how far the two losses of a slope are apart,
    ``lr`` multiplies the mean of all slopes (the authors' rate is this one over ``eps``).
    ``codes`` are ``int8``, whose scale follows the slopes, ``float8_e4m3``, whose scale is fixed,
    or ``float32``.

    Digests of the model travel with the replies, outside of their payload: a peer that is not with
    the majority is made to replay the whole log.
    """

    name = "just-one-byte"

    def __init__(self, lr: float = 0.1, eps: float = 1e-3, codes: Kind = "int8") -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigurationError(f"{name} is above 0 and finite, not {value}")
        self.lr, self.eps = lr, eps
        self.quantiser = ScalarQuantiser(codes)

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Relays bytes."""
        return OneByteRelay(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Replays and measures."""
        require_plain(local, self.name)
        return OneBytePeer(self, local)


class OneByteRelay(Server):
    """The log of all iterations, and how far each peer has it."""

    associative = True

    def __init__(self, options: JustOneByte, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.start = start
        self.base = digest(start)
        self.records: list[bytes] = []
        self.machines: dict[str, int] = {}
        """Numbers of the peers, in the order in which they came."""
        self.known: dict[str, int] = {}
        """How many records each peer has applied, as far as it said."""
        self.astray: list[str] = []
        """Peers who must begin again from the base."""
        self._shown: ReplayedModel | None = None

    def setup(self, ctx: ServerContext) -> None:
        """Name the directions."""
        self.run = derive_seed(ctx.seed, "just one byte")

    def settings(self) -> dict[str, Any]:
        """The method's, and the base."""
        o = self.options
        return {
            "strategy": o.name,
            "lr": o.lr,
            "eps": o.eps,
            "codes": o.quantiser.kind,
            "base": self.base,
            "directions": ENGINE,
        }

    def schemas(self) -> Mapping[tuple[Direction, str], Schema]:
        """Nothing but the values; up, nothing but the codes."""
        numbers = [Field(name, "int") for name in _NUMBERS]
        down = (*numbers, Field("again", "bool"), Field("log", "bytes"))
        return {
            ("down", "train"): Schema(down),
            ("up", "train"): Schema((Field("codes", "bytes"),)),
        }

    def message(self, client: str, kind: str) -> Payload:
        """The records that the peer has not applied yet, from number ``first`` on."""
        machine = self.machines.setdefault(client, len(self.machines))
        again = client in self.astray
        first = 0 if again else self.known.get(client, 0)
        return {
            "base": self.base,
            "directions": ENGINE,
            "run": self.run,
            "machine": machine,
            "first": first,
            "again": again,
            "log": b"".join(self.records[first:]),
        }

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """Refuse what are no codes, or not as many as slopes; note how far the peer is."""
        codes, said = payload.get("codes"), reply.metrics.get("iteration", -1)
        width = self.options.quantiser.width
        if not isinstance(codes, bytes) or len(codes) % width or len(codes) // width >= 2**16:
            raise PayloadError(f"{reply.client} sent no list of codes of {width} bytes")
        if len(codes) != width * reply.units:
            raise PayloadError(
                f"{reply.client} says that it measured {reply.units:g} slopes, but sent codes of "
                f"{len(codes) // width}"
            )
        if not (0 <= said <= len(self.records) and said == int(said)):
            raise PayloadError(f"{reply.client} says that it is at iteration {said:g}")
        self.known[reply.client] = int(said)
        return None

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """List client, iteration, digest and codes."""
        there = [
            update.client,
            update.version,
            update.metrics.get("digest", -1.0),
            update.payload["codes"],
        ]
        return [*(acc or []), there]

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Both lists."""
        return [*one, *other]

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """File what counts: the codes of peers that have the model of the majority."""
        agreed = _majorities(acc)
        astray = [client for client, at, found, _ in acc if found != agreed[at]]
        now = len(self.records)
        record = [
            Contribution(self.machines[client], now - at, codes)
            for client, at, found, codes in acc
            if codes and found == agreed[at]
        ]
        if not record:
            raise EmptyRound("no peer measured anything; the model stays as it was")
        record.sort(key=lambda part: (-part.age, part.machine))
        healed = {client for client, *_ in acc} - set(astray)
        self.astray = sorted({*self.astray, *astray} - healed)
        self.records.append(pack(record, self.options.quantiser.width))
        figures = {"iteration": now, "digest": agreed[max(agreed)], "peers": len(record)}
        return figures | ({"astray": len(astray)} if astray else {})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The model of this version, as any peer replays it."""
        shown = self._shown
        if shown is None or shown.run != self.run or shown.iteration > len(self.records):
            shown = ReplayedModel(self.start, self.options.lr, self.run, self.options.quantiser)
            self._shown = shown
        for record in unpack(
            b"".join(self.records[shown.iteration :]), self.options.quantiser.width
        ):
            shown.apply(record)
        return shown.model.tensors

    @property
    def log(self) -> ReplayLog:
        """This version as a file that gives the model to whoever has the base."""
        o = self.options
        records = b"".join(self.records)
        return ReplayLog(self.base, digest(self.tensors), self.run, o.lr, o.quantiser.kind, records)

    def export(self, folder: Path) -> None:
        """``replay.log``."""
        self.log.save(folder / "replay.log")

    def state_dict(self) -> dict[str, Any]:
        """The log and the peers."""
        return {
            "records": self.records,
            "machines": self.machines,
            "known": self.known,
            "astray": self.astray,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.records, self.astray = list(state["records"]), list(state["astray"])
        self.machines, self.known = dict(state["machines"]), dict(state["known"])


class OneBytePeer(Client):
    """Applies what everyone said, then measures slopes of its own data."""

    def __init__(self, options: JustOneByte, local: LocalTraining) -> None:
        self.options = options
        self.local = local

    def setup(self, ctx: ClientContext) -> None:
        """Note which base weights are here."""
        ctx.state["base"] = digest(shared_tensors(ctx.model))

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Codes of the slopes. A peer that lacks records before the first one sends none."""
        numbers = {name: value for name, value in payload.items() if isinstance(value, int)}
        require_same_base(ctx.name, ctx.state["base"], numbers["base"])
        if numbers["directions"] != ENGINE:
            raise DirectionsMismatch(
                f"{ctx.name} draws directions the way {ENGINE}, the run the way "
                f"{numbers['directions']}; both sides need the same version of anabranch"
            )
        o = self.options
        replica = ReplayedModel(shared_tensors(ctx.model), o.lr, numbers["run"], o.quantiser)
        if "replica" in ctx.state and not payload["again"]:
            replica.load_state_dict(ctx.state["replica"])
        ctx.report(iteration=replica.iteration)
        if replica.iteration < numbers["first"]:
            return {"codes": b""}, 0
        log = payload["log"]
        assert isinstance(log, bytes)
        for record in unpack(log, o.quantiser.width)[replica.iteration - numbers["first"] :]:
            replica.apply(record)
        ctx.state["replica"] = replica.state_dict()
        ctx.report(iteration=replica.iteration, digest=digest(replica.model.tensors))
        return self._measure(ctx, replica, numbers["machine"])

    def _measure(self, ctx: ClientContext, replica: ReplayedModel, machine: int) -> Answer:
        slopes = Slopes(ctx, self.local, self.options.eps)
        measured, losses = [], []
        with replica.model.lend(ctx.model):
            for sample in range(slopes.steps):
                seed = replica.seed(replica.iteration, machine, sample)
                slope = slopes.along(replica.model, ctx.model, seed, slopes.next_batch())
                measured.append(slope.value * ctx.work.lr_scale)
                losses.append(slope.loss)
        ctx.spend(slopes.steps)
        usable = [loss for loss in losses if math.isfinite(loss)]
        if usable:
            ctx.report(loss=math.fsum(usable) / len(usable))
        codes = self.options.quantiser.encode(measured, replica.scales[-1])
        return {"codes": codes}, len(slopes.items)


def _majorities(acc: list[Any]) -> dict[int, float]:
    """The digest of most peers, by the iteration that they were at."""
    agreed = {}
    for iteration in {at for _, at, _, _ in acc}:
        found = Counter(digest for _, at, digest, _ in acc if at == iteration and digest >= 0)
        total = sum(found.values())
        most, count = found.most_common(1)[0] if found else (-1.0, 0)
        if count * 2 <= total and total:
            raise ReplicaDivergence(
                f"at iteration {iteration} no model is that of a majority of {total} peers, so "
                f"nobody can be put right; begin again from the log up to the last agreement"
            )
        agreed[iteration] = most
    return agreed
