"""Where a step's tokens come from.

A step is filled by asking sources, in an order that the policy decides, how many of the budget's
tokens they can use. Sources only ask for segments; they never run anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque

from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.sequence import Segment, Sequence


class Queues:
    """Sequences in arrival order: waiting ones own no pages, running ones do."""

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # ordered by admission


class TokenSource(ABC):
    """Something that wants tokens computed."""

    @abstractmethod
    def demand(self, budget: int) -> list[Segment]:
        """Segments for the coming step, ``budget`` tokens at most. May reserve cache pages."""


class DecodeSource(TokenSource):
    """One token for every running sequence whose prompt is computed, and its draft."""

    def __init__(self, queues: Queues, cache: KVCacheManager) -> None:
        self._queues = queues
        self._cache = cache

    def demand(self, budget: int) -> list[Segment]:
        """Least recently served first, so that a small budget starves nobody.

        Drafts get what is left of the budget. A sequence that needs a page when none is free sits
        this step out.
        """
        ready = [sequence for sequence in self._queues.running if sequence.num_pending == 1]
        if len(ready) > budget:
            ready.sort(key=lambda sequence: sequence.last_turn)
        segments: list[Segment] = []
        room = max(0, budget - len(ready))
        for sequence in ready:
            if len(segments) == budget:
                break
            length = len(sequence.tokens)
            draft = sequence.draft.first(room) if sequence.draft else None
            if draft and not self._cache.extend(sequence, length + len(draft)):
                draft = None
            if self._cache.extend(sequence, length):
                segments.append(Segment(sequence, sequence.num_computed, length, draft))
                room -= len(draft) if draft else 0
        return segments


class PrefillSource(TokenSource):
    """Prompts in order of arrival, admitting new ones while pages and places last."""

    def __init__(self, queues: Queues, cache: KVCacheManager, whole: bool = False) -> None:
        self._queues = queues
        self._cache = cache
        self._whole = whole

    def demand(self, budget: int) -> list[Segment]:
        """Pieces of prompts that fill the budget exactly, or whole prompts.

        Whole prompts are never cut: at least one is taken even if it alone exceeds the budget.
        """
        segments: list[Segment] = []
        begun = [sequence for sequence in self._queues.running if sequence.num_pending > 1]
        while budget > 0:
            sequence = begun.pop(0) if begun else self._admit_next()
            if sequence is None:
                break
            pending = sequence.num_pending
            if self._whole:
                if segments and pending > budget:
                    break
                take = pending
            else:
                alone = not segments and not begun and not self._queues.waiting
                take = even_chunk(pending, budget) if alone else min(pending, budget)
            if not self._cache.extend(sequence, sequence.num_computed + take):
                continue  # a companion that has fallen behind owns pages for its past only
            segments.append(Segment(sequence, sequence.num_computed, sequence.num_computed + take))
            budget -= take
        return segments

    def _admit_next(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if it fits entirely."""
        queues = self._queues
        if not queues.waiting or len(queues.running) >= queues.max_sequences:
            return None
        sequence = queues.waiting[0]
        if not self._cache.admit(sequence):
            return None  # nobody overtakes: first come, first served
        queues.waiting.popleft()
        queues.running[sequence] = None
        return sequence


def even_chunk(pending: int, budget: int) -> int:
    """First of ``ceil(pending / budget)`` chunks of nearly equal size.

    Throughput is concave in the tokens per pass, so equal passes are the fastest split when no
    other prompt can fill the last one (DeepSpeed-FastGen, the insights behind Dynamic SplitFuse).
    """
    chunks = -(-pending // budget)
    return -(-pending // chunks)
