"""Task weights: fixed ones, and ones that follow how fast each task's validation loss falls.

Convergence balance is MFTCoder's (KDD 2024, section 3.3) and its successor CoBa's (EMNLP 2024). A
balancer is pure arithmetic over the losses that it is told. What it does not know: who evaluates
them (:mod:`anabranch.training.losses.balance_hook`), and how a loss uses the weights
(:mod:`anabranch.training.losses.multitask`).
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.training.errors import CheckpointError, DataError, Diverged

log = logging.getLogger("anabranch.training")

PATIENCE = 3
"""Validation losses of a task that may be not finite in a row before the run stops."""

Point = tuple[int, float]
"""Optimiser steps done, and a loss or a slope measured then."""


class Balancer(ABC):
    """Weights of the tasks of a multi-task loss, at least 0 and 1 in sum.

    ``sizes``: task -> examples in the training data, in any order.
    """

    name: ClassVar[str]
    observes: ClassVar[bool] = False
    """Whether the weights depend on validation losses."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        if not sizes:
            raise ConfigurationError("a balancer needs the names of the tasks; none were given")
        self.tasks = tuple(sizes)

    @abstractmethod
    def weights(self, step: int) -> dict[str, float]:
        """The weights for the optimiser step after ``step`` done ones."""

    def observe(self, step: int, losses: Mapping[str, float]) -> None:
        """Learn the validation losses after ``step`` optimiser steps; absent tasks are left out."""

    def state_dict(self) -> dict[str, Any]:
        """State to checkpoint, JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""

    def uniform(self) -> dict[str, float]:
        """The same weight for every task."""
        return dict.fromkeys(self.tasks, 1 / len(self.tasks))


class Uniform(Balancer):
    """The same weight for every task."""

    name = "uniform"

    def weights(self, step: int) -> dict[str, float]:
        """1 / n each."""
        return self.uniform()


class Static(Balancer):
    """Weights that are given, brought to the sum 1."""

    name = "static"

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float]) -> None:
        super().__init__(sizes)
        if set(weights) != set(sizes):
            raise ConfigurationError(
                f"weights are given for the tasks {_names(weights)}; the data has {_names(sizes)}"
            )
        if min(weights.values()) < 0 or not 0 < sum(weights.values()) < math.inf:
            raise ConfigurationError(
                f"weights of tasks are numbers from 0 on, at least one above 0, not {dict(weights)}"
            )
        self._weights = _normalised(weights)

    def weights(self, step: int) -> dict[str, float]:
        """Always the same."""
        return dict(self._weights)


class SizeInverse(Balancer):
    """Weights proportional to ``1 / size**power``: small tasks count more."""

    name = "size-inverse"

    def __init__(self, sizes: Mapping[str, int], power: float = 1.0) -> None:
        super().__init__(sizes)
        if empty := [task for task, size in sizes.items() if size < 1]:
            raise DataError(f"task {empty[0]!r} has no training examples to weigh")
        self._weights = _normalised({task: size**-power for task, size in sizes.items()})

    def weights(self, step: int) -> dict[str, float]:
        """Always the same."""
        return dict(self._weights)


class _Following(Balancer):
    """Keeps the last ``window`` validation losses of each task, and their least-squares slopes."""

    observes = True

    def __init__(self, sizes: Mapping[str, int], window: int) -> None:
        super().__init__(sizes)
        if window < 2:
            raise ConfigurationError(f"a slope needs a window of at least 2 losses, not {window}")
        self._window = window
        self._history = {task: deque[Point](maxlen=window) for task in self.tasks}
        self._not_finite = dict.fromkeys(self.tasks, 0)

    def observe(self, step: int, losses: Mapping[str, float]) -> None:
        """Append the losses. One that is not finite is skipped with a warning.

        Raises :class:`Diverged` when it is a task's third in a row, and :class:`DataError` for a
        task that was not announced.
        """
        for task, loss in losses.items():
            if task not in self._history:
                raise DataError(f"no task named {task!r}; the balancer has {_names(self.tasks)}")
            if math.isfinite(loss):
                self._not_finite[task] = 0
                self._history[task].append((step, loss))
                continue
            self._not_finite[task] += 1
            if self._not_finite[task] >= PATIENCE:
                raise Diverged(
                    f"the validation loss of task {task!r} was {loss} {PATIENCE} times in a row, "
                    f"last after step {step}; lower the learning rate, or look at its rows"
                )
            log.warning("step %d: validation loss of task %r is %s; skipped", step, task, loss)

    def slopes(self) -> np.ndarray:
        """Loss per step of each task, [tasks]; below zero is improving."""
        return np.array([slope(self._history[task]) for task in self.tasks])

    def state_dict(self) -> dict[str, Any]:
        """The histories."""
        return {
            "history": {task: list(points) for task, points in self._history.items()},
            "not_finite": dict(self._not_finite),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the histories; :class:`CheckpointError` if they are of other tasks."""
        if set(state["history"]) != set(self.tasks):
            raise CheckpointError(
                f"the checkpoint balances the tasks {_names(state['history'])}, "
                f"this run {_names(self.tasks)}"
            )
        for task in self.tasks:
            self._history[task] = _points(state["history"][task], self._window)
            self._not_finite[task] = int(state["not_finite"][task])


