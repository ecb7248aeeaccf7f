"""How many aggregators each node gets (LIFL, MLSys 2024, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from anabranch.errors import ConfigurationError


@dataclass(frozen=True)
class TreePlan:
    """``leaves`` by node; nodes with several have a middle, and ``top`` is where all of it ends.

    With one node only, its middle (or its only leaf) is the top.
    """

    leaves: Mapping[str, int]
    top: str

    @property
    def middles(self) -> frozenset[str]:
        """Nodes with an aggregator between their leaves and the top."""
        return frozenset(node for node, count in self.leaves.items() if count > 1)

    @property
    def aggregators(self) -> int:
        """All of them."""
        return sum(self.leaves.values()) + len(self.middles) + (len(self.leaves) > 1)


def plan_hierarchy(queue: Mapping[str, float], fan_in: int = 2) -> TreePlan:
    """A plan for the updates that each node is expected to hold; ``fan_in`` of them per leaf.

    Two per leaf is the most parallel; more leaves pay only where there are cores for them.
    """
    if fan_in < 2:
        raise ConfigurationError(f"fan_in is at least 2, not {fan_in}")
    if bad := {node: q for node, q in queue.items() if not 0 <= q < math.inf}:
        raise ConfigurationError(f"queues are numbers of updates, not {bad}")
    busy = {node: q for node, q in sorted(queue.items()) if q > 0}
    if not busy:
        raise ConfigurationError("no node expects an update")
    leaves = {node: math.ceil(q / fan_in) for node, q in busy.items()}
    return TreePlan(leaves, max(busy, key=lambda node: busy[node]))
