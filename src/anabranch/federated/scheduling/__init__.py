"""Schedules: who works when, and when a version is made.

A schedule hears events and answers with actions; it reads no clock and sends nothing. Its options
and its state are dataclass fields, so that a run can be stored at any event.
"""

from anabranch.federated.scheduling.base import Schedule, View
from anabranch.federated.scheduling.buffered import Buffered
from anabranch.federated.scheduling.deadline import Deadline
from anabranch.federated.scheduling.gossip import Gossip
from anabranch.federated.scheduling.sampling import Everyone, Sampler, Uniform
from anabranch.federated.scheduling.sync import Sync

__all__ = [
    "Buffered",
    "Deadline",
    "Everyone",
    "Gossip",
    "Sampler",
    "Schedule",
    "Sync",
    "Uniform",
    "View",
]
