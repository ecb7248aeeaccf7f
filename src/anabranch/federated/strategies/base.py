"""What a method is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from anabranch.errors import ConfigurationError
from anabranch.federated.client import Client
from anabranch.federated.core import Federation
from anabranch.federated.local import LocalTraining
from anabranch.federated.runtimes import Simulation, Site
from anabranch.federated.scheduling import Sampler, Schedule, Sync
from anabranch.federated.scheduling.sampling import Everyone
from anabranch.federated.server import Server
from anabranch.federated.shared import shared_tensors


class Strategy(ABC):
    """A method with its options, which are constructor arguments.

    Example::

        federation = FedProx(mu=0.1).simulate(model, local, sites, rounds=20)
        federation.run()
    """

    name: ClassVar[str]
    decentralised: ClassVar[bool] = False
    """Whether peers work in a graph, without a server that holds a model."""
    private: ClassVar[bool] = False
    """Whether clients whose steps are private say nothing else of their examples."""
    adapter: ClassVar[str] = ""
    """The adapter method that it is for; empty: anything that is trained."""
    moves_base: ClassVar[bool] = False
    """Whether versions hold frozen weights, too, so that an adapter alone is not the model."""

    @abstractmethod
    def server(self, start: Mapping[str, Tensor]) -> Server:
        """The coordinator's half, from the first version of what is shared."""

    def begin(self, model: nn.Module) -> Server:
        """The coordinator's half for what ``model`` trains.

        Override it where a method must know more of the model than those tensors.
        """
        return self.server(shared_tensors(model))

    @abstractmethod
    def client(self, local: LocalTraining) -> Client:
        """The sites' half."""

    def check(self, local: LocalTraining) -> None:
        """Refuse a promise of privacy that this method would not keep."""
        if local.privacy is not None and not self.private:
            raise ConfigurationError(
                f"{self.name} is not private: its clients say more of their examples than what "
                f"private steps led to; fedavg, fedprox, fedadam, fedit and fed-sb are"
            )

    def schedule(self, rounds: int, sampler: Sampler | None = None) -> Schedule:
        """Who works when, unless the user says otherwise."""
        return Sync(rounds, sampler or Everyone())

    def simulate(
        self,
        model: nn.Module,
        local: LocalTraining,
        sites: Sequence[Site],
        rounds: int = 1,
        *,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> Federation:
        """A federation of simulated sites that share what ``model`` trains.

        ``options`` are those of :class:`Federation`.
        """
        self.check(local)
        return Federation(
            self.begin(model),
            self.client(local),
            schedule or self.schedule(rounds),
            Simulation(sites, model),
            **options,
        )
