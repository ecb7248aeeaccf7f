"""What a run remembers of its validations: the last metrics, the best, and when to give up."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anabranch.training.errors import TrainingError
from anabranch.training.options import EarlyStopping
from anabranch.training.result import Best

logger = logging.getLogger(__name__)


class Tracker:
    """Follows one validation metric, if early stopping was asked for."""

    def __init__(self, options: EarlyStopping | None) -> None:
        self.metrics: dict[str, float] = {}
        self.best: Best | None = None
        self.best_weights: dict[str, Tensor] = {}
        self._options = options
        self._stale = 0

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._options is not None and self._stale >= self._options.patience

    def record(
        self, step: int, metrics: Mapping[str, float], weights: Mapping[str, Tensor]
    ) -> None:
        """Take in a validation after ``step``; copies ``weights`` if it is the best so far."""
        self.metrics = dict(metrics)
        if self._options is None:
            return
        name = self._options.metric
        if name not in metrics:
            raise TrainingError(
                f"early_stopping.metric is {name!r}, but validation gives: "
                f"{', '.join(sorted(metrics))}"
            )
        value = metrics[name]
        if not math.isfinite(value):
            logger.warning("validation %s is %s after step %d", name, value, step)
        if self._improves(value):
            self._stale = 0
            self.best = Best(name, value, step)
            if self._options.restore_best:
                self.best_weights = {k: w.detach().clone() for k, w in weights.items()}
        else:
            self._stale += 1

    def _improves(self, value: float) -> bool:
        assert self._options is not None
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best.value
        return (gain if self._options.higher_is_better else -gain) > self._options.min_delta

    def state_dict(self) -> dict[str, Any]:
        """Everything, JSON values and the best weights."""
        best = self.best and {"value": self.best.value, "step": self.best.step}
        return {
            "metrics": self.metrics,
            "best": best,
            "weights": self.best_weights,
            "stale": self._stale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.metrics = dict(state["metrics"])
        self._stale = state["stale"]
        self.best_weights = dict(state["weights"])
        self.best = None
        if state["best"] and self._options:
            self.best = Best(self._options.metric, **state["best"])
