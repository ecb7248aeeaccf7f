"""Ferret: first-order training whose updates travel as inner products with random directions."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import EmptyRound, PayloadError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.random_projection import RandomProjection, message_of
from anabranch.federated.randomness import derive_seed
from anabranch.federated.seeded_model import digest, require_same_base
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.shared import shared_tensors, tensors_of
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.wire import Direction, Field, Schema
from anabranch.training.schedules import Schedule as Decay
from anabranch.training.schedules import lr_factor

_HELD_VALUES = 2**22
"""What a release adds to a model of no more values is kept for the sites that follow it next."""
_CONTRIBUTION = struct.Struct("<qdI")
"""Seed of the directions, factor of the estimate, bytes of inner products that follow."""


class Ferret(Strategy):
    """FedAvg with updates told by ``k`` inner products for each block of the model (Shu et al.
    2024, "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", section 4).

    Use it to train all weights over thin links with the local steps of FedAvg: far fewer rounds
    than zeroth-order methods, at similar bytes. Larger ``k`` is closer to FedAvg. A client's
    estimate is much longer than its update if ``k`` is small; more clients or a smaller
    ``server_lr`` calm it.

    Estimates are unbiased, so that ``server_lr`` 1 is FedAvg on average; the authors leave out a
    factor of 3 and use rates up to 10. With ``decay``, linear or cosine, the rate falls from
    ``server_lr`` at the first version to ``final_server_lr`` after ``decay_rounds``. ``clip``
    bounds the length of what a single direction adds to a version before the rate (None: nothing
    is cut); versions report how many were ``clipped``, which many of a good rate are not.

    Directions are drawn anew for each client and version, so that errors are independent. With
    ``momentum`` they are a pool of ``k`` a block for the whole run, as in the authors' code, and a
    version also moves by that share of what the version before moved by: then the sum over clients
    goes down, whose size does not grow with clients. Errors along a fixed pool do not average out
    over rounds, and nothing is learned across it.

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
        momentum: float = 0.0,
        clip: float | None = 10.0,
        decay: Decay = "constant",
        decay_rounds: int | None = None,
        final_server_lr: float = 0.0,
    ) -> None:
        if type(k) is not int or not 2 <= k < 2**16:
            raise ConfigurationError(f"k is from 2 to 65,535 directions a block, not {k!r}")
        if not (server_lr > 0 and math.isfinite(server_lr)):
            raise ConfigurationError(f"server_lr is above 0 and finite, not {server_lr}")
        if weighting not in ("examples", "uniform"):
            raise ConfigurationError(f"weighting is examples or uniform, not {weighting!r}")
        if not staleness >= 0:
            raise ConfigurationError(f"staleness is an exponent of at least 0, not {staleness}")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum is from 0 to below 1, not {momentum}")
        if clip is not None and not clip > 0:
            raise ConfigurationError(f"clip is above 0, or None, not {clip}")
        if decay not in get_args(Decay):
            raise ConfigurationError(f"decay is {', '.join(get_args(Decay))}, not {decay!r}")
        rounds_fit = decay_rounds is None if decay == "constant" else (decay_rounds or 0) >= 1
        if not rounds_fit:
            raise ConfigurationError(
                f"decay_rounds is how many rounds a linear or cosine decay takes, at least 1; not "
                f"{decay_rounds} with decay {decay}"
            )
        if not 0 <= final_server_lr <= server_lr:
            raise ConfigurationError(
                f"final_server_lr is from 0 to server_lr ({server_lr:g}), not {final_server_lr}"
            )
        self.k, self.server_lr = k, server_lr
        self.weighting, self.staleness = weighting, staleness
        self.momentum, self.clip = momentum, clip
        self.decay, self.decay_rounds = decay, decay_rounds
        self.final_server_lr = final_server_lr

    def rate(self, version: int) -> float:
        """The server's rate for the step from a version to the next."""
        floor = self.final_server_lr / self.server_lr
        return self.server_lr * lr_factor(version, self.decay_rounds or 1, 0, self.decay, floor)

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Rebuilds updates and averages."""
        return FerretServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Trains, and tells inner products."""
        return FerretClient(self, local)


