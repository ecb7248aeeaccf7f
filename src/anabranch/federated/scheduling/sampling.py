"""Which clients take part in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import ConfigurationError


class Sampler(ABC):
    """Chooses among the clients that are there."""

    @abstractmethod
    def needs(self, clients: int) -> int:
        """How many must be there for a round, of so many that are."""

    @abstractmethod
    def pick(self, clients: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Names of a round, sorted. ``clients`` is sorted and there are enough."""


@dataclass(frozen=True)
class Everyone(Sampler):
    """All clients, at least ``minimum``."""

    minimum: int = 1

    def needs(self, clients: int) -> int:
        """The minimum."""
        return self.minimum

    def pick(self, clients: Sequence[str], rng: np.random.Generator) -> list[str]:
        """All."""
        return list(clients)


@dataclass(frozen=True)
class Uniform(Sampler):
    """A number of clients (int), or a share of those that are there (float), without replacement.

    A share is rounded down, to at least one.
    """

    count: int | float

    def __post_init__(self) -> None:
        share = isinstance(self.count, float)
        if (share and not 0 < self.count <= 1) or (not share and self.count < 1):
            raise ConfigurationError(
                f"count is a number of clients from 1 on, or a share up to 1.0, not {self.count}"
            )

    def needs(self, clients: int) -> int:
        """The number, or the share of what is there."""
        if isinstance(self.count, float):
            return max(1, int(self.count * clients))
        return self.count

    def pick(self, clients: Sequence[str], rng: np.random.Generator) -> list[str]:
        """A random choice."""
        chosen = rng.choice(len(clients), self.needs(len(clients)), replace=False)
        return [clients[index] for index in sorted(chosen.tolist())]
