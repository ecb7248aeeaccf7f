"""What a step with drafts takes, from the engine's cost model and from steps with and without."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from anabranch.planning import CostModel

logger = logging.getLogger(__name__)

ROOFLINE = CostModel(fixed=0.03, per_token=0.001, per_context=1e-5)
"""Seconds of a step before any was seen: 30 tokens cost as much as reading the weights, which is
what 135M parameters on two cores take. Its proportions decide, not its level."""
VARIETY = 3
"""Steps must differ that much in tokens before a fit can tell their cost from the fixed one."""
WINDOW = 16
"""Steps of either kind that are compared."""
FEW = 4
"""With fewer steps of a kind, what they say counts in part."""
MOST_CHEAP, MOST_DEAR = 0.5, 32.0
"""How far off predictions of drafts may be. To find them dear by mistake loses a gain, to find them
cheap loses what there was without."""


class Step(NamedTuple):
    """What a step computes."""

    tokens: int
    """Without drafts."""
    context: int
    """Without drafts."""
    drafted: int
    drafting: float
    """Predicted seconds of drafting."""


class StepCost:
    """Predicts seconds of steps with any number of drafted tokens.

    The cost model fits all steps together. Should drafting cost something that it does not see, it
    would find steps with drafts too cheap for ever. So their measured seconds are held against
    those of steps without: :attr:`factor` is what drafts took over what was predicted for them.
    """

    def __init__(self, cost_model: CostModel) -> None:
        self._model = cost_model
        self._plain: deque[tuple[Step, float]] = deque(maxlen=WINDOW)
        self._drafting: deque[tuple[Step, float]] = deque(maxlen=WINDOW)
        self._last: Step | None = None
        self._fit: tuple[float, float, float] | None = None
        self._informed = False
        self._factor: float | None = 1.0

    @property
    def needs_plain(self) -> bool:
        """Whether there are too few measured steps without drafts to hold others against."""
        return bool(self._plain or self._drafting) and len(self._plain) < FEW

    @property
    def measured(self) -> bool:
        """Whether anybody ever said how long a step took."""
        return bool(self._plain or self._drafting)

    @property
    def certainty(self) -> float:
        """0 if nothing was measured, 1 if enough steps of both kinds were."""
        return min(len(self._plain), len(self._drafting)) / WINDOW

    def predict(
        self, tokens: int, context: int, drafted: np.ndarray, drafting: ArrayLike = 0.0
    ) -> np.ndarray:
        """Seconds of steps with ``drafted`` more tokens and ``drafting`` seconds to draft them.

        ``tokens`` and ``context`` are those of the step without drafts.
        """
        plain, drafts = _parts(self._current(), tokens, context, drafted, np.asarray(drafting))
        return plain + drafts * self.factor

    def decided(self, step: Step) -> None:
        """The step that comes next."""
        self._last = step

    def observe(self, seconds: float) -> None:
        """How long it took. A clock that did not move teaches nothing."""
        if self._last is None or seconds <= 0:
            return
        kind = self._drafting if self._last.drafted else self._plain
        kind.append((self._last, seconds))
        self._last = None
        self._factor = None

    @property
    def factor(self) -> float:
        """Measured over predicted seconds of drafting and verifying; 1 before any was measured."""
        model = self._current()
        if self._factor is None:
            self._factor = self._compare(model)
        return self._factor

    def _compare(self, model: CostModel) -> float:
        few = min(len(self._plain), len(self._drafting), FEW)
        if not few:
            return 1.0
        plain, _, seconds = _arrays(model, self._plain)
        level = np.median(seconds / plain)  # a stalled step does not move it
        plain, drafts, seconds = _arrays(model, self._drafting)
        excess = seconds / level - plain - drafts
        cut = len(excess) // 8
        usual = np.argsort(excess)[cut : len(excess) - cut]
        predicted = drafts[usual].sum()
        if not predicted > 0:
            return 1.0  # one more token costs nothing that could be measured
        factor = 1.0 + (few / FEW) * excess[usual].sum() / predicted
        return float(np.clip(factor, MOST_CHEAP, MOST_DEAR))

    def _current(self) -> CostModel:
        """The engine's model once it can say what one more token costs; else :data:`ROOFLINE`."""
        model = self._model
        fit = model.fixed, model.per_token, model.per_context
        if fit != self._fit:
            self._fit = fit
            self._factor = None
            steps = [tokens for tokens, _, _ in model.observations]
            varied = not steps or max(steps) >= VARIETY * min(steps)
            if self._informed and not varied:
                return model
            self._informed = model.fitted and varied
            if not self._informed and not model.fitted:
                logger.info("no step was measured yet: lengths of drafts are decided on a roofline")
        return model if self._informed else ROOFLINE


def _arrays(
    model: CostModel, steps: Iterable[tuple[Step, float]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted seconds without drafts, of drafts, and measured seconds; each ``[steps]``."""
    made, seconds = zip(*steps, strict=True)
    tokens, context, drafted, drafting = np.array(made, dtype=float).T
    return *_parts(model, tokens, context, drafted, drafting), np.array(seconds)


def _parts(
    model: CostModel, tokens: Any, context: Any, drafted: np.ndarray, drafting: np.ndarray
) -> tuple[Any, np.ndarray]:
    """Predicted seconds of steps without drafts, and what drafts add to them."""
    plain = model.predict(tokens, context)
    return plain, model.predict(tokens + drafted, context + drafted) - plain + drafting
