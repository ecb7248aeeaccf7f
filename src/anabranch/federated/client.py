"""The half of a method that runs where the data is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from anabranch.federated.messages import Work
from anabranch.federated.payload import Payload, Value

Answer = tuple[Payload, int]
"""What goes back, and how many examples stand behind it."""


@dataclass
class ClientContext:
    """One site during one task.

    ``model`` may be shared by all sites of a process: leave it as you found it. ``state`` is
    personal and never leaves the site: nested dicts (with text keys) and lists of tensors, bytes
    and JSON values. It is stored together with the reply, or not at all if the task fails.
    ``exchange`` is memory for one exchange of several messages and may hold anything, for example
    an autograd graph; it is empty at the first message.

    ``seed`` depends on the run's seed, the site and the task only, and so do ``rng`` and the global
    generators of Python, NumPy and torch while the task runs.
    """

    name: str
    data: Any
    model: Any
    task: int
    kind: str
    version: int
    work: Work
    accepted: int
    """The newest task of this site whose reply counts; see :class:`Task`."""
    state: dict[str, Any]
    exchange: dict[str, Any]
    seed: int
    open_peer: Callable[[bytes, str], dict[str, Value]]
    """``open_peer(body, kind)`` reads the reply of another site to a task of that kind."""
    units: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @cached_property
    def rng(self) -> np.random.Generator:
        """A generator for this task."""
        return np.random.default_rng(self.seed)

    def spend(self, units: float) -> None:
        """Count work; a simulated device takes ``seconds_per_unit`` for each."""
        self.units += units

    def report(self, **metrics: float) -> None:
        """Figures that travel with the reply."""
        self.metrics.update(metrics)


class Client(ABC):
    """What a site does. One object serves all sites of a process: what belongs to a site is in the
    context, never in ``self``.
    """

    def setup(self, ctx: ClientContext) -> None:
        """Once in the life of a site, before its first task: give ``ctx.state`` its beginning."""

    @abstractmethod
    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """Do a task; may be run again with the same result if the site was killed meanwhile."""
