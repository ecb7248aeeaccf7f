"""FedAdam: Adam on the average change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.server import Server
from anabranch.federated.strategies.fedavg import FedAvg, FedAvgServer, zeros_like


class FedAdam(FedAvg):
    """The server takes an Adam step along the clients' average change (Reddi et al. 2021, alg. 2).

    Use it where FedAvg's progress is slow or uneven over parameters. ``server_lr`` is Adam's rate
    and needs tuning, ``tau`` bounds how far small changes are blown up. The other options are
    FedAvg's, but ``momentum``, which is ``beta1`` here.

    Moments are not corrected for their start, as in the paper; the second begins at ``tau ** 2``.
    """

    name = "fedadam"

    def __init__(
        self,
        server_lr: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
        **options: Any,
    ) -> None:
        if "momentum" in options:
            raise ConfigurationError("FedAdam has momentum: it is beta1")
        super().__init__(server_lr=server_lr, **options)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ConfigurationError(f"{name} is from 0 to below 1, not {beta}")
        if not (tau > 0 and math.isfinite(tau)):
            raise ConfigurationError(f"tau is above 0, not {tau}")
        self.beta1, self.beta2, self.tau = beta1, beta2, tau

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Averages, and steps."""
        return FedAdamServer(self, start)


class FedAdamServer(FedAvgServer):
    """Keeps both moments of the average change."""

    options: FedAdam
    plain = False

    def __init__(self, options: FedAdam, start: Mapping[str, Tensor]) -> None:
        super().__init__(options, start)
        self.first = zeros_like(start)
        self.second = {n: torch.full_like(x, options.tau**2) for n, x in start.items()}

    def step(self, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``m = b1 m + (1 - b1) d; v = b2 v + (1 - b2) d^2; x = x + lr m / (sqrt(v) + tau)``."""
        o = self.options
        self.first = {n: o.beta1 * m + (1 - o.beta1) * change[n] for n, m in self.first.items()}
        self.second = {
            n: o.beta2 * v + (1 - o.beta2) * change[n].square() for n, v in self.second.items()
        }
        return {
            n: x + o.server_lr * self.first[n] / (self.second[n].sqrt() + o.tau)
            for n, x in self.tensors.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Version and moments."""
        return {**super().state_dict(), "first": self.first, "second": self.second}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.first, self.second = state["first"], state["second"]