class FerretServer(Server):
    """The model, the newest releases, and which version each client has.

    A *release* is what leads from one version to the next: seed, factor and inner products of each
    client's update, or, of a pool, those of the whole step.
    """

    associative = True

    def __init__(self, options: Ferret, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.tensors = dict(start)
        self.base = digest(start)
        self.start = start
        self.velocity: Tensor | None = None
        """What the last version moved by along the pool, float32 [blocks, k]."""
        self.size = sum(tensor.nbytes for tensor in start.values())
        self.releases: list[bytes] = []
        self.oldest = 0
        """Version that the first kept release starts from."""
        self.known: dict[str, int] = {}

    def setup(self, ctx: ServerContext) -> None:
        """Directions are named by run, client and version."""
        self.seed = ctx.seed
        pool = derive_seed(ctx.seed, "ferret's pool") if self.options.momentum else None
        self.projection = RandomProjection(self.start, self.options.k, pool)

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
            "layout": self.projection.layout,
            "seed": self._directions(client, self.version),
        }
        if self.projection.pool is not None:
            payload["pool"] = self.projection.pool
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
        """``w += rate * sum of share * estimate``, as every client will do."""
        if not acc:
            raise EmptyRound("no client sent an update; the model stays as it was")
        total = sum(weight for _, weight, _, _ in acc)
        told = [(seed, weight / total * discount, p) for seed, weight, discount, p in acc]
        heads = 2 * len(self.projection.blocks)
        figures = {"products": float(sum((len(p) - heads) // 4 for *_, p in told))}
        if self.options.momentum:
            told = [(0, 1.0, message_of(self._with_momentum(told)))]
        if self.options.clip is not None:
            cut = 0
            for index, (seed, share, products) in enumerate(told):
                products, more = self.projection.clip(products, self.options.clip / share)
                told[index] = seed, share, products
                cut += more
            figures["clipped"] = float(cut)
        rate = self.options.rate(self.version)
        release = b"".join(
            _CONTRIBUTION.pack(seed, rate * share, len(products)) + products
            for seed, share, products in told
        )
        self.tensors = moved(self.tensors, step_of(release, self.projection))
        self.releases.append(release)
        while self.releases and sum(map(len, self.releases)) >= self.size:
            self.releases.pop(0)  # sending the model would be less
            self.oldest += 1
        return figures

    def _with_momentum(self, told: list[tuple[int, float, bytes]]) -> Tensor:
        step = self.projection.pooled(told)
        if self.velocity is not None:
            step += self.options.momentum * self.velocity.double()
        self.velocity = step.float()
        return self.velocity

    def _directions(self, client: str, version: int) -> int:
        return derive_seed(self.seed, "ferret", client, version)

    def state_dict(self) -> dict[str, Any]:
        """The model, the kept releases, and who has what."""
        return {
            "tensors": self.tensors,
            "releases": self.releases,
            "oldest": self.oldest,
            "known": self.known,
            "velocity": [] if self.velocity is None else [self.velocity],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.tensors, self.oldest = dict(state["tensors"]), state["oldest"]
        self.releases, self.known = list(state["releases"]), dict(state["known"])
        self.velocity = next(iter(state["velocity"]), None)


class FerretClient(Client):
    """Keeps up with the releases, trains as in FedAvg, and tells what changed."""

    def __init__(self, options: Ferret, local: LocalTraining) -> None:
        self.options = options
        self.local = local
        self._held: tuple[tuple[bytes, str, int | None], dict[str, Tensor]] | None = None

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
        pool = payload.get("pool")
        assert pool is None or isinstance(pool, int)
        projection = RandomProjection(start, self.options.k, pool)
        projection.require(ctx.name, str(payload["layout"]))
        if "releases" in payload:
            first, joined = payload["first"], payload["releases"]
            assert isinstance(first, int) and isinstance(joined, bytes)
            ctx.report(version=ctx.state["version"])
            if ctx.state["version"] < first:
                return {"products": b""}, 0
            for release in _split(joined)[ctx.state["version"] - first :]:
                start = moved(start, self._step(release, projection))
        else:
            start = {n.removeprefix("model/"): t for n, t in tensors_of(payload).items()}
        ctx.state.update(tensors=start, version=ctx.version)
        ctx.report(version=ctx.version)
        result = self.local.run(ctx, start)
        if not result.examples:
            return {"products": b""}, 0
        change = {name: result.tensors[name].float() - x.float() for name, x in start.items()}
        return {"products": projection.encode(change, seed)}, result.examples

    def _step(self, release: bytes, projection: RandomProjection) -> dict[str, Tensor]:
        """Sites of one process follow the same releases: drawing directions is most of the work."""
        key = release, projection.layout, projection.pool
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        step = step_of(release, projection)
        few = sum(total.numel() for total in step.values()) <= _HELD_VALUES
        self._held = (key, step) if few else None
        return step


def step_of(release: bytes, projection: RandomProjection) -> dict[str, Tensor]:
    """What a release adds, float64: the same additions at server and clients."""
    total = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in projection.shapes.items()}
    at = 0
    while at < len(release):
        seed, factor, length = _CONTRIBUTION.unpack_from(release, at)
        at += _CONTRIBUTION.size
        for name, estimate in projection.decode(release[at : at + length], seed).items():
            total[name].add_(estimate, alpha=factor)
        at += length
    return total


def moved(tensors: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The version after a step, rounded once to the types of the tensors."""
    return {n: (t.to(torch.float64) + step[n]).to(t.dtype) for n, t in tensors.items()}


def _join(releases: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(release)) + release for release in releases)


def _split(joined: bytes) -> list[bytes]:
    releases, at = [], 0
    while at < len(joined):
        (length,) = struct.unpack_from("<I", joined, at)
        releases.append(joined[at + 4 : at + 4 + length])
        at += 4 + length
    return releases
