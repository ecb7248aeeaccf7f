"""Federated learning: one loop for every way of learning together.

Belongs here: the coordinator, what clients and servers of a method are, schedules, codecs,
aggregators, runtimes and the methods themselves. How a client trains is
:mod:`anabranch.training`'s business.
"""

from anabranch.federated.client import Client, ClientContext
from anabranch.federated.clock import DeviceProfile, log_uniform
from anabranch.federated.core import Federation
from anabranch.federated.messages import Reply, Task, Work
from anabranch.federated.result import RunResult
from anabranch.federated.runtimes import Simulation, Site
from anabranch.federated.scheduling import Buffered, Deadline, Everyone, Gossip, Sync, Uniform
from anabranch.federated.server import Server, ServerContext, Update
from anabranch.federated.topologies import Graph, Star, Tree

__all__ = [
    "Buffered",
    "Client",
    "ClientContext",
    "Deadline",
    "DeviceProfile",
    "Everyone",
    "Federation",
    "Gossip",
    "Graph",
    "Reply",
    "RunResult",
    "Server",
    "ServerContext",
    "Simulation",
    "Site",
    "Star",
    "Sync",
    "Task",
    "Tree",
    "Uniform",
    "Update",
    "Work",
    "log_uniform",
]
