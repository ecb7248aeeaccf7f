"""A method whose updates the coordinator sees as a sum only."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Client
from anabranch.federated.codecs import Codec, Identity
from anabranch.federated.local import LocalTraining
from anabranch.federated.scheduling import Sampler, Schedule, Sync
from anabranch.federated.secure.client import SecureClient
from anabranch.federated.secure.protocol import SecureOptions
from anabranch.federated.secure.schedule import SecureSync
from anabranch.federated.secure.server import SecureServer
from anabranch.federated.server import Server
from anabranch.federated.strategies.base import Strategy
from anabranch.federated.strategies.fedavg import FedAvg


class Secure(Strategy):
    """``strategy`` with secure sums (Bonawitz et al. 2017): single updates stay hidden.

    Use it where the coordinator is trusted to follow the protocol but not to look at updates. Works
    for FedAvg and what only changes its local training or its server's step, in rounds with a
    barrier, in a star, without codecs towards the coordinator. See docs/federation.md for what it
    protects against and what not.

    Example::

        Secure(FedProx(mu=0.01)).simulate(model, local, sites, rounds=20).run()
    """

    private = True  # as all methods that it takes; without a name, as it is none by itself

    def __init__(self, strategy: Strategy, options: SecureOptions | None = None) -> None:
        if not isinstance(strategy, FedAvg):
            raise ConfigurationError(
                f"{strategy.name} needs more than the weighted mean of the updates; a secure sum "
                f"gives no more: use fedavg, fedprox or fedadam"
            )
        self.strategy = strategy
        self.options = options or SecureOptions()

    def begin(self, model: nn.Module) -> Server:
        """Opens sums for the method's server."""
        return SecureServer(self.strategy.begin(model), self.options)

    def server(self, start: Mapping[str, Tensor]) -> Server:
        """Opens sums for the method's server."""
        return SecureServer(self.strategy.server(start), self.options)

    def client(self, local: LocalTraining) -> Client:
        """Masks what the method's client sends."""
        uniform = self.strategy.weighting == "uniform"
        return SecureClient(self.strategy.client(local), self.options, uniform)

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Four phases a round."""
        return secure_schedule(self.strategy.schedule(rounds, sampler))


def secure_schedule(schedule: Schedule) -> SecureSync:
    """The same rounds in four phases; :class:`ConfigurationError` if there are no rounds."""
    if type(schedule) is not Sync:
        raise ConfigurationError(
            f"a secure sum needs all sites of a round at once: use the schedule sync, not "
            f"{type(schedule).__name__.lower()}"
        )
    options = {f.name: getattr(schedule, f.name) for f in schedule._fields() if f.init}
    return SecureSync(**options)


def refuse_codec(codec: Codec | None) -> None:
    """Raise :class:`ConfigurationError` for a codec of updates."""
    if codec is not None and not isinstance(codec, Identity):
        raise ConfigurationError(
            f"{codec!r} cannot encode masked updates, which are integers without structure; a "
            f"secure sum takes no codec (bits: 32 halves its messages)"
        )
