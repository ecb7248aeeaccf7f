"""FedEx-LoRA: FedIT's averages of A and B, and what they miss is added to the frozen weights."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigurationError
from anabranch.federated.adapter_agreement import describe_adapter, require_same_adapter
from anabranch.federated.aggregation import Mean
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import FederationError, PayloadError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value, decode, encode
from anabranch.federated.server import Accumulator, Server, Update
from anabranch.federated.shared import shared_tensors
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.directions import labelled, with_label
from anabranch.federated.strategies.fedavg import Weighting
from anabranch.federated.strategies.fedit import FedIT, FedITServer, lora_pairs

Tensors = dict[str, Tensor]
_LENGTH = struct.Struct("<I")


class FedEx(Strategy):
    """Averages LoRA exactly (Singhal, Ponkshe, Vepakomma 2024, "FedEx-LoRA: Exact Aggregation for
    Federated and Efficient Fine-Tuning of Foundation Models", section 4).

    A and B are averaged as in FedIT. The product of averages misses
    ``residual = s (mean(B A) - mean(B) mean(A))``, with s the adapter's scale, which server and
    clients add to the frozen weights: the model of a version is then the mean of the clients'
    models. Use it where FedIT's ``aggregation_error`` is large and bytes down are cheap. Fed-SB is
    exact at fewer bytes, up as well as down.

    A client sends what it does in FedIT. Down go the residuals since the client's version: for k
    clients, factors of rank (k - 1) r, or the whole [out, in] where that is less; the moved weights
    themselves where a client would get more than those. Sites keep the weights in float32.

    Versions have weights beside the adapter (``server.tensors`` has both), so that an adapter
    alone, in PEFT's format, is not the model: merge it. Rounds need a barrier. A lossy codec for
    what is sent down would let the sites' weights drift off.
    """

    name = "fedex"
    adapter = "lora"
    moves_base = True

    def __init__(self, weighting: Weighting = "examples") -> None:
        self.inner = FedIT(upload="weights", weighting=weighting, rule=Mean())

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """It has to know the frozen weights."""
        raise ConfigurationError(f"{self.name} begins with a model, not with shared tensors")

    def begin(self, model: nn.Module) -> Server:
        """Averages A and B, and moves a copy of the weights that they adapt."""
        return FedExServer(self, model)

    def client(self, local: LocalTraining) -> Client:
        """Trains A and B on the moved weights."""
        return FedExClient(local)


@dataclass(frozen=True)
class Place:
    """An adapted weight: parameter names of A [r, in], B [out, r] and W [out, in], and s."""

    a: str
    b: str
    weight: str
    scale: float


def places(model: nn.Module) -> list[Place]:
    """Every pair of factors that is trained. :class:`ConfigurationError` names what is no LoRA of
    a linear module with weights of floating-point numbers."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parameters = dict(model.named_parameters())
    pairs = lora_pairs(trained)
    strange = [n for n in trained if "lora_" in n and n not in {x for p in pairs for x in p}]
    if strange or not pairs:
        raise ConfigurationError(
            f"fedex is exact for pairs of LoRA's A and B on linear modules; "
            f"{strange[0] if strange else 'none'} is trained here"
        )
    found = []
    for a, b in pairs:
        module, _, adapter = a.removesuffix(".weight").partition(".lora_A.")
        weight = f"{module}.base_layer.weight"
        wanted = (parameters[b].shape[0], parameters[a].shape[1])
        if weight not in parameters or parameters[weight].shape != wanted:
            raise ConfigurationError(f"{module} has no weight of {list(wanted)} to add to")
        if not parameters[weight].is_floating_point():
            raise ConfigurationError(
                f"{weight} is {parameters[weight].dtype}: nothing can be added"
            )
        scaling: Any = model.get_submodule(module).scaling
        found.append(Place(a, b, weight, float(scaling[adapter])))
    return found


class FedExServer(Server):
    """FedIT's server, the moved weights, and the newest residuals."""

    associative = True

    def __init__(self, options: FedEx, model: nn.Module) -> None:
        self.options = options
        self.average = FedITServer(options.inner, shared_tensors(model), describe_adapter(model))
        self.places = places(model)
        self.weights = weights_of(model, self.places)
        """The frozen weights as moved, float32."""
        self.size = sum(weight.nbytes for weight in self.weights.values())
        self.releases: list[bytes] = []
        """Residuals of each version, from ``oldest`` on."""
        self.oldest = 0
        self.known: dict[str, int] = {}
        """Version of each client's weights, as far as it said."""

    @property
    def tensors(self) -> Tensors:
        """A, B and the weights of the present version."""
        return {**self.average.tensors, **self.weights}

    @property
    def version(self) -> int:
        """Commits so far."""
        return self.oldest + len(self.releases)

    def settings(self) -> dict[str, Any]:
        """FedIT's, under this name."""
        return {**self.average.settings(), "strategy": self.options.name}

    def message(self, client: str, kind: str) -> Payload:
        """A and B, and the residuals since the client's version or the weights, what is less."""
        first = self.known.get(client, 0)
        payload: dict[str, Value] = {
            "adapter": self.average.adapter,
            **labelled("adapter", self.average.tensors),
        }
        missed = self.releases[first - self.oldest :] if first >= self.oldest else None
        if missed is None or sum(map(len, missed)) >= self.size:
            return {**payload, **labelled("weight", self.weights)}
        joined = b"".join(_LENGTH.pack(len(release)) + release for release in missed)
        return {**payload, "first": first, "releases": joined}

    def expects(self, client: str, kind: str) -> Mapping[str, Tensor] | None:
        """A and B back."""
        return self.average.tensors

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """Note which version of the weights the client has."""
        said = reply.metrics.get("version", -1)
        if not (0 <= said <= self.version and said == int(said)):
            raise PayloadError(f"{reply.client} says that it has version {said:g}")
        self.known[reply.client] = int(said)
        return None

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """As FedIT does."""
        return self.average.fold(acc, update)

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """As FedIT does."""
        return self.average.merge(one, other)

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Average A and B, move the weights by what that misses.

        ``residual`` is its size by that of the mean product, FedIT's ``aggregation_error``.
        """
        figures = dict(self.average.commit(acc))
        members = list(acc["clients"].values())
        release = encode(
            residuals(self.places, [m["tensors"] for m in members], [m["weight"] for m in members])
        )
        self.weights = moved(self.weights, release)
        self.releases.append(release)
        while self.releases and sum(map(len, self.releases)) >= self.size:
            self.releases.pop(0)  # sending the weights would be less
            self.oldest += 1
        return {**figures, "residual": figures.pop("aggregation_error", 0.0)}

    def state_dict(self) -> dict[str, Any]:
        """FedIT's, the weights, the releases, and who has what."""
        return {
            "average": self.average.state_dict(),
            "weights": self.weights,
            "releases": self.releases,
            "oldest": self.oldest,
            "known": self.known,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.average.load_state_dict(state["average"])
        self.weights, self.oldest = dict(state["weights"]), state["oldest"]
        self.releases, self.known = list(state["releases"]), dict(state["known"])


class FedExClient(Client):
    """Keeps the weights that its adapter sits on up to date, and trains as in FedIT."""

    def __init__(self, local: LocalTraining) -> None:
        self.local = local

    def setup(self, ctx: ClientContext) -> None:
        """Version 0 is the base."""
        ctx.state.update(weights=weights_of(ctx.model, places(ctx.model)), version=0)

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """A and B. A client that lacks residuals before the first one sent trains nothing."""
        require_same_adapter(ctx.name, describe_adapter(ctx.model), str(payload["adapter"]))
        adapter = with_label("adapter", payload)
        weights: Tensors = ctx.state["weights"]
        if "releases" in payload:
            first, joined = payload["first"], payload["releases"]
            assert isinstance(first, int) and isinstance(joined, bytes)
            have = ctx.state["version"]
            ctx.report(version=have)
            if have < first:
                return adapter, 0
            for release in _split(joined)[have - first :]:
                weights = moved(weights, release)
        else:
            weights = with_label("weight", payload)
        ctx.state.update(weights=weights, version=ctx.version)
        ctx.report(version=ctx.version)
        result = self.local.run(ctx, {**adapter, **weights})
        return {name: result.tensors.get(name, x) for name, x in adapter.items()}, result.examples


def residuals(
    places: Sequence[Place], members: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> Payload:
    """``s (mean(B A) - mean(B) mean(A))`` of each place, as ``left/W`` [out, q] and ``right/W``
    [q, in] or as ``whole/W`` [out, in], whichever is less; nothing for one member.

    The k deviations from a mean add up to zero, so that one of them can be left out: q is
    (k - 1) r, and the factors' product is the residual without rounding to a lower rank.
    """
    told: dict[str, Value] = {}
    shares = [weight / math.fsum(weights) for weight in weights]
    for place in places if len(members) > 1 else ():
        right = [member[place.a].double() for member in members]
        left = [member[place.b].double() for member in members]
        mean = torch.stack([s * a for s, a in zip(shares, right, strict=True)]).sum(0)
        # sum s_i (B_i - mean B)(A_i - mean A) = sum over all but the last of s_i (B_i - B_last)(..)
        lefts = torch.cat([b - left[-1] for b in left[:-1]], 1)
        rights = torch.cat(
            [place.scale * s * (a - mean) for s, a in zip(shares[:-1], right[:-1], strict=True)]
        )
        rows, columns = len(lefts), rights.shape[1]
        if len(rights) * (rows + columns) < rows * columns:
            told |= {f"left/{place.weight}": lefts.float(), f"right/{place.weight}": rights.float()}
        else:
            told[f"whole/{place.weight}"] = (lefts @ rights).float()
    return told


def moved(weights: Mapping[str, Tensor], release: bytes) -> Tensors:
    """The weights with a release's residuals added; server and clients add alike."""
    told = decode(release)
    left, right = with_label("left", told), with_label("right", told)
    added = with_label("whole", told) | {n: left[n].double() @ right[n].double() for n in left}
    if unknown := added.keys() - weights.keys():
        raise FederationError(f"there is a residual of {min(unknown)}, which is not adapted here")
    return {n: (x.double() + added[n]).float() if n in added else x for n, x in weights.items()}


def weights_of(model: nn.Module, places: Sequence[Place]) -> Tensors:
    """Copies of the adapted weights, float32."""
    parameters = dict(model.named_parameters())
    return {p.weight: parameters[p.weight].detach().float().clone() for p in places}


def _split(joined: bytes) -> list[bytes]:
    releases, at = [], 0
    while at < len(joined):
        (length,) = _LENGTH.unpack_from(joined, at)
        at += _LENGTH.size
        releases.append(joined[at : at + length])
        at += length
    return releases
