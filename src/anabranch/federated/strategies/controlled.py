"""What FedAvg-M, SCAFFOLD, SCALLION, SCAFCOM and their kin have in common.

Each client steps along a direction bent by what the others found, and sends what it learnt; the
server averages directions and steps along their mean::

    client:  increment = mean gradient - own control            # what to add to the own control
    server:  direction = mean increment + control               # with the old control
             momentum  = beta * direction + (1 - beta) * momentum
             model    -= server_lr * reach * momentum           # reach: sum of local rates
             control  += sum of increments / clients

Invariant: the server's control is the mean of the clients' controls, whoever was lost on the way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.codecs import Codec
from anabranch.federated.errors import EmptyRound, NotFinite, PayloadError, PayloadMismatch
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value, decode, encode
from anabranch.federated.randomness import generator
from anabranch.federated.reading import not_finite_values
from anabranch.federated.scheduling import Sampler, Schedule
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.shared import tensors_of
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.directions import (
    Tensors,
    Walk,
    is_plain,
    labelled,
    require_plain,
    require_unscaled,
    walk,
    with_label,
)
from anabranch.federated.strategies.fedavg import zeros_like
from anabranch.federated.strategies.pending import propose, settled
from anabranch.federated.strategies.warm_up import WarmUp

logger = logging.getLogger(__name__)

WATCHED = 20
"""Versions over which the direction may not grow tenfold without a warning."""


class Controlled(Strategy):
    """Options of the family. All clients weigh the same, as in the papers."""

    controls: ClassVar[bool] = True
    """Whether clients have control variates."""
    beta: float = 1.0
    """Weight of the present direction; the rest is that of the version before."""
    variance_reduced: bool = False
    codec: Codec | None = None
    """What makes increments smaller; None: they are sent as they are."""

    def __init__(self, server_lr: float = 1.0) -> None:
        self.server_lr = positive("server_lr", server_lr)

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Steps along the mean direction."""
        return ControlledServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Steps along bent gradients."""
        if self.momentum:
            require_plain(local, self.name)
        elif not is_plain(local.options) and local.options.weight_decay:
            raise ConfigurationError(
                f"{self.name} with {local.options.optimizer} shares gradients, and weight_decay is "
                f"not in them: set it to 0, or use sgd"
            )
        require_unscaled(local, self.name)
        return ControlledClient(self, local)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Everyone in the first round where it gives the first direction."""
        return WarmUp.of(rounds, sampler) if self.warms_up else super().schedule(rounds, sampler)

    @property
    def momentum(self) -> bool:
        """Whether the last version's direction goes into local steps."""
        return self.beta < 1

    @property
    def warms_up(self) -> bool:
        """Whether version 1 is the start with a first direction."""
        return self.variance_reduced and self.momentum

    @property
    def sends_directions(self) -> bool:
        """Whether directions are sent, because they do not follow from the increments."""
        return not self.controls or self.warms_up

    def increment(self, ctx: ClientContext, found: Tensors, own: dict[str, Any]) -> Tensors:
        """What to add to the own control, before coding; ``found`` is mean gradient - control."""
        return found

    def settings(self) -> dict[str, Any]:
        """Name and options as JSON values."""
        return {"strategy": self.name, **vars(self), "codec": repr(self.codec)}


