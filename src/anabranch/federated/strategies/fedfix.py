"""FedFix: a version at fixed times, unbiased whoever is fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Client
from anabranch.federated.local import LocalTraining
from anabranch.federated.scheduling import Sampler, Schedule
from anabranch.federated.scheduling.fixed import FixedWindows
from anabranch.federated.server import Accumulator, Server, Update
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.differences import DifferencesServer, Importance, add
from anabranch.federated.strategies.fedasync import require_all
from anabranch.federated.strategies.fedavg import LocalClient

Weights = Literal["counting", "equal"]


class FedFix(Strategy):
    """Every ``window`` seconds, aggregate whoever has finished (Fraboni et al. 2023, section 4).

    Use it where devices are of different speed and every client must count by its data, not by its
    speed: nobody waits for the slowest, and the optimum is that of the whole federation.

    ``window`` None is 1.05 times the median duration of a task, measured. A window as long as the
    slowest task makes it FedAvg. ``weights``: ``counting`` gives a client its importance times the
    versions since it was last in one, which is the paper's p ceil(tau / window) for constant times
    and needs no model of them; ``equal`` gives it its importance, and favours the fast.
    ``importance`` is by ``examples``, or ``uniform``. Any schedule may be used: with
    :class:`Buffered` counting makes FedAsync (at a rate about as many times smaller as there are
    clients) and FedBuff unbiased, too; several updates of a client in one version count as their
    mean. ``max_staleness`` bounds the versions that are counted.
    """

    name = "fedfix"

    def __init__(
        self,
        window: float | None = None,
        weights: Weights = "counting",
        importance: Importance = "examples",
        server_lr: float = 1.0,
        max_staleness: int | None = None,
    ) -> None:
        if window is not None and not window > 0:
            raise ConfigurationError(f"window is above 0 seconds, not {window}")
        if weights not in ("counting", "equal"):
            raise ConfigurationError(f"weights is counting or equal, not {weights!r}")
        if importance not in ("examples", "uniform"):
            raise ConfigurationError(f"importance is examples or uniform, not {importance!r}")
        if not server_lr > 0:
            raise ConfigurationError(f"server_lr is above 0, not {server_lr}")
        if max_staleness is not None and max_staleness < 1:
            raise ConfigurationError(f"max_staleness is at least 1 version, not {max_staleness}")
        self.window, self.weights, self.importance = window, weights, importance
        self.server_lr, self.max_staleness = server_lr, max_staleness

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Adds differences by their clients' weights."""
        return FedFixServer(self, start)

    def client(self, local: LocalTraining) -> Client:
        """Trains."""
        return LocalClient(local)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Fixed windows."""
        require_all(self.name, sampler)
        return FixedWindows(rounds, self.window)


class FedFixServer(DifferencesServer):
    """``x += server_lr * sum_i d_i difference_i``; remembers when each client was last included."""

    def __init__(self, options: FedFix, start: Mapping[str, Tensor]) -> None:
        super().__init__(start, options.importance)
        self.options = options
        self.included: dict[str, int] = {}
        """The last version of each client that was in any."""

    def settings(self) -> dict[str, Any]:
        """The method's."""
        return {"strategy": FedFix.name, **vars(self.options)}

    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Sums by client: how many of its updates a version holds is only known at the end."""
        acc = acc or {"making": 0, "clients": {}}
        if update.examples:
            mine = acc["clients"].setdefault(update.client, {"updates": 0, "sums": {}})
            mine["updates"] += 1
            mine["sums"] = add(mine["sums"], update.tensors)
        acc["making"] = update.version + update.staleness + 1
        return acc

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """A client may be in both."""
        clients = dict(one["clients"])
        for name, theirs in other["clients"].items():
            mine = clients.get(name, {"updates": 0, "sums": {}})
            clients[name] = {
                "updates": mine["updates"] + theirs["updates"],
                "sums": add(theirs["sums"], mine["sums"]) if mine["sums"] else theirs["sums"],
            }
        return {"making": one["making"], "clients": clients}

    def commit(self, acc: Accumulator) -> Mapping[str, float]:
        """Add; ``weight`` is the sum of the weights, 1 on average if they are unbiased."""
        sums: dict[str, Tensor] = {}
        total = 0.0
        for client in sorted(acc["clients"]):
            mine = acc["clients"][client]
            if weight := self.weight(client, acc["making"]):
                sums = add(sums, mine["sums"], weight / mine["updates"])
                total += weight
        self.move(sums, self.options.server_lr)
        self.included |= dict.fromkeys(acc["clients"], acc["making"])
        return {"weight": total}

    def weight(self, client: str, version: int) -> float:
        """d of a client's work in the commit that makes ``version``."""
        p = self.importance(client)
        if self.options.weights == "equal":
            return p
        versions = version - self.included.get(client, 0)
        return p * min(versions, self.options.max_staleness or versions)

    def state_dict(self) -> dict[str, Any]:
        """The present version, and who was in which."""
        return {**super().state_dict(), "included": self.included}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self.included = state["included"]
