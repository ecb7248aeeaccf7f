"""FedProx: stay near what you were sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Client, ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.strategies.fedavg import FedAvg, LocalClient
from anabranch.training.hooks import Hook
from anabranch.training.trainer import Trainer


class FedProx(FedAvg):
    """FedAvg with ``mu / 2 |w - w_sent|^2`` added to every local loss (Li et al. 2020, equation 2).

    Use it where clients' data differ or some do much more work than others. ``mu`` 0 is FedAvg;
    0.001 to 1 are usual. The other options are FedAvg's.
    """

    name = "fedprox"

    def __init__(self, mu: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        if not mu >= 0:
            raise ConfigurationError(f"mu is at least 0, not {mu}")
        self.mu = mu

    def client(self, local: LocalTraining) -> Client:
        """Trains on a leash."""
        return ProximalClient(local, self.upload, self.mu)


class ProximalClient(LocalClient):
    """Adds the gradient of ``mu / 2 |w - w_sent|^2`` to every step."""

    def __init__(self, local: LocalTraining, upload: Any, mu: float) -> None:
        super().__init__(local, upload)
        self.mu = mu

    def hooks(self, ctx: ClientContext, start: Mapping[str, Tensor]) -> Sequence[Hook]:
        """Add the gradient of the proximal term."""
        return [_Pull(start, self.mu)] if self.mu else []


class _Pull(Hook):
    """Adds ``mu (w - w_sent)`` to the gradients."""

    def __init__(self, start: Mapping[str, Tensor], mu: float) -> None:
        self.start, self.mu = start, mu

    def after_gradients(self, trainer: Trainer[Any]) -> None:
        """Before clipping, as the term is part of the loss."""
        for name, parameter in trainer.trainable.items():
            if parameter.grad is not None:
                pull = parameter.detach() - self.start[name].to(parameter.device)
                parameter.grad.add_(pull, alpha=self.mu)
