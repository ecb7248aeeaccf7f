"""What servers have in common that add weighted differences without dividing by the weights.

A mean forgets how much of the federation was in a version. Where versions hold different clients
and each should count by its importance in the long run, the sum of ``weight * difference`` is
what has to be added (Fraboni et al. 2023, equation 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import EmptyRound
from anabranch.federated.payload import Payload
from anabranch.federated.server import Server, ServerContext

Importance = Literal["examples", "uniform"]


class DifferencesServer(Server):
    """Holds the shared tensors; a subclass folds differences of the clients and adds them."""

    associative = True

    def __init__(self, start: Mapping[str, Tensor], importance: Importance) -> None:
        if importance not in ("examples", "uniform"):
            raise ConfigurationError(f"importance is examples or uniform, not {importance!r}")
        self.tensors = dict(start)
        """The present version. Replaced as a whole, never changed."""
        self._importance = importance
        self._clients: Mapping[str, int] = {}

    def setup(self, ctx: ServerContext) -> None:
        """Who is there; the mapping follows joins and leaves."""
        self._clients = ctx.clients

    def message(self, client: str, kind: str) -> Payload:
        """The present version."""
        return self.tensors

    def expects(self, client: str, kind: str) -> Mapping[str, Tensor] | None:
        """The same tensors back."""
        return self.tensors

    def importance(self, client: str) -> float:
        """This client's share p of the objective; those of the clients that are there sum to 1.

        By declared examples, or 1 for each client with any.
        """
        size = {
            name: examples if self._importance == "examples" else min(examples, 1)
            for name, examples in self._clients.items()
        }
        total = sum(size.values())
        return size.get(client, 0) / total if total else 0.0

    def move(self, sums: Mapping[str, Tensor], rate: float) -> None:
        """``x += rate * sums``, where there are any."""
        if not sums:
            raise EmptyRound("no update has a weight above 0; the model stays as it was")
        self.tensors = {
            name: (x.to(torch.float64) + rate * sums[name]).to(x.dtype)
            for name, x in self.tensors.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The present version."""
        return {"tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.tensors = state["tensors"]


def add(sums: Mapping[str, Tensor], tensors: Mapping[str, Tensor], weight: float = 1.0) -> Any:
    """``sums + weight * tensors`` in float64; empty sums are zero."""
    scaled = {name: tensor.to(torch.float64) * weight for name, tensor in tensors.items()}
    return {name: sums[name] + x for name, x in scaled.items()} if sums else scaled
