"""How far peers without a server agree. For an observer of a simulation: no peer knows this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.federated.core import Federation
from anabranch.federated.errors import FederationError
from anabranch.federated.runtimes import Simulation

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Consensus:
    """``models`` of the peers by name, and their ``mean``."""

    models: Mapping[str, Tensors]
    mean: Tensors

    @property
    def distance(self) -> float:
        """Mean over the peers of the squared distance to the mean (Shi et al. 2023, section 4)."""
        squared = [
            float((tensor - self.mean[name]).double().square().sum())
            for model in self.models.values()
            for name, tensor in model.items()
        ]
        return sum(squared) / len(self.models)


def consensus(federation: Federation) -> Consensus:
    """The present models of a simulated federation of peers.

    Raises :class:`FederationError` if it is no simulation, or if no peer has a model yet.
    """
    runtime = federation.runtime
    if not isinstance(runtime, Simulation):
        raise FederationError("only the peers of a simulation can be looked at")
    models = {
        name: node.state["own"]
        for name, node in sorted(runtime.nodes.items())
        if "own" in node.state
    }
    if not models:
        raise FederationError("no peer has a model: the federation has not run, or has a server")
    first = next(iter(models.values()))
    mean = {
        name: torch.stack([model[name].double() for model in models.values()]).mean(0).to(x.dtype)
        for name, x in first.items()
    }
    return Consensus(models, mean)
