"""FedCompass: clients of different speed do different amounts of work, and arrive together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Client
from anabranch.federated.local import LocalTraining
from anabranch.federated.scheduling import Sampler, Schedule
from anabranch.federated.scheduling.compass import Compass
from anabranch.federated.server import Accumulator, Server, Update
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.differences import DifferencesServer, Importance, add
from anabranch.federated.strategies.fedasync import require_all
from anabranch.federated.strategies.fedavg import LocalClient, zeros_like


class FedCompass(Strategy):
    """Groups that finish together are aggregated, weighted by importance and age (Li et al. 2024).

    Use it across sites of different speed: nobody idles as with FedAvg, and little is as stale as
    with FedBuff. The schedule is :class:`Compass`, which sets every task's steps between
    ``min_steps`` and ``max_steps``; sites up to that ratio apart end in one group.

    The model moves by ``alpha * sum_c p_c (1 + u_c) ** -staleness * difference_c``, u versions
    late; p is the client's ``importance``, by ``examples`` or ``uniform``. ``normalise`` divides a
    difference by its steps and multiplies the sum by the mean steps (FedCompass+N), which takes
    away the advantage of who did more. ``momentum`` is the server's (FedCompass+M).

    The published configuration passes an exponent whose sign makes stale updates count more; here
    they count less, as the paper says.
    """

    name = "fedcompass"

    def __init__(
        self,
        alpha: float = 0.9,
        staleness: float = 0.5,
        importance: Importance = "examples",
        normalise: bool = False,
        momentum: float = 0.0,
        max_steps: int = 100,
        min_steps: int = 20,
        speed_momentum: float = 0.9,
        latest_factor: float = 1.5,
    ) -> None:
        if not 0 < alpha <= 1:
            raise ConfigurationError(f"alpha is above 0 and at most 1, not {alpha}")
        if not staleness >= 0:
            raise ConfigurationError(f"staleness is an exponent of at least 0, not {staleness}")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum is from 0 to below 1, not {momentum}")
        if importance not in ("examples", "uniform"):
            raise ConfigurationError(f"importance is examples or uniform, not {importance!r}")
        self.alpha, self.staleness, self.importance = alpha, staleness, importance
        self.normalise, self.momentum = normalise, momentum
        self.max_steps, self.min_steps = max_steps, min_steps
        self.speed_momentum, self.latest_factor = speed_momentum, latest_factor
        self.schedule(1)  # checks its options

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Adds differences by importance and age."""
        return FedCompassServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Trains for as many steps as its task says."""
        return LocalClient(local)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Groups; ``rounds`` are versions."""
        require_all(self.name, sampler)
        return Compass(
            rounds, self.max_steps, self.min_steps, self.speed_momentum, self.latest_factor
        )


class FedCompassServer(DifferencesServer):
    """``x += alpha * sum_c p_c (1 + u_c) ** -staleness * difference_c``, with momentum if any."""

    def __init__(self, options: FedCompass, start: Mapping[str, Tensor]) -> None:
        super().__init__(start, options.importance)
        self.options = options
        self.velocity = zeros_like(start) if options.momentum else {}

    def settings(self) -> dict[str, Any]:
        """The method's."""
        return {"strategy": FedCompass.name, **vars(self.options)}

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Add to the sum, and to the steps."""
        acc = acc or {"sums": {}, "steps": 0.0, "updates": 0}
        weight = self.importance(update.client) * (1 + update.staleness) ** -self.options.staleness
        if not (weight and update.examples):
            return acc
        # Who does not say how much it did counts as having done a step.
        steps = update.units or 1.0
        if self.options.normalise:
            weight /= steps
        return {
            "sums": add(acc["sums"], update.tensors, weight),
            "steps": acc["steps"] + steps,
            "updates": acc["updates"] + 1,
        }

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Add sums and steps; either may be of no update that counts."""
        both = one["sums"] and other["sums"]
        return {
            "sums": add(one["sums"], other["sums"]) if both else one["sums"] or other["sums"],
            "steps": one["steps"] + other["steps"],
            "updates": one["updates"] + other["updates"],
        }

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Add; ``updates`` is how many came together."""
        rate = self.options.alpha
        if self.options.normalise and acc["updates"]:
            rate *= acc["steps"] / acc["updates"]
        if not (self.options.momentum and acc["sums"]):
            self.move(acc["sums"], rate)
        else:
            self.velocity = {
                name: (self.options.momentum * v + rate * acc["sums"][name]).to(v.dtype)
                for name, v in self.velocity.items()
            }
            self.move(self.velocity, 1.0)
        return {"updates": acc["updates"]}

    def state_dict(self) -> dict[str, Any]:
        """The present version and the momentum."""
        return {**super().state_dict(), "velocity": self.velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.velocity = state["velocity"]
