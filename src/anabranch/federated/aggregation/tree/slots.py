"""Places in a tree of aggregators, what they are given, and the processes that fill them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Literal

from anabranch.federated.aggregation.tree.aggregator import Runs

Level = Literal["leaf", "middle", "top"]


@dataclass(frozen=True)
class Input:
    """Something to add: its key, what lies there, its factor, the examples and updates in it.

    ``client`` is whose update it is, which may turn out not to be finite; None for a sum.
    """

    key: bytes
    runs: Runs
    factor: float
    weight: float
    updates: int = 1
    client: str | None = None


@dataclass(eq=False)
class Slot:
    """A place in the tree. ``done`` gets its sum, or None if nothing came.

    ``refused`` hears of an input that has so many values that are not finite; it no longer counts.
    """

    name: str
    level: Level
    runs: Runs
    """One run: how many values a sum has, and of which type."""
    expected: int
    done: Callable[[Input | None], None]
    failed: Callable[[Exception], None]
    refused: Callable[[Input, int], None]
    eager: bool = True
    inputs: list[Input] = field(default_factory=list)
    """What a new process would have to add; a checkpoint replaces what it holds."""
    arrived: int = 0
    sent: int = 0
    added: int = 0
    """Of :attr:`inputs`, those that the process was told of, and those that it has added."""
    deaths: int = 0
    sealing: bool = False
    closed: bool = False
    copying: tuple[bytes, int] | None = None
    """Key of the checkpoint under way, and how many inputs it holds."""
    process: Process | None = None
    draft: bytes | None = None

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        return self.arrived == self.expected


@dataclass(eq=False)
class Process:
    """An aggregator process."""

    running: subprocess.Popen[bytes]
    pipe: Connection
    cpu: float = 0.0
    slot: Slot | None = None
    idle_since: float = 0.0


@dataclass
class Counters:
    """What the aggregators of a node did, counted where they speak and not by a process beside."""

    starts: int = 0
    promotions: int = 0
    """Slots that got a process which was there already."""
    restarts: int = 0
    checkpoints: int = 0
    added: int = 0
    seconds: float = 0.0
    """Time of adding, in sum."""
    key_bytes: int = 0
    """Keys that were passed on within the node."""
