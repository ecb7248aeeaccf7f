"""The half of a method that runs at the coordinator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.messages import Reply
from anabranch.federated.payload import Payload, Value
from anabranch.federated.wire import Direction, Schema

if TYPE_CHECKING:
    from anabranch.federated.topologies import Topology

Accumulator = Any
"""What :meth:`Server.fold` builds up; None before the first update. Tensors, bytes and JSON."""


@dataclass(frozen=True)
class ServerContext:
    """What a server may know of the run. ``clients`` maps names to their declared examples."""

    seed: int
    clients: Mapping[str, int]
    topology: Topology


@dataclass(frozen=True)
class Update:
    """An accepted reply.

    ``examples`` is capped by what the client declared when it joined. ``staleness`` counts the
    commits since its task was sent, ``seconds`` the time between task and reply.
    """

    task: int
    client: str
    kind: str
    version: int
    payload: dict[str, Value]
    examples: int
    staleness: int
    units: float
    seconds: float
    metrics: Mapping[str, float]
    group: str = ""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the payload by name."""
        return {name: v for name, v in self.payload.items() if isinstance(v, Tensor)}


class Server(ABC):
    """Turns updates into versions. Knows no clock, no files and no network.

    One commit is ``acc = None; acc = fold(acc, update) for each update; commit(acc)``, with the
    updates in the order of their tasks, whatever the order of arrival.
    """

    associative: bool = False
    """Whether partial accumulators may be merged, up to rounding. A tree needs that."""
    opaque: ClassVar[bool] = False
    """Whether replies are kept as they came: ``payload["body"]`` is bytes that nobody decoded."""

    def setup(self, ctx: ServerContext) -> None:
        """Called once before anything else, also before a resumed run loads its state."""

    def settings(self) -> dict[str, Any]:
        """The options, as JSON values; a stored run only goes on with the same ones."""
        return {}

    def schemas(self) -> Mapping[tuple[Direction, str], Schema]:
        """Messages without a header, by direction and kind."""
        return {}

    @abstractmethod
    def message(self, client: str, kind: str) -> Payload:
        """What a client is sent. It may differ from client to client.

        A payload is never changed once it was returned. Returning the same object again saves
        encoding it.
        """

    def expects(self, client: str, kind: str) -> Mapping[str, Tensor] | None:
        """Tensors of the names, shapes and dtypes that a reply must have; None: anything goes."""
        return None

    def respond(self, reply: Reply, payload: Payload) -> str | None:
        """The kind of the next message of this exchange to the same client, or None if it ends.

        Only the reply that ends an exchange becomes an :class:`Update`.
        """
        return None

    @abstractmethod
    def fold(self, acc: Accumulator, update: Update) -> Accumulator:
        """Add an update; the first accumulator is None."""

    def merge(self, one: Accumulator, other: Accumulator) -> Accumulator:
        """Join two accumulators, neither of which is None; only servers that are associative can.

        Topologies and schedules that need it ask for ``associative`` before a run begins.
        """
        raise ConfigurationError(f"the sums of {type(self).__name__} cannot be joined: use a star")

    @abstractmethod
    def commit(self, acc: Accumulator) -> Mapping[str, float] | None:
        """Make the next version, and give figures to log.

        Raises :class:`AggregationError` before anything is changed.
        """

    def export(self, folder: Path) -> None:
        """Write what stands for the last version beside the model, for methods that have it."""

    @property
    def quiet(self) -> bool:
        """Whether :meth:`state_dict` says everything. False while an exchange holds a graph.

        Snapshots wait for it; until then a resumed run replays the journal.
        """
        return True

    def state_dict(self) -> dict[str, Any]:
        """All state: nested dicts and lists of tensors, bytes and JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
