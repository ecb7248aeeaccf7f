"""Runtimes move messages and own time; the coordinator does neither."""

from anabranch.federated.runtimes.base import (
    Arrived,
    ClientJoined,
    ClientLeft,
    Fired,
    Input,
    Lost,
    Runtime,
    Timed,
)
from anabranch.federated.runtimes.simulation import Simulation, Site

__all__ = [
    "Arrived",
    "ClientJoined",
    "ClientLeft",
    "Fired",
    "Input",
    "Lost",
    "Runtime",
    "Simulation",
    "Site",
    "Timed",
]
