"""Decides what the next step computes.

``schedule`` is one readable decision: the policy fills the token budget from the sources; if
nothing could be scheduled although somebody waits, the last admitted sequence is preempted and
the policy is asked again. A preempted sequence keeps its output, which becomes part of what it
must compute again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from anabranch.errors import ConfigurationError
from anabranch.serving.batch import PageCopy, StepPlan
from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.policies import Policy
from anabranch.serving.sequence import Segment, Sequence
from anabranch.serving.sources import DecodeSource, PrefillSource, Queues


class TokenBudgetScheduler:
    """Fills steps of ``token_budget`` tokens from up to ``max_sequences`` running sequences."""

    def __init__(
        self, cache: KVCacheManager, policy: Policy, token_budget: int, max_sequences: int
    ) -> None:
        if token_budget < 1:
            raise ConfigurationError(f"token_budget must be at least 1, not {token_budget}")
        if max_sequences < 1:
            raise ConfigurationError(f"max_sequences must be at least 1, not {max_sequences}")
        self.cache = cache
        self.policy = policy
        self.token_budget = token_budget
        self.num_steps = 0
        self.num_preemptions = 0
        self._queues = Queues(max_sequences)
        self._decode = DecodeSource(self._queues, cache)
        self._prefill = PrefillSource(self._queues, cache, whole=policy.whole_prompts)
        self._copies: list[PageCopy] = []
        self._turns = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Sequences that own no pages yet."""
        return len(self._queues.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that own pages."""
        return len(self._queues.running)

    @property
    def num_context(self) -> int:
        """Tokens of the sequences that own pages."""
        return sum(len(sequence.tokens) for sequence in self._queues.running)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self._queues.running or self._queues.waiting)

    def prompt_tokens(self, limit: int) -> int:
        """Tokens of prompts, ``limit`` at most, that the next step could compute."""
        total = 0
        for sequence in self.sequences():
            if total >= limit:
                break
            if sequence.num_pending > 1:
                total += sequence.num_pending
        return min(total, limit)

    def decoding(self) -> list[Sequence]:
        """Sequences that have begun to answer and own pages."""
        return [s for s in self._queues.running if s.num_pending == 1 and s.num_generated]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others."""
        self._queues.waiting.append(sequence)

    def schedule(self, budget: int | None = None) -> StepPlan | None:
        """The next step of ``budget`` tokens (default: the usual); None if there is none."""
        budget = self.token_budget if budget is None else budget
        segments = self._fill(budget)
        while not segments and self.has_work:
            self._preempt_last()
            segments = self._fill(budget)
        if not segments:
            return None
        for segment in segments:
            segment.sequence.last_turn = next(self._turns)
        self.num_steps += 1
        copies, self._copies = tuple(self._copies), []
        return StepPlan(tuple(segments), self.cache.page_size, copies)

    def computed(self, segment: Segment, accepted: int = 0) -> None:
        """Record that keys and values of a segment, and of accepted drafts, are in the cache."""
        segment.sequence.num_computed = segment.stop + accepted
        self.cache.publish(segment.sequence, computed_before=segment.start)

    def fork(self, parent: Sequence) -> list[Sequence]:
        """Start the parent's siblings from its computed prompt.

        Returns those that now share its pages and can be sampled from the same logits. The
        others, for which there was no page or place, go to the head of the queue and compute
        the prompt themselves.
        """
        ready, late = [], []
        for child in parent.siblings:
            copies = None
            if len(self._queues.running) < self._queues.max_sequences:
                copies = self.cache.fork(parent, child)
            if copies is None:
                late.append(child)
            else:
                self._copies.extend(copies)
                self._queues.running[child] = None
                ready.append(child)
        self._queues.waiting.extendleft(reversed(late))
        parent.siblings = []
        return ready

    def remove(self, sequence: Sequence) -> None:
        """Take out a finished or aborted sequence and release its pages."""
        self._dequeue(sequence)
        self.cache.release(sequence)

    def discard(self, sequence: Sequence) -> list[int]:
        """Like :meth:`remove`, for a sequence with bad values. Returns the pages to clear."""
        self._dequeue(sequence)
        return self.cache.forget(sequence)

    def sequences(self) -> Iterator[Sequence]:
        """All sequences, running ones first."""
        yield from self._queues.running
        yield from self._queues.waiting

    def _fill(self, budget: int) -> list[Segment]:
        return self.policy.fill(budget, self._decode, self._prefill)

    def _preempt_last(self) -> None:
        last, _ = self._queues.running.popitem()
        pair = [last]
        if last.partner in self._queues.running:
            # Together: neither gets anywhere without the other, but its pages would be missing.
            del self._queues.running[last.partner]
            pair = [last, last.partner] if last.follows else [last.partner, last]
        for sequence in pair:  # the leader comes first again
            self.cache.release(sequence)
            sequence.pooled = None
            self._queues.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _dequeue(self, sequence: Sequence) -> None:
        if sequence in self._queues.running:
            del self._queues.running[sequence]
        elif sequence in self._queues.waiting:
            self._queues.waiting.remove(sequence)
