"""A run that lasts so many processor seconds, however many steps they are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from anabranch.training.hooks import Hook
from anabranch.training.result import StepReport
from anabranch.training.trainer import Trainer


class ProcessorBudget(Hook):
    """Ends a trainer's run after ``seconds`` of this process's processor time in steps.

    After each step the run's length is estimated anew from what steps have cost so far, so that a
    cosine schedule reaches its end with the budget. Evaluations cost nothing of it. Other programs
    do not matter, as they would for a clock on the wall; but the number of steps depends on the
    machine, and two runs of one seed differ.

    It adds itself to the trainer's hooks, and a checkpoint holds what is spent.
    """

    def __init__(self, trainer: Trainer[Any], seconds: float) -> None:
        self.seconds = seconds
        self.spent = 0.0
        self._trainer = trainer
        self._began = 0.0
        trainer.hooks.append(self)

    def before_step(self, trainer: Trainer[Any]) -> None:
        """Look at the clock."""
        self._began = time.process_time()

    def after_step(self, trainer: Trainer[Any], report: StepReport) -> None:
        """Book the step and estimate how many there will be."""
        self.spent += time.process_time() - self._began
        self._plan(report.step)

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent, and in how many steps."""
        return {"spent": self.spent, "steps": self._trainer.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with what is left; nothing is left of a run that ended."""
        self.spent = state["spent"]
        self._plan(state["steps"])

    def _plan(self, steps: int) -> None:
        left = steps * (self.seconds - self.spent) / self.spent
        self._trainer.total_steps = steps + (max(1, round(left)) if left > 0 else 0)
