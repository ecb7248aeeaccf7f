"""FedPAGE: now and then everyone's gradient, otherwise steps that correct the last direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import EmptyRound, PayloadError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.randomness import generator
from anabranch.federated.scheduling import Everyone, Sampler, Schedule
from anabranch.federated.scheduling.base import View
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.controlled import positive
from anabranch.federated.strategies.directions import (
    Tensors,
    labelled,
    require_plain,
    require_unscaled,
    with_label,
)
from anabranch.federated.strategies.fedamd import Mine, SmallSites
from anabranch.federated.strategies.warm_up import WarmUp
from anabranch.training.schedules import lr_factor


class FedPage(Strategy):
    """With a probability a round is a gradient step on everyone's loss; otherwise the sampled
    clients walk along the direction of the round before (Zhao, Li, Richtarik 2021, "FedPAGE: A
    Fast Local Stochastic Gradient Method for Communication-Efficient Federated Learning").

    Use it as the baseline of FedAMD, which needs no round with everyone. In a *full* round, the
    first and each later one with ``probability``, every client sends its gradient over
    ``large_batch`` examples (None: all of them). In the others a client corrects the last
    direction by how its own large-batch gradient changed between the last two versions, and then
    from step to step as FedAMD's miners do; the mean of what the clients walked is the next
    direction. Without full rounds the direction only grows older.

    ``server_lr`` 1 moves a full round as far as all local steps together along the gradient. Local
    training must be plain SGD. A client is sent two versions and a direction, and nothing but the
    model in a full round. A schedule of the user's asks whom it likes in full rounds, too.
    """

    name = "fedpage"

    def __init__(
        self, probability: float = 0.5, large_batch: int | None = None, server_lr: float = 1.0
    ) -> None:
        if not 0 < probability <= 1:
            raise ConfigurationError(f"probability is above 0 and at most 1, not {probability}")
        if large_batch is not None and large_batch < 1:
            raise ConfigurationError(f"large_batch is at least 1, not {large_batch}")
        self.probability, self.large_batch = probability, large_batch
        self.server_lr = positive("server_lr", server_lr)

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Keeps two versions and a direction."""
        return FedPageServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Sends how far the model should move."""
        require_plain(local, self.name)
        require_unscaled(local, self.name)
        return FedPageClient(self, local)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Everyone in full rounds, the sampled in the others."""
        return FullRounds(rounds, sampler or Everyone(), probability=self.probability)


@dataclass
class FullRounds(WarmUp):
    """:class:`Sync`, but everyone who is there takes part in full rounds."""

    probability: float = 1.0

    def asks_everyone(self, fed: View) -> bool:
        """The server draws alike."""
        return is_full(fed.version, fed.rng("full", fed.version), self.probability)


def is_full(version: int, rng: np.random.Generator, probability: float) -> bool:
    """Whether everyone's gradient is asked for. ``rng`` is the schedule's for "full", version."""
    return not version or bool(rng.random() < probability)


class FedPageServer(Server):
    """Moves by the mean of what clients send, and keeps along what."""

    associative = True

    def __init__(self, options: FedPage, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.tensors = dict(start)
        """The present version."""
        self.before = dict(start)
        """The one before it."""
        self.direction: Tensors = {}
        """Along which the last version moved, per unit of learning rate."""
        self.version = 0
        self._seed = 0
        self._message: Payload | None = None
        self._sizes = SmallSites(options.large_batch)

    def setup(self, ctx: ServerContext) -> None:
        """Full rounds are drawn from the run's seed."""
        self._seed = ctx.seed
        self._sizes.follow(ctx.clients)

    def settings(self) -> dict[str, Any]:
        """The method's."""
        return {"strategy": self.options.name, **vars(self.options)}

    @property
    def full(self) -> bool:
        """Whether the present round is."""
        rng = generator(self._seed, "schedule", "full", self.version)  # View.rng
        return is_full(self.version, rng, self.options.probability)

    def message(self, client: str, kind: str) -> Payload:
        """The model; in other than full rounds also the one before, and the last direction."""
        if self._message is None:
            self._message = labelled("model", self.tensors)
            if not self.full:
                more = labelled("before", self.before), labelled("direction", self.direction)
                self._message = {**self._message, **more[0], **more[1]}
        return self._message

    def expects(self, client: str, kind: str) -> Mapping[str, Tensor] | None:
        """A change of the model."""
        return self.tensors

    def respond(self, reply: Reply, payload: Payload) -> None:
        """Refuse a reply that does not say how far it went."""
        reach = payload.get("reach")
        if not isinstance(reach, float) or not reach >= 0:
            raise PayloadError(f"reply of {reply.client}: reach is at least 0, not {reach!r}")

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Add."""
        acc = acc or {"change": {}, "reach": 0.0, "clients": 0}
        reach = update.payload["reach"]
        if not update.examples or not reach:
            return acc
        change = {
            name: acc["change"].get(name, 0) + x.to(torch.float64)
            for name, x in update.tensors.items()
        }
        return {"change": change, "reach": acc["reach"] + reach, "clients": acc["clients"] + 1}

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Add."""
        change = dict(one["change"])
        for name, tensor in other["change"].items():
            change[name] = change.get(name, 0) + tensor
        return {
            "change": change,
            "reach": one["reach"] + other["reach"],
            "clients": one["clients"] + other["clients"],
        }

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Move by the mean change; the direction is that by the mean reach."""
        if not acc or not acc["clients"]:
            raise EmptyRound("no client of the round has data; the model stays as it was")
        full, rate = self.full, self.options.server_lr / acc["clients"]
        self.before = self.tensors
        self.direction = {
            name: (-acc["change"][name] / acc["reach"]).to(x.dtype)
            for name, x in self.tensors.items()
        }
        self.tensors = {
            name: (x + rate * acc["change"][name]).to(x.dtype) for name, x in self.tensors.items()
        }
        self._sizes.note()
        self.version += 1
        self._message = None
        return {"full": float(full), "clients": acc["clients"]}

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {
            "tensors": self.tensors,
            "before": self.before,
            "direction": self.direction,
            "version": self.version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.tensors, self.before = state["tensors"], state["before"]
        self.direction, self.version = state["direction"], state["version"]
        self._message = None


class FedPageClient(Client):
    """Sends a change of the model, and the learning rates that it is the sum of (``reach``)."""

    def __init__(self, options: FedPage, local: LocalTraining) -> None:
        self.options, self.local = options, local

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """A gradient step as long as all local ones, or local steps along the last direction."""
        model = with_label("model", payload)
        direction, before = with_label("direction", payload), with_label("before", payload)
        drawn = ctx.rng.bit_generator.state
        gradient, examples = self.local.gradient(ctx, model, self.options.large_batch)
        if not examples:
            return {"reach": 0.0, **gradient}, 0
        if not direction:
            reach = self._reach(ctx)
            return {"reach": reach, **{n: -reach * g for n, g in gradient.items()}}, examples
        ctx.rng.bit_generator.state = drawn  # the same examples again
        earlier, _ = self.local.gradient(ctx, before, self.options.large_batch)
        mine = Mine({n: direction[n] + g - earlier[n] for n, g in gradient.items()})
        result = self.local.run(ctx, model, [mine])
        ctx.spend(max(0, result.steps - 1))  # each step but the first has a second gradient
        change = {name: result.tensors[name] - x for name, x in model.items()}
        return {"reach": mine.reach, **change}, result.examples

    def _reach(self, ctx: ClientContext) -> float:
        """Sum of the learning rates of a task's steps."""
        options = self.local.for_task(ctx.work, ctx.seed)
        steps = options.total_steps(math.ceil(len(ctx.data) / options.batch))
        warmup = options.warmup_steps(steps)
        factors = [
            lr_factor(step, steps, warmup, options.schedule, options.min_lr)
            for step in range(steps)
        ]
        return options.lr * math.fsum(factors)
