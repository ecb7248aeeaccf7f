"""What can go wrong in a federation.

A :class:`ReplyRefused` concerns one message of one client: the coordinator counts it, tells the
schedule, and goes on. An :class:`AggregationError` concerns one round: the model stays as it was.
Everything else ends the run, after which :meth:`Federation.resume` goes on from what was stored.
"""

from __future__ import annotations

from anabranch.errors import AnabranchError, ConfigurationError


class FederationError(AnabranchError):
    """A federation cannot start or go on."""


class ReplyRefused(FederationError):
    """A client's reply cannot be used. ``what`` is a short word for counting."""

    what = "refused"


class PayloadError(ReplyRefused, ValueError):
    """Bytes are no payload, or a value cannot be put into one."""

    what = "malformed"


class PayloadMismatch(ReplyRefused):
    """A well-formed payload has other tensors than the server expects."""

    what = "mismatch"

    def __init__(self, client: str, name: str, expected: str, got: str) -> None:
        super().__init__(f"reply of {client}: {name} should be {expected}, but is {got}")
        self.client, self.name, self.expected, self.got = client, name, expected, got


class NotFinite(ReplyRefused):
    """A reply holds NaN or infinity."""

    what = "not finite"

    def __init__(self, client: str, name: str, count: int) -> None:
        super().__init__(f"reply of {client}: {name} has {count} values that are NaN or infinite")
        self.client, self.name = client, name


class ClientFailed(ReplyRefused):
    """The client says that it could not do the task."""

    what = "failed"


class ExchangeLost(FederationError):
    """A client was asked to continue an exchange that it knows nothing of."""


class AggregationError(FederationError):
    """The updates of a round cannot be combined; the model is unchanged."""


class EmptyRound(AggregationError):
    """No update of the round has any weight."""


class TooFewUpdates(AggregationError):
    """An aggregation rule needs more updates than there are."""

    def __init__(self, rule: str, updates: int, needed: int, bad: int = 0) -> None:
        against = f" to withstand {bad} bad ones" if bad else ""
        super().__init__(f"{rule} needs at least {needed} updates{against}; there are {updates}")
        self.rule, self.updates, self.needed, self.bad = rule, updates, needed, bad


class NotEnoughClients(FederationError):
    """Fewer clients are there than a round needs, and nobody came in time."""


class Stalled(FederationError):
    """Nothing is under way and the schedule waits for something: the run would never end."""


class StoreError(FederationError):
    """A stored run or client state cannot be read or written."""


class StoreFull(FederationError):
    """Shared memory has no room for a message, and none was made in time."""


class SnapshotMismatch(StoreError):
    """A stored run is of another strategy, seed or wire format."""

    exit_code = 2


class TopologyError(ConfigurationError):
    """A topology is malformed, or does not suit the strategy."""


class MixingMatrixError(TopologyError):
    """Mixing weights are not those of a gossip that keeps the mean."""


class SplitError(ConfigurationError):
    """Data cannot be split among the clients as asked."""
