"""Runs the real engine on predicted time, without a model.

Scheduler, cache and policies are the ones that serve; only the forward pass is replaced by the
time that a cost model predicts for it. Minutes of traffic take milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from anabranch.planning import CostModel
from anabranch.serving.adapters import AdapterCheckpoint
from anabranch.serving.batch import PageCopy, StepPlan, StepResult


class Clock(Protocol):
    """Seconds since some start, and a way to let them pass."""

    def __call__(self) -> float:
        """The time now."""

    def wait_until(self, moment: float) -> None:
        """Return when the clock shows at least ``moment``."""


class WallClock:
    """Real time."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start

    def wait_until(self, moment: float) -> None:
        """Sleep."""
        time.sleep(max(0.0, moment - self()))


class VirtualClock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds that were let pass."""
        return self._now

    def wait_until(self, moment: float) -> None:
        """Jump there."""
        self._now = max(self._now, moment)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class SimulatedRunner:
    """Takes the time that a cost model predicts and computes nothing: every token is 0."""

    vocabulary = 2
    page_size = 32
    page_bytes = 1

    def __init__(self, cost: CostModel, clock: VirtualClock, context_length: int = 8192) -> None:
        self.context_length = context_length
        self._cost = cost
        self._clock = clock

    def allocate(self, num_pages: int) -> None:
        """Nothing to allocate."""

    def add_adapter(self, checkpoint: AdapterCheckpoint) -> tuple[None, int]:
        """Nothing to load."""
        return None, 0

    def remove_adapter(self, handle: None) -> None:
        """Nothing to drop."""

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Nothing to copy."""

    def move_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Nothing to move."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Advance the clock."""
        self._clock.advance(self._cost.predict(plan.num_tokens, plan.num_context))
        rows = sum(segment.num_logits for segment in plan.segments)
        logits = torch.zeros(rows, self.vocabulary)
        pooling = [i for i, s in enumerate(plan.segments) if s.sequence.request.pooling]
        return StepResult(logits, {index: torch.zeros(1) for index in pooling})

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Nothing to clear."""
