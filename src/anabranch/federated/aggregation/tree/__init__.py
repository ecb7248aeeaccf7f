"""Event-driven hierarchical aggregation in processes that share memory (LIFL, MLSys 2024).

A service beside a run: it makes the weighted mean of updates that processes of this machine, or
others over TCP, bring to a :class:`Gateway`. In a run's own loop :class:`Tree` does the same sums
in one process, because what arrives there is journalled first and has been copied already.
"""

from anabranch.federated.aggregation.tree.agent import Agent
from anabranch.federated.aggregation.tree.gateway import Gateway, Link
from anabranch.federated.aggregation.tree.hierarchy import Hierarchy, require_mean
from anabranch.federated.aggregation.tree.layout import Layout
from anabranch.federated.aggregation.tree.plan import TreePlan, plan_hierarchy
from anabranch.federated.aggregation.tree.round import Round, Total
from anabranch.federated.aggregation.tree.slots import Counters, Input, Slot
from anabranch.federated.aggregation.tree.store import SharedStore

__all__ = [
    "Agent",
    "Counters",
    "Gateway",
    "Hierarchy",
    "Input",
    "Layout",
    "Link",
    "Round",
    "SharedStore",
    "Slot",
    "Total",
    "TreePlan",
    "plan_hierarchy",
    "require_mean",
]
