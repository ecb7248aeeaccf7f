"""Every byte that was sent, counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch.federated.wire import Direction


@dataclass(frozen=True)
class Traffic:
    """Some messages: how many, the bytes of their payloads, and those of the envelopes around."""

    messages: int = 0
    payload: int = 0
    envelope: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.messages + other.messages,
            self.payload + other.payload,
            self.envelope + other.envelope,
        )

    @property
    def bytes(self) -> int:
        """Payloads and envelopes."""
        return self.payload + self.envelope


@dataclass(frozen=True, order=True)
class Account:
    """What messages are counted under. ``version`` is the one that the task was sent with.

    ``client`` is an aggregator's name for the partial sums in a tree.
    """

    direction: Direction
    client: str
    kind: str
    version: int


class Ledger:
    """Messages by direction, client, kind and version. Also counts what is then refused."""

    def __init__(self) -> None:
        self._accounts: dict[Account, Traffic] = {}

    def record(self, account: Account, payload: int, envelope: int) -> None:
        """Count one message."""
        before = self._accounts.get(account, Traffic())
        self._accounts[account] = before + Traffic(1, payload, envelope)

    def total(self, **fields: Any) -> Traffic:
        """Sum over the accounts with these values, as in ``total(direction="up", version=3)``."""
        chosen = (
            traffic
            for account, traffic in self._accounts.items()
            if all(getattr(account, name) == value for name, value in fields.items())
        )
        return sum(chosen, Traffic())

    def by(self, *names: str) -> dict[tuple[Any, ...], Traffic]:
        """Sums by some of the fields, sorted, as in ``by("direction", "kind")``."""
        sums: dict[tuple[Any, ...], Traffic] = {}
        for account, traffic in self._accounts.items():
            key = tuple(getattr(account, name) for name in names)
            sums[key] = sums.get(key, Traffic()) + traffic
        return dict(sorted(sums.items()))

    def __iter__(self) -> Iterator[tuple[Account, Traffic]]:
        return iter(sorted(self._accounts.items(), key=lambda item: item[0]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._accounts == other._accounts

    __hash__ = None  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"rows": [[*vars(a).values(), *vars(t).values()] for a, t in self]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all accounts."""
        self._accounts = {Account(*row[:4]): Traffic(*row[4:]) for row in state["rows"]}