class ControlledServer(Server):
    """Holds model, control and momentum."""

    associative = True

    def __init__(self, options: Controlled, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.tensors = dict(start)
        """The present version."""
        self.momentum: Tensors | None = None if options.warms_up else zeros_like(start)
        """Mean direction that led here, g; None before the warm-up."""
        self.before = dict(start)
        """The version before."""
        self.total = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in start.items()}
        """Sum of the clients' controls."""
        self.known: set[str] = set()
        """Everyone who has a control, be it zero."""
        self.norms: list[float] = []
        self._message: Payload | None = None

    def setup(self, ctx: ServerContext) -> None:
        """Everyone with data has a control of zero."""
        self.known = {name for name, examples in ctx.clients.items() if examples}

    @property
    def control(self) -> Tensors:
        """The mean of the clients' controls, c."""
        count = max(1, len(self.known))
        return {n: (x / count).to(self.tensors[n].dtype) for n, x in self.total.items()}

    def settings(self) -> dict[str, Any]:
        """The method's."""
        return self.options.settings()

    def message(self, client: str, kind: str) -> Payload:
        """Model, and what bends the steps: control, momentum, the version before."""
        if self._message is None:
            made: dict[str, Value] = {**labelled("model", self.tensors)}
            if self.momentum is None:
                made |= {"warm_up": 1}
            else:
                if self.options.controls:
                    made |= labelled("control", self.control)
                if self.options.momentum:
                    made |= labelled("momentum", self.momentum)
                if self.options.warms_up:
                    made |= labelled("before", self.before)
            self._message = made
        return self._message

    def respond(self, reply: Reply, payload: Payload) -> None:
        """Refuse what cannot be folded, by name."""
        reach = payload.get("reach")
        if not isinstance(reach, float) or not 0 <= reach < math.inf:
            raise PayloadError(f"reply of {reply.client}: reach is a rate, not {reach!r}")
        parts = self._parts(payload)
        expected: set[str] = set()
        if self.options.sends_directions:
            expected |= labelled("direction", self.tensors).keys()
        if self.options.controls:
            expected |= labelled("increment", self.tensors).keys()
        for name in sorted(expected | parts.keys()):
            got = parts.get(name)
            if name not in expected or got is None:
                wanted, found = ("absent", "present") if got is not None else ("present", "absent")
                raise PayloadMismatch(reply.client, name, wanted, found)
            model = self.tensors[name.partition("/")[2]]
            if got.shape != model.shape or got.dtype != model.dtype:
                raise PayloadMismatch(
                    reply.client,
                    name,
                    f"{model.dtype} {list(model.shape)}",
                    f"{got.dtype} {list(got.shape)}",
                )
            if bad := not_finite_values(got):
                raise NotFinite(reply.client, name, bad)

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Sums in float64, over clients that have data."""
        acc = acc or {"sums": {}, "count": 0, "reach": 0.0, "moved": 0, "clients": []}
        if not update.examples:
            return acc
        reach = update.payload["reach"]
        for name, tensor in self._parts(update.payload).items():
            acc["sums"][name] = acc["sums"].get(name, 0) + tensor.to(torch.float64)
        return {
            "sums": acc["sums"],
            "count": acc["count"] + 1,
            "reach": acc["reach"] + reach,
            "moved": acc["moved"] + (reach > 0),  # type: ignore[operator]
            "clients": [*acc["clients"], update.client],
        }

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Add everything."""
        sums = dict(one["sums"])
        for name, tensor in other["sums"].items():
            sums[name] = sums.get(name, 0) + tensor
        return {"sums": sums, **{key: one[key] + other[key] for key in one if key != "sums"}}

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Step along the mean direction, then move the control."""
        if not acc["count"]:
            raise EmptyRound("no client of the round has data; the model stays as it was")
        o = self.options
        mean = {name: total / acc["count"] for name, total in acc["sums"].items()}
        direction = with_label("direction", mean)
        if not o.sends_directions:
            control, old = self.control, self.momentum or {}
            direction = {
                name: o.beta * (found + control[name]) + (1 - o.beta) * old[name]
                for name, found in with_label("increment", mean).items()
            }
        direction = {name: d.to(self.tensors[name].dtype) for name, d in direction.items()}
        if self.momentum is not None and acc["moved"]:
            self.before = self.tensors
            rate = o.server_lr * acc["reach"] / acc["moved"]
            self.tensors = {name: x - rate * direction[name] for name, x in self.tensors.items()}
        self.momentum = direction
        for name, increments in with_label("increment", acc["sums"]).items():
            self.total[name] = self.total[name] + increments
        self.known |= set(acc["clients"])
        self._message = None
        return {"direction": self._watch(direction)}

    def _watch(self, direction: Tensors) -> float:
        """The direction's norm; a warning if it grows and grows."""
        norm = math.sqrt(sum(float(d.square().sum()) for d in direction.values()))
        self.norms = [*self.norms[-WATCHED:], norm]
        if len(self.norms) > WATCHED and norm > 10 * self.norms[0] > 0:
            logger.warning(
                "%s: the direction grew from %.3g to %.3g in %d versions; lower lr or raise beta",
                self.options.name,
                self.norms[0],
                norm,
                WATCHED,
            )
        return norm

    def _parts(self, payload: Mapping[str, Value]) -> Tensors:
        """Increments decoded, and all other tensors."""
        parts = tensors_of(payload)
        coded = payload.get("increment")
        if self.options.codec is not None:
            if not isinstance(coded, bytes):
                raise PayloadError("the payload has no bytes named increment")
            parts |= labelled("increment", tensors_of(self.options.codec.decode(decode(coded))))
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {
            "tensors": self.tensors,
            "momentum": self.momentum,
            "before": self.before,
            "total": self.total,
            "known": sorted(self.known),
            "norms": self.norms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.tensors, self.momentum = state["tensors"], state["momentum"]
        self.before, self.total = state["before"], state["total"]
        self.known, self.norms = set(state["known"]), state["norms"]
        self._message = None


class ControlledClient(Client):
    """Walks along bent gradients; its control changes when the server took the increment."""

    def __init__(self, options: Controlled, local: LocalTraining) -> None:
        self.options, self.local = options, local

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Direction, increment, or both."""
        own = settled(ctx)
        model = with_label("model", payload)
        if "warm_up" in payload:
            return self._first_direction(ctx, model)
        control = own.get("control") or zeros_like(model)
        found = self._walk(ctx, model, control, payload)
        answer: dict[str, Value] = {"reach": found.reach}
        if self.options.sends_directions:
            answer |= labelled("direction", found.direction)
        if self.options.controls:
            news = self._news(found, control, payload)
            kept = dict(own)
            increment = self.options.increment(ctx, news, kept)
            answer |= self._coded(ctx, increment)
            decoded = self._decoded(answer)
            kept["control"] = {name: x + decoded[name] for name, x in control.items()}
            if found.examples:
                propose(ctx, kept)
        return answer, found.examples

    def _walk(
        self, ctx: ClientContext, model: Tensors, control: Tensors, payload: Mapping[str, Value]
    ) -> Walk:
        """The table of directions: one constant, and what the gradients are multiplied by."""
        o = self.options
        everyone = with_label("control", payload)
        momentum = with_label("momentum", payload)
        constant = {}
        for name in model:
            parts = []
            if o.controls:
                parts.append(o.beta * (everyone[name] - control[name]))
            if o.momentum:
                parts.append((1 - o.beta) * momentum[name])
            if parts:
                constant[name] = torch.stack(parts).sum(0)
        if o.warms_up:
            before = with_label("before", payload)
            return walk(self.local, ctx, model, constant, 1.0, before, 1 - o.beta)
        return walk(self.local, ctx, model, constant, o.beta)

    def _news(self, found: Walk, control: Tensors, payload: Mapping[str, Value]) -> Tensors:
        """Mean gradient - own control."""
        if not found.examples:
            return zeros_like(control)
        if is_plain(self.local.options) and not self.options.momentum:
            # By what was stepped along, so that clipping and decay are in it.
            everyone = with_label("control", payload)
            return {name: d - everyone[name] for name, d in found.direction.items()}
        return {name: g - control[name] for name, g in found.gradient.items()}

    def _first_direction(self, ctx: ClientContext, model: Tensors) -> Answer:
        gradient, examples = self.local.gradient(ctx, model)
        answer: dict[str, Value] = {"reach": 0.0, **labelled("direction", gradient)}
        if self.options.controls:
            answer |= self._coded(ctx, zeros_like(model))
        return answer, examples

    def _coded(self, ctx: ClientContext, increment: Tensors) -> Payload:
        codec = self.options.codec
        if codec is None:
            return labelled("increment", increment)
        # As bytes, so that a codec of the federation does not encode it once more.
        return {"increment": encode(codec.encode(increment, {}, generator(ctx.seed, "increment")))}

    def _decoded(self, answer: Payload) -> Tensors:
        """The increment as the server will see it."""
        if self.options.codec is None:
            return with_label("increment", answer)
        coded = answer["increment"]
        assert isinstance(coded, bytes)
        return tensors_of(self.options.codec.decode(decode(coded)))


def positive(name: str, value: float) -> float:
    """The value, if it is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ConfigurationError(f"{name} is above 0, not {value}")
    return value


def fraction(name: str, value: float) -> float:
    """The value, if it is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise ConfigurationError(f"{name} is above 0 and at most 1, not {value}")
    return value
