"""Ferret: first-order training whose updates travel as inner products with random directions."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import EmptyRound, PayloadError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.random_projection import RandomProjection
from anabranch.federated.randomness import derive_seed
from anabranch.federated.seeded_model import digest, require_same_base
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.shared import shared_tensors, tensors_of
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.wire import Direction, Field, Schema

_CONTRIBUTION = struct.Struct("<qdI")
"""Seed of the directions, share in the mean, bytes of inner products that follow."""


class Ferret(Strategy):
    """FedAvg with updates told by ``k`` inner products for each block of the model (Shu et al.
    2024, "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", section 4).

    Use it to train all weights over thin links with the local steps of FedAvg: far fewer rounds
    than zeroth-order methods, at similar bytes. Larger ``k`` is closer to FedAvg. A client's
    estimate is much longer than its update if ``k`` is small; more clients or a smaller
    ``server_lr`` calm it.

    Estimates are unbiased, so that ``server_lr`` 1 is FedAvg on average; the authors leave out a
    factor of 3 and use rates up to 10. Directions are drawn anew for each client and version; the
    authors draw from one pool, which is only needed with their server's momentum.

    Clients keep the model that they had and are sent the inner products since, or the model where
    that is less. A lossy codec for what is sent down would let their models drift off.
    """

    name = "ferret"

    def __init__(
        self,
        k: int = 128,
        server_lr: float = 1.0,
        weighting: str = "examples",
        staleness: float = 0.5,
    ) -> None:
        if not 2 <= k < 2**16:
            raise ConfigurationError(f"k is from 2 to 65,535 directions a block, not {k}")
        if not (server_lr > 0 and math.isfinite(server_lr)):
            raise ConfigurationError(f"server_lr is above 0 and finite, not {server_lr}")
        if weighting not in ("examples", "uniform"):
            raise ConfigurationError(f"weighting is examples or uniform, not {weighting!r}")
        if not staleness >= 0:
            raise ConfigurationError(f"staleness is an exponent of at least 0, not {staleness}")
        self.k, self.server_lr = k, server_lr
        self.weighting, self.staleness = weighting, staleness

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Rebuilds updates and averages."""
        return FerretServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Trains, and tells inner products."""
        return FerretClient(self, local)


class FerretServer(Server):
    """The model, the newest releases, and which version each client has.

    A *release* is what leads from one version to the next: seed, share and inner products of each
    client's update.
    """

    associative = True

    def __init__(self, options: Ferret, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.tensors = dict(start)
        self.base = digest(start)
        self.projection = RandomProjection(start, options.k)
        self.size = sum(tensor.nbytes for tensor in start.values())
        self.releases: list[bytes] = []
        self.oldest = 0
        """Version that the first kept release starts from."""
        self.known: dict[str, int] = {}

    def setup(self, ctx: ServerContext) -> None:
        """Directions are named by run, client and version."""
        self.seed = ctx.seed

    def settings(self) -> dict[str, Any]:
        """The method's, and the base."""
        return {"strategy": self.options.name, **vars(self.options), "base": self.base}

    def schemas(self) -> Mapping[tuple[Direction, str], Schema]:
        """Up, nothing but the inner products."""
        return {("up", "train"): Schema((Field("products", "bytes"),))}

    @property
    def version(self) -> int:
        """Commits so far."""
        return self.oldest + len(self.releases)

    def message(self, client: str, kind: str) -> Payload:
        """The releases since the client's version, or the model if that is less or all there is."""
        first = self.known.get(client, 0)
        payload: dict[str, Value] = {
            "base": self.base,
            "seed": self._directions(client, self.version),
        }
        missed = self.releases[first - self.oldest :] if first >= self.oldest else None
        if missed is None or sum(map(len, missed)) >= self.size:
            return {**payload, **{f"model/{name}": t for name, t in self.tensors.items()}}
        return {**payload, "first": first, "releases": _join(missed)}

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """Refuse what are no inner products; note which version the client has."""
        products, said = payload.get("products"), reply.metrics.get("version", -1)
        if not isinstance(products, bytes):
            raise PayloadError(f"{reply.client} sent no inner products")
        if products:
            self.projection.read(products)
        if not (0 <= said <= self.version and said == int(said)):
            raise PayloadError(f"{reply.client} says that it has version {said:g}")
        self.known[reply.client] = int(said)
        return None

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """List seed, weight, discount and inner products."""
        weight = update.examples if self.options.weighting == "examples" else 1
        if not (update.examples and update.payload["products"]):
            return acc or []
        seed = self._directions(update.client, update.version)
        discount = (1 + update.staleness) ** -self.options.staleness
        return [*(acc or []), [seed, weight, discount, update.payload["products"]]]

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Both lists."""
        return [*one, *other]

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """``w += server_lr * sum of share * estimate``, as every client will do."""
        if not acc:
            raise EmptyRound("no client sent an update; the model stays as it was")
        total = sum(weight for _, weight, _, _ in acc)
        release = b"".join(
            _CONTRIBUTION.pack(seed, weight / total * discount, len(products)) + products
            for seed, weight, discount, products in acc
        )
        self.tensors = advance(self.tensors, release, self.projection, self.options.server_lr)
        self.releases.append(release)
        while self.releases and sum(map(len, self.releases)) >= self.size:
            self.releases.pop(0)  # sending the model would be less
            self.oldest += 1
        return {"products": float(sum(len(p) // 4 for *_, p in acc))}

    def _directions(self, client: str, version: int) -> int:
        return derive_seed(self.seed, "ferret", client, version)

    def state_dict(self) -> dict[str, Any]:
        """The model, the kept releases, and who has what."""
        return {
            "tensors": self.tensors,
            "releases": self.releases,
            "oldest": self.oldest,
            "known": self.known,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.tensors, self.oldest = dict(state["tensors"]), state["oldest"]
        self.releases, self.known = list(state["releases"]), dict(state["known"])


class FerretClient(Client):
    """Keeps up with the releases, trains as in FedAvg, and tells what changed."""

    def __init__(self, options: Ferret, local: LocalTraining) -> None:
        self.options = options
        self.local = local

    def setup(self, ctx: ClientContext) -> None:
        """Version 0 is the base."""
        tensors = shared_tensors(ctx.model)
        ctx.state.update(base=digest(tensors), tensors=tensors, version=0)

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Inner products. A client that lacks releases before the first one sends none."""
        base, seed = payload["base"], payload["seed"]
        assert isinstance(base, int) and isinstance(seed, int)
        require_same_base(ctx.name, ctx.state["base"], base)
        start: dict[str, Tensor] = ctx.state["tensors"]
        projection = RandomProjection(start, self.options.k)
        if "releases" in payload:
            first, joined = payload["first"], payload["releases"]
            assert isinstance(first, int) and isinstance(joined, bytes)
            ctx.report(version=ctx.state["version"])
            if ctx.state["version"] < first:
                return {"products": b""}, 0
            for release in _split(joined)[ctx.state["version"] - first :]:
                start = advance(start, release, projection, self.options.server_lr)
        else:
            start = {n.removeprefix("model/"): t for n, t in tensors_of(payload).items()}
        ctx.state.update(tensors=start, version=ctx.version)
        ctx.report(version=ctx.version)
        result = self.local.run(ctx, start)
        if not result.examples:
            return {"products": b""}, 0
        change = {name: result.tensors[name] - x for name, x in start.items()}
        return {"products": projection.encode(change, seed)}, result.examples


def advance(
    tensors: Mapping[str, Tensor], release: bytes, projection: RandomProjection, server_lr: float
) -> dict[str, Tensor]:
    """The version after a release; server and clients get there by the same additions."""
    total = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in tensors.items()}
    at = 0
    while at < len(release):
        seed, share, length = _CONTRIBUTION.unpack_from(release, at)
        at += _CONTRIBUTION.size
        for name, estimate in projection.decode(release[at : at + length], seed).items():
            total[name].add_(estimate, alpha=share)
        at += length
    return {n: (t.to(torch.float64) + server_lr * total[n]).to(t.dtype) for n, t in tensors.items()}


def _join(releases: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(release)) + release for release in releases)


def _split(joined: bytes) -> list[bytes]:
    releases, at = [], 0
    while at < len(joined):
        (length,) = struct.unpack_from("<I", joined, at)
        releases.append(joined[at + 4 : at + 4 + length])
        at += 4 + length
    return releases
