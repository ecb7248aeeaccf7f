"""DFedAvgM: averaging with neighbours instead of a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.core import Federation
from anabranch.federated.gossip import Peer, Relay
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import Value
from anabranch.federated.runtimes import Site
from anabranch.federated.scheduling import Gossip, Sampler, Schedule
from anabranch.federated.server import Server
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.fedasync import require_all
from anabranch.federated.strategies.fedavg import LocalClient
from anabranch.federated.topologies import Graph, metropolis, ring

Edges = Callable[[int], np.ndarray]
"""``edges(n)``: adjacency [n, n] of n peers, as :func:`ring` and :func:`complete` give it."""


class DFedAvgM(Strategy):
    """Peers train with momentum, then average with their neighbours (Sun et al. 2022, algorithm 1).

    Use it where there is no server, or none that all trust. Every site ends with a model of its
    own (:mod:`anabranch.federated.consensus` compares them). Sparse graphs agree slowly.

    ``mixing_steps`` averages several times a round (MGS, Shi et al. 2023, algorithm 2); each costs
    every peer a message to each neighbour. ``momentum`` 0 is DFedAvg; it begins anew in every round
    and needs ``optimizer: sgd`` in the local options. The local rate is multiplied by ``lr_decay``
    each round. Without a ``topology`` in :meth:`simulate` the graph is that of ``edges``, a ring,
    with Metropolis weights. Data sizes do not count: weights must be doubly stochastic.
    """

    name = "dfedavgm"
    decentralised = True

    def __init__(
        self,
        mixing_steps: int = 1,
        momentum: float = 0.9,
        lr_decay: float = 0.998,
        edges: Edges = ring,
    ) -> None:
        if mixing_steps < 1:
            raise ConfigurationError(f"mixing_steps is at least 1, not {mixing_steps}")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum is from 0 to below 1, not {momentum}")
        if not 0 < lr_decay <= 1:
            raise ConfigurationError(f"lr_decay is above 0 and at most 1, not {lr_decay}")
        self.mixing_steps, self.momentum, self.lr_decay = mixing_steps, momentum, lr_decay
        self.edges = edges

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Hands messages on unread."""
        return _MethodRelay(self)

    def client(self, local: LocalTraining) -> Client:
        """Trains with momentum, and mixes."""
        return Peer(self.trains(self.with_momentum(local)))

    def trains(self, local: LocalTraining) -> Client:
        """What a peer does between two exchanges."""
        return DecayingClient(local, self.lr_decay, 1 + self.mixing_steps)

    def with_momentum(self, local: LocalTraining) -> LocalTraining:
        """The local options with this method's momentum."""
        if self.momentum and local.options.optimizer != "sgd":
            raise ConfigurationError(
                f"{self.name} trains with momentum {self.momentum:g}, which belongs to sgd, not to "
                f"{local.options.optimizer}: set optimizer: sgd, or momentum to 0"
            )
        if local.options.optimizer != "sgd":
            return local
        options = local.options.model_copy(update={"momentum": self.momentum})
        return replace(local, options=options)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Train, then mix."""
        require_all(self.name, sampler)
        return Gossip(rounds, mixing_steps=self.mixing_steps)

    def simulate(
        self,
        model: nn.Module,
        local: LocalTraining,
        sites: Sequence[Site],
        rounds: int = 1,
        **options: Any,
    ) -> Federation:
        """As every method, with a graph of the sites for a topology."""
        if options.get("topology") is None:
            names = [site.name for site in sites]
            options["topology"] = Graph(names, metropolis(self.edges(len(names))))
        return super().simulate(model, local, sites, rounds, **options)

    def settings(self) -> dict[str, Any]:
        """Name and options as JSON values; the graph is the topology's business."""
        options = {name: value for name, value in vars(self).items() if name != "edges"}
        return {"strategy": self.name, **options}


class DecayingClient(LocalClient):
    """Trains at a rate that shrinks by ``lr_decay`` every ``versions_per_round`` versions."""

    def __init__(self, local: LocalTraining, lr_decay: float, versions_per_round: int) -> None:
        super().__init__(local)
        self.lr_decay, self.versions_per_round = lr_decay, versions_per_round

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """The difference that training makes."""
        factor = self.lr_decay ** (ctx.version // self.versions_per_round)
        ctx.work = replace(ctx.work, lr_scale=ctx.work.lr_scale * factor)
        return super().run(ctx, kind, payload)


class _MethodRelay(Relay):
    def __init__(self, options: DFedAvgM) -> None:
        super().__init__()
        self.options = options

    def settings(self) -> dict[str, Any]:
        """The method's: a stored run only goes on with the same."""
        return self.options.settings()