class SelfPaced(_Following):
    """Fast-falling tasks first: weights from the slopes of the validation losses.

    Relative slopes ``s = n a / sum|a|``; ``w = softmax(sharpness * softmax(s) * -s)``. MFTCoder,
    version 0.3, after FAMO (Liu et al., 2023).
    """

    name = "selfpaced"

    def __init__(
        self, sizes: Mapping[str, int], window: int = 100, sharpness: float = 50.0
    ) -> None:
        super().__init__(sizes, window)
        self._sharpness = sharpness

    def weights(self, step: int) -> dict[str, float]:
        """Uniform as long as nothing moves."""
        relative = relative_slopes(self.slopes())
        chosen = softmax(self._sharpness * softmax(relative) * -relative)
        return dict(zip(self.tasks, chosen.tolist(), strict=True))


class CoBa(_Following):
    """Converge together: slow tasks count more, as long as all converge; diverging ones less.

    Losses are divided by each task's loss before training. Uniform during ``warmup`` steps, then
    :func:`coba_weights`. CoBa (Gong et al., EMNLP 2024), equations 3 to 7, with the floor of the
    reference implementation.
    """

    name = "coba"

    def __init__(
        self,
        sizes: Mapping[str, int],
        warmup: int = 100,
        window: int = 200,
        temperature: float = 5.0,
    ) -> None:
        super().__init__(sizes, window)
        self._warmup = warmup
        self._temperature = temperature
        self._initial: dict[str, float] = {}
        self._worst = deque[Point](maxlen=window)
        self._slopes = deque[list[float]](maxlen=window)
        self._worst_slopes = deque[float](maxlen=window)

    def observe(self, step: int, losses: Mapping[str, float]) -> None:
        """Append the losses over those of step 0, where every task must have one above 0."""
        if not self._initial:
            self._begin(step, losses)
        relative = {t: x / self._initial.get(t, 1.0) for t, x in losses.items()}
        super().observe(step, relative)
        # A task that this observation left out counts with its last known loss.
        self._worst.append((step, max(points[-1][1] for points in self._history.values())))
        self._slopes.append(self.slopes().tolist())
        self._worst_slopes.append(slope(self._worst))

    def weights(self, step: int) -> dict[str, float]:
        """Uniform during the warm-up."""
        if step < self._warmup or not self._slopes:
            return self.uniform()
        divergence = divergence_factor(np.array(self._worst_slopes), self._temperature)
        chosen = coba_weights(np.array(self._slopes), divergence)
        return dict(zip(self.tasks, chosen.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The histories of losses and slopes."""
        return super().state_dict() | {
            "tasks": list(self.tasks),
            "initial": dict(self._initial),
            "worst": list(self._worst),
            "slopes": list(self._slopes),
            "worst_slopes": list(self._worst_slopes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the histories, whatever the order of the tasks was."""
        super().load_state_dict(state)
        order = [list(state["tasks"]).index(task) for task in self.tasks]
        self._initial = {task: float(loss) for task, loss in state["initial"].items()}
        self._worst = _points(state["worst"], self._window)
        self._slopes = deque(([row[i] for i in order] for row in state["slopes"]), self._window)
        self._worst_slopes = deque(map(float, state["worst_slopes"]), self._window)

    def _begin(self, step: int, losses: Mapping[str, float]) -> None:
        lacking = [t for t in self.tasks if not 0 < losses.get(t, math.nan) < math.inf]
        if step != 0 or lacking:
            raise DataError(
                f"coba compares with the validation losses before training (step 0), which must "
                f"be above 0; at step {step} they are missing or not for: {_names(lacking)}"
            )
        self._initial = dict(losses)


def slope(points: Iterable[Point]) -> float:
    """Least-squares slope of losses against their steps; 0 with fewer than two points."""
    found = np.array(list(points), dtype=np.float64).reshape(-1, 2)
    steps = found[:, 0] - found[:, 0].mean() if len(found) else found[:, 0]
    spread = float(steps @ steps)
    return float(steps @ found[:, 1]) / spread if spread else 0.0


def relative_slopes(slopes: np.ndarray) -> np.ndarray:
    """``n a / sum|a|`` along the last axis, zeros where nothing moves; same shape."""
    total = np.abs(slopes).sum(-1, keepdims=True)
    return np.divide(slopes.shape[-1] * slopes, total, out=np.zeros_like(slopes), where=total > 0)


def divergence_factor(worst_slopes: np.ndarray, temperature: float = 5.0) -> float:
    """1 while the worst task's loss falls as it did, towards 0 as it rises; [steps] -> [0, 1]."""
    relative = relative_slopes(worst_slopes)
    return float(min(1.0, len(relative) * softmax(-temperature * relative)[-1]))


def coba_weights(slopes: np.ndarray, divergence: float) -> np.ndarray:
    """Weights from slope histories [steps, tasks], the last row being now; [tasks], sum 1.

    ``divergence`` 1 favours the slow tasks (relative convergence score), 0 the tasks that still
    fall compared with their own past (absolute convergence score). None is below ``1 / 10 n``.
    """
    count = slopes.shape[1]
    relative = softmax(relative_slopes(slopes[-1]))
    absolute = softmax(-relative_slopes(slopes.T)[:, -1])
    chosen = softmax(count * (divergence * relative + (1 - divergence) * absolute))
    floor = 1 / (10 * count)
    return chosen if chosen.min() >= floor else chosen * (1 - count * floor) + floor


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def _points(stored: Iterable[Sequence[float]], window: int) -> deque[Point]:
    return deque(((int(step), float(value)) for step, value in stored), window)


def _names(tasks: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, tasks))) or "none"
