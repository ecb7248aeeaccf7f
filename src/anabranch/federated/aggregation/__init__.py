"""Aggregators: how the updates of a round become one; each module is one or a family.

A rule that is no mean needs all updates at once and tolerates some bad ones. Rules work on any
tensors, for example on gradients of data-parallel workers, and know nothing of federations.
``anabranch list aggregators`` shows them.
"""

from anabranch.federated.aggregation.base import Aggregate, Combined, Rule
from anabranch.federated.aggregation.flag import Flag, subspace
from anabranch.federated.aggregation.krum import Krum, MultiKrum
from anabranch.federated.aggregation.mean import Mean
from anabranch.federated.aggregation.order import Median, TrimmedMean

__all__ = [
    "Aggregate",
    "Combined",
    "Flag",
    "Krum",
    "Mean",
    "Median",
    "MultiKrum",
    "Rule",
    "TrimmedMean",
    "subspace",
]
