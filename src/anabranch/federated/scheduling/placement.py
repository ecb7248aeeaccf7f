"""Which node of several aggregates which client's update (LIFL, MLSys 2024, section 4).

A node has a residual capacity: the updates that it can still take at once before aggregating them
takes longer. ``best_fit`` fills few nodes, so that most updates meet without crossing a network;
``worst_fit`` spreads them as a load balancer would.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from anabranch.errors import ConfigurationError

logger = logging.getLogger(__name__)

Residual = Mapping[str, float]
"""Updates that each node can still take."""


def best_fit(residual: Residual, clients: int) -> dict[str, int]:
    """Clients by node: each goes to the fullest node that still has room for one.

    Ties go to the lower name. Where nobody has room, the node with most of it is overloaded, which
    is logged. Nodes without clients are left out.
    """
    return _place(residual, clients, lambda left: min(left, key=lambda n: (left[n], n)))


def worst_fit(residual: Residual, clients: int) -> dict[str, int]:
    """Each goes to the emptiest node."""
    return _place(residual, clients, lambda left: min(left, key=lambda n: (-left[n], n)))


def first_fit(residual: Residual, clients: int) -> dict[str, int]:
    """Each goes to the first node with room, in the order of their names."""
    return _place(residual, clients, min)


class Ewma:
    """A smoothed series, ``a * before + (1 - a) * new``; the first value is taken as it is."""

    def __init__(self, a: float = 0.7) -> None:
        if not 0 <= a < 1:
            raise ConfigurationError(f"the weight of the past is from 0 to below 1, not {a}")
        self.a = a
        self.value: float | None = None

    def add(self, new: float) -> float:
        """The smoothed value with one more."""
        self.value = new if self.value is None else self.a * self.value + (1 - self.a) * new
        return self.value


def measure_capacity(
    seconds: Callable[[float], float], rates: Sequence[float], bend: float = 1.5
) -> float:
    """Updates that a node aggregates at once before it slows down: ``rate * seconds`` at the bend.

    ``seconds(rate)`` is the measured mean time of one update at so many arrivals per second. Rates
    are raised in order until it exceeds ``bend`` times that of the first; the last rate before that
    counts.
    """
    if not rates or sorted(rates) != list(rates) or not rates[0] > 0 or not bend > 1:
        raise ConfigurationError(f"rates rise from above 0, and bend is above 1: {rates}, {bend}")
    idle = seconds(rates[0])
    capacity = rates[0] * idle
    for rate in rates[1:]:
        taken = seconds(rate)
        if taken > bend * idle:
            break
        capacity = rate * taken
    if not (capacity > 0 and math.isfinite(capacity)):
        raise ConfigurationError(f"an update took {idle} s, from which no capacity follows")
    return capacity


def _place(
    residual: Residual, clients: int, choose: Callable[[dict[str, float]], str]
) -> dict[str, int]:
    if not residual:
        raise ConfigurationError("there is no node to place clients on")
    if clients < 0:
        raise ConfigurationError(f"clients are at least 0, not {clients}")
    left = dict(residual)
    placed: dict[str, int] = {}
    over = 0
    for _ in range(clients):
        fitting = {node: room for node, room in left.items() if room >= 1}
        if fitting:
            node = choose(fitting)
        else:
            over += 1
            node = min(left, key=lambda n: (-left[n], n))
        left[node] -= 1
        placed[node] = placed.get(node, 0) + 1
    if over:
        logger.warning("%d of %d clients are more than the nodes have room for", over, clients)
    return dict(sorted(placed.items()))
