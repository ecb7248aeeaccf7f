"""How much fine-tuning fits into a step: FlexLLM's hybrid token scheduler (section 7).

A step has a time that it may take: the latency target while requests decode. Whatever its inference
tokens leave of it is filled with forward windows, in the same packed batch, and with head windows
and backward units after it, each as long as its fitted cost allows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from anabranch.planning import CostModel
from anabranch.serving.batch import StepPlan
from anabranch.serving.coserving.passes import Pass, Phase

SMALLEST = 8
"""Rows of the smallest window: below it, what a window costs at all outweighs its rows."""
UNKNOWN = 32
"""Rows of a window of which nothing is known yet."""
IDLE_SECONDS = 0.25
"""Enough rows for efficient products, and not much of the time to a first token."""
SLOWDOWN = 0.25
"""How much slower requests may become on average where no target is set."""
SAVED_STEPS = 20
"""Of so many steps at most what was not used is kept."""
ON_TIME = 0.99
"""Of the steps that requests decode in, where a target is set."""
LEAST_PART = 0.2
"""Of what inference leaves of the target: fine-tuning always goes on."""
ADAPTATION = 0.1
"""How far a step that is late moves the allowance, as a part of the target."""


class Allowance:
    """How long a step may take.

    With a ``target`` (seconds), fine-tuning gets a part of what inference leaves of it, small
    enough that :data:`ON_TIME` of the steps are within the target: predictions are right on
    average, so that half of the steps take longer than predicted. The part follows the steps that
    ran as a running quantile does (Robbins and Monro 1951): it grows a little with each that was on
    time and shrinks a lot with each that fine-tuning made late.

    Without a target, requests may become slower by a quarter on average: what a step does not use
    is saved up for a few more, so that a unit that is longer than a quarter of a short step has its
    turn, too.

    A step without inference may take :data:`IDLE_SECONDS`, which is what a request that arrives
    meanwhile waits.
    """

    def __init__(self, target: float | None) -> None:
        self._target = target
        self._part = 0.6
        self._saved = 0.0

    def seconds(self, inference: float | None) -> float:
        """For a step whose inference part is predicted to take so long; None for no such part.

        0 is a prediction of somebody who does not know yet.
        """
        if inference is None:
            return max(IDLE_SECONDS, (self._target or 0.0) * self._part)
        if self._target is not None:
            return inference + self._part * max(0.0, self._target - inference)
        return inference + self._saved + SLOWDOWN * inference

    def most(self, inference: float | None) -> float:
        """For a step in which otherwise nothing would be trained: the target without a margin."""
        return max(self.seconds(inference), self._target or 0.0)

    def used(self, inference: float | None, fine_tuning: float, seconds: float) -> None:
        """What a step spent on each, as measured but for the prediction for inference."""
        if inference is None:
            return
        saved = self._saved + SLOWDOWN * inference - fine_tuning
        self._saved = min(max(0.0, saved), SAVED_STEPS * SLOWDOWN * inference)
        if self._target is None or seconds - fine_tuning > self._target:
            return
        change = 1 - ON_TIME if seconds <= self._target else -ON_TIME
        self._part = min(max(self._part + ADAPTATION * change, LEAST_PART), 1.0)


class ShareModel:
    """Predicts steps and units from those that ran, and finds the largest that fit.

    ``step_cost`` is the engine's own cost model.
    """

    def __init__(self, step_cost: CostModel) -> None:
        self._step_cost = step_cost
        self._units: dict[Phase, CostModel] = {"head": CostModel(), "backward": CostModel()}

    def step_seconds(self, plan: StepPlan | None) -> float | None:
        """Predicted seconds of a step; 0 while nothing is known, None for no plan."""
        return self._step_cost.predict(plan.num_tokens, plan.num_context) if plan else None

    def forward_rows(self, plan: StepPlan | None, seconds: float, work: Pass) -> int:
        """Most tokens of forward windows with which a step still takes at most ``seconds``."""
        if not self._step_cost.fitted:
            return min(UNKNOWN, work.left)
        tokens, context = (plan.num_tokens, plan.num_context) if plan else (0, 0)

        def cost(rows: int) -> float:
            added = sum(segment.stop for segment in work.segments(rows))
            return self._step_cost.predict(tokens + rows, context + added)

        return _largest(cost, work.left, seconds)

    def unit_rows(self, work: Pass, seconds: float, most: float) -> int:
        """Most rows of the next unit that take at most ``seconds``.

        If not even the smallest does, it is taken if it stays below ``most``.
        """
        phase, left = work.phase, work.left
        model = self._units[phase]
        if not model.fitted:
            return min(UNKNOWN, left)

        def cost(rows: int) -> float:
            return model.predict(rows, _context(phase, rows, left))

        smallest = min(SMALLEST, left)
        return _largest(cost, left, seconds) or (smallest if cost(smallest) <= most else 0)

    def observe(self, phase: Phase, rows: int, left: int, seconds: float) -> None:
        """Learn from a unit that ran, with ``left`` rows before it."""
        model = self._units[phase]
        model.observe(rows, _context(phase, rows, left), seconds)
        if not model.fitted:
            model.fit()


def _context(phase: Phase, rows: int, left: int) -> int:
    """Pairs of a row and one that it attends to, the other thing that a backward unit costs."""
    return rows * (2 * left - rows) // 2 if phase == "backward" else 0


def _largest(cost: Callable[[int], float], limit: int, seconds: float) -> int:
    """The most rows, ``limit`` at most, that cost at most ``seconds``; 0 if the smallest do not.

    Costs grow with the rows, so that the answer is found by bisection.
    """
    rows = bisect_right(range(limit + 1), seconds, key=cost) - 1
    return rows if rows >= min(SMALLEST, limit) else 0
