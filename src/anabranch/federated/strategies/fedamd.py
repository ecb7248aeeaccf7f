"""FedAMD: some clients measure where to go, the others go there."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.errors import EmptyRound, FederationError, PayloadError
from anabranch.federated.local import LocalTraining
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.randomness import generator
from anabranch.federated.scheduling import Sampler, Schedule
from anabranch.federated.server import Accumulator, Server, ServerContext, Update
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.controlled import positive
from anabranch.federated.strategies.directions import (
    StepHook,
    Tensors,
    labelled,
    require_plain,
    require_unscaled,
    with_label,
)
from anabranch.federated.strategies.pending import propose, settled
from anabranch.federated.strategies.warm_up import WarmUp
from anabranch.training.result import StepReport
from anabranch.training.trainer import Trainer

logger = logging.getLogger(__name__)

Cache = Literal["server", "client"]
Weighting = Literal["uniform", "examples"]

TOO_LARGE = 50
"""A miner whose direction grows by this factor within a task gives up."""


class FedAMD(Strategy):
    """Anchors refresh large-batch gradients, miners walk along their mean (Wu et al. ICML 2023).

    Use it where few of many clients take part in a round and data differ much. An *anchor* sends
    one gradient over ``large_batch`` examples (None: all of them), which is kept for the client. A
    *miner* begins with the mean of all that is kept and corrects it from step to step by how the
    gradient of each small batch changed (algorithm 1). Anchors of a round guide the next one.

    ``every`` = n makes everyone an anchor in each n-th round and a miner in the others; with
    ``probability`` instead, each client of a round is an anchor with that probability. A small
    probability lets what is kept grow old, and may diverge. A client of which nothing is kept yet
    is always an anchor; in the first round everyone is asked.

    ``cache``: gradients are kept at the ``server`` (as many models as clients, in memory and in
    every snapshot), or by each ``client``, which then sends what changed. ``weighting``: clients
    count alike (``uniform``, as in the paper), or by the ``examples`` that they declared. Local
    training must be plain SGD, at a smaller rate than FedAvg's; a miner's step costs two gradients.
    """

    name = "fedamd"

    def __init__(
        self,
        every: int | None = None,
        probability: float | None = None,
        large_batch: int | None = None,
        cache: Cache = "server",
        server_lr: float = 1.0,
        weighting: Weighting = "uniform",
    ) -> None:
        if every is not None and probability is not None:
            raise ConfigurationError("give every or probability, not both")
        if probability is None:
            every = 2 if every is None else every
            if type(every) is not int or every < 2:
                raise ConfigurationError(
                    f"every is a number of rounds, at least 2, or nobody would mine; not {every!r}"
                )
        elif not 0 < probability <= 1:
            raise ConfigurationError(f"probability is above 0 and at most 1, not {probability}")
        if large_batch is not None and large_batch < 1:
            raise ConfigurationError(f"large_batch is at least 1, not {large_batch}")
        if cache not in ("server", "client"):
            raise ConfigurationError(f"cache is server or client, not {cache!r}")
        if weighting not in ("uniform", "examples"):
            raise ConfigurationError(f"weighting is uniform or examples, not {weighting!r}")
        self.every, self.probability, self.large_batch = every, probability, large_batch
        self.cache: Cache = cache
        self.weighting: Weighting = weighting
        self.server_lr = positive("server_lr", server_lr)

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Keeps gradients and hands out roles."""
        return FedAMDServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Anchors and mines."""
        require_plain(local, self.name)
        require_unscaled(local, self.name)
        return FedAMDClient(self, local)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Everyone in the first round, then the sampled."""
        return WarmUp.of(rounds, sampler)

    def settings(self) -> dict[str, Any]:
        """Name and options as JSON values."""
        return {"strategy": self.name, **vars(self)}


