"""Federated averaging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.aggregation import Combined, Mean, Rule
from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import Payload, Value
from anabranch.federated.server import Accumulator, Server, Update
from anabranch.federated.shared import tensors_of
from anabranch.federated.strategies.base import Strategy
from anabranch.training.hooks import Hook

Upload = Literal["delta", "weights"]
Weighting = Literal["examples", "uniform"]


class FedAvg(Strategy):
    """Clients train locally, the server averages (McMahan et al. 2017, algorithm 1).

    Use it first; it is the baseline of everything else. It drifts where clients' data differ much.

    ``upload``: clients send what changed (``delta``), which a codec can shrink and which may be
    late, or their ``weights``, for rounds with a barrier only: then one client alone gives exactly
    what it trained. ``weighting``: by ``examples``, or ``uniform``. ``rule`` replaces the mean.
    ``server_lr`` multiplies the change, ``momentum`` is the server's (Hsu et al. 2019): a version
    also moves by that share of what the version before moved by. An update that is u versions old
    counts ``(1 + u) ** -staleness`` (FedBuff, Nguyen et al. 2022).
    """

    name = "fedavg"
    private = True

    def __init__(
        self,
        upload: Upload = "delta",
        weighting: Weighting = "examples",
        server_lr: float = 1.0,
        staleness: float = 0.5,
        rule: Rule | None = None,
        momentum: float = 0.0,
    ) -> None:
        rule = rule or Mean()
        if upload not in ("delta", "weights"):
            raise ConfigurationError(f"upload is delta or weights, not {upload!r}")
        if weighting not in ("examples", "uniform"):
            raise ConfigurationError(f"weighting is examples or uniform, not {weighting!r}")
        if not server_lr > 0:
            raise ConfigurationError(f"server_lr is above 0, not {server_lr}")
        if not staleness >= 0:
            raise ConfigurationError(f"staleness is an exponent of at least 0, not {staleness}")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum is from 0 to below 1, not {momentum}")
        if rule.needs_differences and upload == "weights":
            raise ConfigurationError(f"{rule.name} combines differences: use upload=delta")
        self.upload: Upload = upload
        self.weighting: Weighting = weighting
        self.server_lr, self.staleness, self.rule = server_lr, staleness, rule
        self.momentum = momentum

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Averages."""
        return FedAvgServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Trains."""
        return LocalClient(local, self.upload)

    def settings(self) -> dict[str, Any]:
        """Name and options as JSON values."""
        return {"strategy": self.name, **vars(self), "rule": self.rule.settings()}


class FedAvgServer(Server):
    """Holds the shared tensors, and moves them by the average change of each round."""

    def __init__(self, options: FedAvg, start: Mapping[str, Tensor]) -> None:
        self.options = options
        self.tensors = dict(start)
        """The present version. Replaced as a whole, never changed."""
        self.associative = options.rule.associative
        self.velocity = zeros_like(start) if options.momentum else {}
        """What the last version moved by."""

    def settings(self) -> dict[str, Any]:
        """The method's."""
        return self.options.settings()

    def message(self, client: str, kind: str) -> Payload:
        """The present version."""
        return self.tensors

    def expects(self, client: str, kind: str) -> Mapping[str, Tensor] | None:
        """The same tensors back."""
        return self.tensors

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Add to the rule's sum or list."""
        tensors = update.tensors
        if update.staleness and self.options.upload == "weights":
            raise ConfigurationError(
                "late weights would undo the versions since they were sent; without a barrier use "
                "upload=delta"
            )
        if update.staleness and self.options.staleness:
            discount = (1 + update.staleness) ** -self.options.staleness
            tensors = {name: tensor * discount for name, tensor in tensors.items()}
        weight = update.examples
        if self.options.weighting == "uniform":
            weight = min(weight, 1)  # whoever had no data did not train
        return self.options.rule.fold(acc, tensors, weight, update.client)

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """As the rule does."""
        return self.options.rule.merge(one, other)

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Move by the combined change; scores of the clients, if the rule gives any."""
        combined = self.options.rule.finish(acc)
        o = self.options
        if o.upload == "weights" and o.server_lr == 1 and not o.momentum and self.plain:
            self.tensors = combined.tensors
        else:
            self.tensors = self.step(self._change(combined))
        figures = {f"quality/{client}": score for client, score in combined.scores.items()}
        return figures | ({"removed": len(combined.removed)} if combined.removed else {})

    plain = True
    """Whether a step is nothing but adding the change."""

    def step(self, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next version from the combined change."""
        moved = {name: self.options.server_lr * x for name, x in change.items()}
        if self.options.momentum:
            moved = {n: self.options.momentum * v + moved[n] for n, v in self.velocity.items()}
            self.velocity = moved
        return {name: x + moved[name] for name, x in self.tensors.items()}

    def _change(self, combined: Combined) -> dict[str, Tensor]:
        if self.options.upload == "delta":
            return combined.tensors
        return {name: tensor - self.tensors[name] for name, tensor in combined.tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        """The present version and the momentum."""
        return {"tensors": self.tensors, "velocity": self.velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.tensors, self.velocity = state["tensors"], state["velocity"]


class LocalClient(Client):
    """Trains on its own data from what it is sent. Override :meth:`hooks` to bend the steps."""

    def __init__(self, local: LocalTraining, upload: Upload = "delta") -> None:
        self.local = local
        self.upload = upload

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Weights, or their change, after the task's work."""
        start = tensors_of(payload)
        result = self.local.run(ctx, start, self.hooks(ctx, start))
        if self.upload == "weights":
            return result.tensors, result.examples
        return {name: result.tensors[name] - x for name, x in start.items()}, result.examples

    def hooks(self, ctx: ClientContext, start: Mapping[str, Tensor]) -> Sequence[Hook]:
        """What acts on each step."""
        return ()


def zeros_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same shapes, all zero."""
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
