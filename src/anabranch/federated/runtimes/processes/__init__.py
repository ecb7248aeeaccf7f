"""Clients in processes of this machine that share memory (LIFL, MLSys 2024)."""

from anabranch.federated.runtimes.processes.pool import Pool
from anabranch.federated.runtimes.processes.runtime import Processes
from anabranch.federated.runtimes.processes.segments import Segments, sweep

__all__ = ["Pool", "Processes", "Segments", "sweep"]
