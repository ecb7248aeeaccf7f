"""SmartSpec: how many tokens to draft, so that the most tokens a second come out.

Source: Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models Using
Goodput", sections 4, 5.

Before each step the goodput of every length k is predicted - the tokens that will be emitted over
the seconds that drafting and verifying them takes - and the best length is used, 0 included.

    G(k) = sum over sequences of l(alpha, k) / T(k),    l(alpha, k) = 1 + alpha + ... + alpha^k

What the paper leaves open, and must not go wrong:

- Not to draft teaches nothing about drafts. Now and then some sequences draft one token (a
  *probe*), as many as a hundredth of the time pays for, so that speculation is found again.
- Predictions may be wrong in a way that refitting does not cure, for example because drafting
  costs something that nobody counts. Steps with and without drafts are held against their own
  measured seconds, and a step without is put in now and then (an *anchor*).

Known limits: acceptance is taken to be equally likely at every depth, and drafts of one class to
be alike, unless requests are told apart (:class:`RequestClass`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.planning import CostModel
from anabranch.serving.speculation.acceptance import AcceptanceEstimator
from anabranch.serving.speculation.controller import DraftCost, Load, SpeculationController
from anabranch.serving.speculation.step_cost import Step, StepCost

MEMORY_MARGIN = 1.1
"""Tokens for which the cache must have room, over those that there would be: speculation preempts
nobody."""
MEASURED_MARGIN = 1 / 3
"""Part of the margin that remains once steps with and without drafts were measured: it stands for
what may be wrong with predictions, and costs that much of a gain that is real."""
PROBE_SHARE = 0.01
"""Of the time without drafts that probes may take."""
MOST_SAVED = 4.0
"""Seconds of steps that are saved up for probes at most, in steps."""
FIRST_ANCHOR, LAST_ANCHOR = 8, 64
"""Steps with drafts before one without: few at first, then twice as many each time."""
MATCH_MEMORY = 0.85
"""Weight of the past in the share of sequences for which a lookup finds something."""


class GoodputController(SpeculationController):
    """Drafts as many tokens as promise the highest goodput under the present load.

    ``cost_model`` is the engine's own; ``draft_cost`` None means lookups, which cost nothing.
    Speculation must promise ``margin`` times the goodput of none, and less once it was measured.
    ``forgetting`` and ``prior`` are those of :class:`AcceptanceEstimator`. After ``probe_every``
    steps without drafts one is probed.
    With ``per_request`` each sequence gets its own length in every step, else all get the same,
    which is kept for ``update_interval`` steps.
    """

    name = "goodput"

    def __init__(
        self,
        cost_model: CostModel,
        draft_cost: DraftCost | None = None,
        k_max: int = 8,
        margin: float = 1.1,
        forgetting: float = 0.99,
        prior: tuple[float, float] = (14.0, 20.0),
        probe_every: int = 32,
        per_request: bool = False,
        update_interval: int = 1,
    ) -> None:
        if k_max < 0:
            raise ConfigurationError(f"k_max is {k_max}; 0 is the least")
        if not margin >= 1:
            raise ConfigurationError(f"margin must be at least 1, not {margin}")
        if probe_every < 1 or update_interval < 1:
            raise ConfigurationError(
                f"probe_every and update_interval must be at least 1 step, not {probe_every} and "
                f"{update_interval}"
            )
        self.longest = k_max
        self.acceptance = AcceptanceEstimator(forgetting, prior)
        self.step_cost = StepCost(cost_model)
        self.match_ratio = 0.5
        """Share of sequences for which a lookup finds something, of late."""
        self._margin = margin
        self._probe_every = probe_every
        self._per_request = per_request
        self._update_interval = update_interval
        self._draft_cost = draft_cost
        self._common, self._steps_left = 0, 0
        self._plain_steps = self._drafting_steps = 0
        self._anchor_after = FIRST_ANCHOR
        self._saved = 0.0
        self._turn = 0

    @classmethod
    def of(
        cls, cost_model: CostModel, draft_cost: DraftCost | None, k_max: int
    ) -> GoodputController:
        """Each request gets its own length where drafts cost nothing."""
        return cls(cost_model, draft_cost, k_max, per_request=draft_cost is None)

    def lengths(
        self, classes: Sequence[Hashable], load: Load, available: Sequence[int] | None = None
    ) -> list[int]:
        """The lengths of the highest goodput, or those of a probe or an anchor."""
        if not classes:
            return []
        self.acceptance.next_step()
        batch = self._batch(classes, load, available)
        if available is not None:
            found = np.count_nonzero(batch.limits) / batch.size
            self.match_ratio += (1 - MATCH_MEMORY) * (found - self.match_ratio)

        chosen = self._best(batch)
        if not chosen.any():
            chosen = self._probe(batch)
        elif self._anchor_due():
            chosen = np.zeros_like(chosen)

        if chosen.any():
            self._plain_steps, self._drafting_steps = 0, self._drafting_steps + 1
        else:
            self._plain_steps, self._drafting_steps = self._plain_steps + 1, 0
        self.step_cost.decided(self._step(batch, chosen))
        return chosen.tolist()

    def worth_proposing(self, classes: Sequence[Hashable], load: Load) -> bool:
        """Whether drafts would be used if as many sequences as usual had any."""
        if not classes or not self.longest:
            return False
        if self._plain_steps + 1 >= self._probe_every:
            return True  # for a probe, which also shows how many sequences have drafts now
        batch = self._batch(classes, load, None)
        drafted = self.match_ratio * batch.drafted_by_length()
        gained = self.match_ratio * (batch.tokens_by_length() - batch.size)
        seconds = self.step_cost.predict(batch.size, batch.context, drafted)
        return bool(self._argmax(batch, batch.size + gained, drafted, seconds) > 0)

    def observe(self, of: Hashable, accepted: int, rejected: bool) -> None:
        """Count what was judged of one sequence."""
        self.acceptance.observe(of, accepted, rejected)

    def record(self, seconds: float) -> None:
        """Hold the step against what was predicted."""
        self.step_cost.observe(seconds)

    def release(self, request: Hashable) -> None:
        """Forget a request's own counts."""
        self.acceptance.release(request)

    def nodes(self, values: Sequence[Sequence[float]], load: Load) -> list[list[int]]:
        """Which nodes of each sequence's tree to verify, in ascending order.

        ``values`` are the chances that each node is accepted: the product of the drafter's
        confidences along its path. No child is worth more than its parent, so that the best nodes
        of all trees together are trees again.
        """
        sizes = np.array([len(tree) for tree in values], dtype=int)
        if not sizes.any():
            return [[] for _ in values]
        worth = np.clip(np.concatenate([np.asarray(tree, float) for tree in values]), 0.0, 1.0)
        order = np.argsort(-worth, kind="stable")
        batch = _Batch(load, sizes, np.empty((len(values), 0)))
        count = self._best_prefix(batch, worth[order], np.zeros(len(order) + 1))
        kept = np.zeros(len(order), dtype=bool)
        kept[order[:count]] = True
        trees = np.split(kept, np.cumsum(sizes)[:-1])
        return [np.flatnonzero(tree).tolist() for tree in trees]

    def _batch(
        self, classes: Sequence[Hashable], load: Load, available: Sequence[int] | None
    ) -> _Batch:
        limits = np.full(len(classes), self.longest)
        if available is not None:
            limits = np.minimum(limits, available)
        alphas = self.acceptance.alphas(classes)
        return _Batch(load, limits, alphas[:, None] ** np.arange(self.longest + 1))

    def _best(self, batch: _Batch) -> np.ndarray:
        """Lengths ``[sequences]`` of the highest goodput; all 0 if that is not worth it."""
        if not self.longest:
            return np.zeros(batch.size, dtype=int)
        if self._per_request:
            return self._best_each(batch)
        if not self._steps_left:
            self._common = self._best_common(batch)
            self._steps_left = self._update_interval
        self._steps_left -= 1
        chosen = np.minimum(self._common, batch.limits)
        return chosen if batch.fits(chosen.sum()) else np.zeros_like(chosen)

    def _best_common(self, batch: _Batch) -> int:
        drafted = batch.drafted_by_length()
        drafting = [self._drafting(batch, batch.size, k) for k in range(self.longest + 1)]
        seconds = self.step_cost.predict(batch.size, batch.context, drafted, drafting)
        return self._argmax(batch, batch.tokens_by_length(), drafted, seconds)

    def _best_each(self, batch: _Batch) -> np.ndarray:
        """The most promising tokens of all sequences, one by one, for as long as goodput grows."""
        owner, depth = np.nonzero(np.arange(self.longest) < batch.limits[:, None])
        gains = batch.powers[owner, depth + 1]
        order = np.lexsort((depth, -gains))  # a sequence's first tokens before its later ones
        drafting = self._drafting_prefixes(batch, depth[order])
        count = self._best_prefix(batch, gains[order], drafting)
        return np.bincount(owner[order[:count]], minlength=batch.size)

    def _best_prefix(self, batch: _Batch, gains: np.ndarray, drafting: np.ndarray) -> int:
        """How many of the tokens with these gains to draft; ``drafting [tokens + 1]`` seconds."""
        drafted = np.arange(len(gains) + 1)
        tokens = batch.size + np.concatenate(([0.0], np.cumsum(gains)))
        seconds = self.step_cost.predict(batch.size, batch.context, drafted, drafting)
        return self._argmax(batch, tokens, drafted, seconds)

    def _argmax(
        self, batch: _Batch, tokens: np.ndarray, drafted: np.ndarray, seconds: np.ndarray
    ) -> int:
        """The choice with the highest goodput; the first, which drafts nothing, has the margin."""
        goodput = np.where(batch.fits(drafted), tokens / seconds, 0.0)
        doubt = 1 - (1 - MEASURED_MARGIN) * self.step_cost.certainty
        goodput[0] = (1 + (self._margin - 1) * doubt) * tokens[0] / seconds[0]
        return int(goodput.argmax())

    def _drafting(self, batch: _Batch, sequences: int, k: int) -> float:
        """Seconds of drafting k tokens for some of the sequences."""
        if self._draft_cost is None or not k or not sequences:
            return 0.0
        return self._draft_cost(sequences, batch.context * sequences // batch.size, k)

    def _drafting_prefixes(self, batch: _Batch, depth: np.ndarray) -> np.ndarray:
        """Seconds of drafting the first n of tokens at these depths, ``[tokens + 1]``.

        What a depth takes lies on a line between one sequence and all.
        """
        total = np.zeros(len(depth) + 1)
        if self._draft_cost is None:
            return total
        one, every = (
            np.diff([self._drafting(batch, size, k) for k in range(self.longest + 1)])
            for size in (1, batch.size)
        )
        slope = (every - one) / max(1, batch.size - 1)
        for k in range(self.longest):
            sequences = np.concatenate(([0], np.cumsum(depth == k)))
            total += np.where(sequences > 0, one[k] + slope[k] * (sequences - 1), 0.0)
        return total

    def _anchor_due(self) -> bool:
        if self.step_cost.needs_plain:
            return True
        if not self.step_cost.measured or self._drafting_steps < self._anchor_after:
            return False
        self._anchor_after = min(2 * self._anchor_after, LAST_ANCHOR)
        return True

    def _probe(self, batch: _Batch) -> np.ndarray:
        """One token for as many sequences as the time saved up pays for, each in its turn."""
        chosen = np.zeros(batch.size, dtype=int)
        plain = self._seconds(batch, chosen)
        self._saved = min(self._saved + PROBE_SHARE * plain, MOST_SAVED * plain)
        able = np.flatnonzero(batch.limits > 0)
        if self._plain_steps + 1 < self._probe_every or not len(able):
            return chosen
        able = np.roll(able, -self._turn)
        for count in (len(able), max(1, len(able) // 8), 1):
            probing = chosen.copy()
            probing[able[:count]] = 1
            price = self._seconds(batch, probing) - plain
            if price <= self._saved and batch.fits(count):
                self._saved -= price
                self._turn += count
                return probing
        return chosen

    def _seconds(self, batch: _Batch, chosen: np.ndarray) -> float:
        step = self._step(batch, chosen)
        drafted = np.array([step.drafted])
        return float(self.step_cost.predict(step.tokens, step.context, drafted, step.drafting)[0])

    def _step(self, batch: _Batch, chosen: np.ndarray) -> Step:
        drafting = self._drafting(batch, int(np.count_nonzero(chosen)), int(chosen.max()))
        tokens = batch.load.prefill_tokens + batch.size
        return Step(tokens, batch.context, int(chosen.sum()), drafting)


@dataclass(frozen=True)
class _Batch:
    """The sequences of one step as arrays."""

    load: Load
    limits: np.ndarray
    """[sequences] most tokens to draft for each"""
    powers: np.ndarray
    """[sequences, k_max + 1] chance that a draft's first j tokens are all accepted"""

    def __post_init__(self) -> None:
        if len(self.load.contexts) != len(self.limits):
            raise ValueError(
                f"{len(self.load.contexts)} contexts do not belong to {len(self.limits)} sequences"
            )

    @property
    def size(self) -> int:
        return len(self.limits)

    @cached_property
    def context(self) -> int:
        return sum(self.load.contexts)

    def tokens_by_length(self) -> np.ndarray:
        """[k_max + 1] expected tokens if every sequence drafts k, or as many as it can."""
        reached = np.arange(self.powers.shape[1]) <= self.limits[:, None]
        return (self.powers * reached).sum(0).cumsum()

    def drafted_by_length(self) -> np.ndarray:
        """[k_max + 1] drafted tokens then."""
        lengths = np.arange(self.powers.shape[1])
        return np.minimum(self.limits[:, None], lengths).sum(0)

    def fits(self, drafted: np.ndarray | int) -> np.ndarray:
        """Whether the cache has room for so many drafted tokens, and some to spare."""
        if self.load.free_slots is None:
            return np.full(np.shape(drafted), True)
        slots = self.context + self.load.free_slots
        return (self.context + self.size + np.asarray(drafted)) * MEMORY_MARGIN <= slots
