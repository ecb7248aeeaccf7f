"""What a step and a run report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

StoppedBecause = Literal["finished", "early stopping", "terminated", "stopped"]
"""``terminated``: SIGTERM; ``stopped``: :meth:`Trainer.stop`. Both left a checkpoint."""


@dataclass(frozen=True)
class StepReport:
    """One optimiser step. ``tokens`` is the objective's measure of the items' size.

    ``skipped`` is empty, or says why the weights were left as they were.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Best:
    """The best value of the early-stopping metric so far, and the step after which it was seen."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class RunResult:
    """How a run went.

    ``steps``, ``tokens`` and ``seconds`` count the whole run, resumed parts included. ``metrics``
    are of the last validation, or of the last step without validation items. ``dropped`` counts
    what was left out or cut, by reason; ``skipped`` counts steps that were not finite.
    """

    steps: int
    metrics: Mapping[str, float]
    stopped_because: StoppedBecause
    tokens: int
    seconds: float
    best: Best | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    failed_checkpoints: int = 0
    resumed_from: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