class FedAMDServer(Server):
    """Holds the model and the sum of what is kept of the clients."""

    associative = True

    def __init__(self, options: FedAMD, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.tensors = dict(start)
        """The present version."""
        self.total = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in start.items()}
        """Weighted sum of the gradients that are kept, followed change by change."""
        self.warm: set[str] = set()
        """Clients of which a gradient is kept."""
        self.kept: dict[str, Tensors] = {}
        """The gradients themselves, with ``cache`` server."""
        self.version = 0
        self._seed = 0
        self._clients: Mapping[str, int] = {}
        self._messages: dict[bool, Payload] = {}
        self._sizes = SmallSites(options.large_batch)

    def setup(self, ctx: ServerContext) -> None:
        """Roles are drawn from the run's seed."""
        self._seed, self._clients = ctx.seed, ctx.clients
        self._sizes.follow(ctx.clients)

    @property
    def target(self) -> Tensors:
        """Where miners go: the mean of the gradients that are kept."""
        weights = math.fsum(map(self._weight, self.warm)) or 1.0
        return {n: (x / weights).to(self.tensors[n].dtype) for n, x in self.total.items()}

    def settings(self) -> dict[str, Any]:
        """The method's."""
        return self.options.settings()

    def is_anchor(self, client: str) -> bool:
        """The role of a client at the present version."""
        o = self.options
        if client not in self.warm:
            return True
        if o.probability is None:
            assert o.every is not None
            return self.version % o.every == 0
        return generator(self._seed, "role", self.version, client).random() < o.probability

    def message(self, client: str, kind: str) -> Payload:
        """The model; for miners also where to go."""
        anchor = self.is_anchor(client)
        if anchor not in self._messages:
            target = {} if anchor else labelled("target", self.target)
            self._messages[anchor] = {**labelled("model", self.tensors), **target}
        return self._messages[anchor]

    def expects(self, client: str, kind: str) -> Mapping[str, Tensor] | None:
        """A gradient or a change of the model."""
        return self.tensors

    def respond(self, reply: Reply, payload: Payload) -> None:
        """Refuse a reply that does not say what it is."""
        if payload.get("role") not in ("anchor", "miner"):
            raise PayloadError(
                f"reply of {reply.client}: role is anchor or miner, not {payload.get('role')!r}"
            )

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Miners' changes are added up, anchors' gradients are filed."""
        acc = acc or {"change": {}, "miners": 0, "weight": 0.0, "anchors": []}
        if not update.examples:
            return acc
        tensors = update.tensors
        if update.payload["role"] == "anchor":
            filed = {"client": update.client, "gradient": tensors}
            return {**acc, "anchors": [*acc["anchors"], filed]}
        weight, before = self._weight(update.client), acc["change"]
        change = {n: before.get(n, 0) + weight * x.to(torch.float64) for n, x in tensors.items()}
        counts = {"miners": acc["miners"] + 1, "weight": acc["weight"] + weight}
        return {**acc, "change": change, **counts}

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Add changes, join files."""
        change = dict(one["change"])
        for name, tensor in other["change"].items():
            change[name] = change.get(name, 0) + tensor
        return {
            "change": change,
            "miners": one["miners"] + other["miners"],
            "weight": one["weight"] + other["weight"],
            "anchors": one["anchors"] + other["anchors"],
        }

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Move with the miners, then file what the anchors found."""
        if not acc["miners"] and not acc["anchors"]:
            raise EmptyRound("no client of the round has data; the model stays as it was")
        if acc["miners"]:
            rate = self.options.server_lr / acc["weight"]
            self.tensors = {
                name: (x + rate * acc["change"][name]).to(x.dtype)
                for name, x in self.tensors.items()
            }
        for filed in acc["anchors"]:
            self._file(filed["client"], filed["gradient"])
        self._sizes.note()
        self.version += 1
        self._messages = {}
        return {"miners": acc["miners"], "anchors": len(acc["anchors"])}

    def _weight(self, client: str) -> float:
        return float(self._clients[client]) if self.options.weighting == "examples" else 1.0

    def _file(self, client: str, gradient: Tensors) -> None:
        self.warm.add(client)
        old: Tensors = {}
        if self.options.cache == "server":
            old, self.kept[client] = self.kept.get(client, {}), gradient
        for name, tensor in gradient.items():
            news = tensor.to(torch.float64)
            change = news - old[name] if old else news
            self.total[name] = self.total[name] + self._weight(client) * change

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return {
            "tensors": self.tensors,
            "total": self.total,
            "warm": sorted(self.warm),
            "kept": self.kept,
            "version": self.version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.tensors, self.total = state["tensors"], state["total"]
        self.warm, self.kept = set(state["warm"]), dict(state["kept"])
        self.version = state["version"]
        self._messages = {}


class FedAMDClient(Client):
    """An anchor or a miner, as the message says."""

    def __init__(self, options: FedAMD, local: LocalTraining) -> None:
        self.options, self.local = options, local

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """A gradient, or how far the model should move."""
        own = settled(ctx)
        model = with_label("model", payload)
        target = with_label("target", payload)
        if target:
            result = self.local.run(ctx, model, [Mine(target)])
            ctx.spend(max(0, result.steps - 1))  # each step but the first has a second gradient
            change = {name: result.tensors[name] - x for name, x in model.items()}
            return {"role": "miner", **change}, result.examples
        gradient, examples = self.local.gradient(ctx, model, self.options.large_batch)
        if self.options.cache == "client" and examples:
            old = own.get("gradient")
            propose(ctx, {"gradient": gradient})
            if old:
                gradient = {name: g - old[name] for name, g in gradient.items()}
        return {"role": "anchor", **gradient}, examples


class Mine(StepHook):
    """``g += gradient here - gradient one step ago``, of the same examples; step along ``g``."""

    def __init__(self, target: Tensors) -> None:
        self.direction = target
        self.start = _norm(target)
        self.last: Tensors = {}
        self.reach = 0.0
        """Sum of the learning rates of the steps."""

    def after_gradients(self, trainer: Trainer[Any]) -> None:
        """The first step goes along the target itself."""
        parameters = trainer.trainable
        if self.last:
            before = self.gradients_at(trainer, self.last)
            self.direction = {
                name: self.direction[name] - before[name] + (0 if p.grad is None else p.grad)
                for name, p in parameters.items()
            }
            norm = _norm(self.direction)
            if not norm <= TOO_LARGE * self.start:
                raise DivergedLocally(
                    f"the direction grew from {self.start:.3g} to {norm:.3g} within "
                    f"{trainer.steps_done + 1} steps; lower lr ({trainer.options.lr:g})"
                )
        self.last = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = self.direction[name].to(parameter.device).clone()

    def after_step(self, trainer: Trainer[Any], report: StepReport) -> None:
        """A step that was not finite went nowhere."""
        self.reach += 0.0 if report.skipped else report.lr


class SmallSites:
    """Logs of each client, once, that it has no examples, or fewer than a large batch."""

    def __init__(self, large_batch: int | None) -> None:
        self.large_batch = large_batch or 1
        self._clients: Mapping[str, int] = {}
        self._seen: set[str] = set()

    def follow(self, clients: Mapping[str, int]) -> None:
        """``clients`` are names and numbers of examples, and change as clients join."""
        self._clients = clients
        self.note()

    def note(self) -> None:
        """Look at who is new."""
        new = {name: size for name, size in self._clients.items() if name not in self._seen}
        self._seen |= new.keys()
        if empty := [name for name, size in new.items() if not size]:
            logger.warning("without examples, and so without a say: %s", ", ".join(sorted(empty)))
        if small := [name for name, size in new.items() if 0 < size < self.large_batch]:
            logger.warning(
                "large_batch is %d; these have fewer examples and use all: %s",
                self.large_batch,
                ", ".join(sorted(small)),
            )


class DivergedLocally(FederationError):
    """A miner's direction blew up; its task counts as failed."""


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in tensors.values()))
