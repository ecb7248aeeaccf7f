"""PEARL: the drafting model drafts while the target computes (Liu et al. 2024, "Parallel
Speculative Decoding with Adaptive Draft Length").

In every step the drafter draws a window of tokens behind all that it has drafted so far, and the
target computes what was there before the step. The last row of the target then also decides on the
first token of the new window:

    target  [ a ]            [ x | 1 2 3 ]            [ 4 | 5 6 7 ]     rows it computes
    drafter     1 2 3 4            5 6 7 8                  ...         tokens it draws
    tested      1                2 3 4 5                  6 7 8 ...     x: accepted, or corrected

A sequence without accepted drafts is in the paper's pre-verify mode: one row of the target tests
the first token of a window. As long as everything is accepted, windows follow each other without a
pause (post-verify), so that the length of drafts adapts to the text. A refusal throws away what
was drafted behind it. There is no additional token after full acceptance: what follows has been
drafted already.

The mode of a sequence is not stored: it is whether drafted tokens are left that the target has not
computed. Sequences of one batch may be in either.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from weakref import WeakSet

import torch

from anabranch.errors import ConfigurationError
from anabranch.serving.runner import ModelRunner
from anabranch.serving.sequence import Segment, Sequence
from anabranch.serving.speculation.draft_model import DraftModel, Mirror
from anabranch.serving.speculation.drafting import Tree
from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.proposer import DraftingContext

logger = logging.getLogger(__name__)

LONGEST_WINDOW = 16
FIRST_WINDOW = 4
"""Tokens of a window until both models have been timed."""
RATE = 0.1
"""Weight of the newest measurement in the averages of both models' times."""
KEPT_ROUNDS = 512


@dataclass(frozen=True)
class PearlRound:
    """One step of the target beside which something was drafted. Times are in seconds."""

    pre: int
    """Sequences in which the target tested the first token of a window only."""
    post: int
    """Sequences in which it tested the rest of one, too."""
    drafted: int
    """Tokens."""
    draft_steps: int
    draft_seconds: float
    target_seconds: float
    seconds: float
    """Until both were done: their sum where nothing overlaps, the greater one at best."""


@dataclass
class PearlStatistics:
    """Totals of drafted tokens whose fate is known."""

    accepted: int = 0
    wasted: int = 0
    """Drafted behind a refused token or the end of an answer, and refused tokens."""
    refusals: int = 0
    rounds: deque[PearlRound] = field(default_factory=lambda: deque(maxlen=KEPT_ROUNDS))
    """The latest."""

    @property
    def accepted_length(self) -> float:
        """Mean tokens that are accepted in a row before one is refused."""
        return self.accepted / max(1, self.refusals)


class Pearl(DraftModel):
    """A draft model that drafts while the target computes, on cores of its own.

    ``window`` is how many tokens it draws meanwhile; None follows the measured times of both
    models, and then a seeded request that is not greedy may give other tokens of the same law when
    it is repeated. On a single core, or beside the target on one GPU, the two take turns: correct,
    and no faster.
    """

    name = "pearl"
    own_lengths = True

    @classmethod
    def of(cls, context: DraftingContext) -> Pearl:
        """As :meth:`DraftModel.of`, for one draft a sequence."""
        draft, pages = cls.draft_of(context)
        if context.options.drafts != 1:
            raise ConfigurationError(
                f"speculation=pearl makes one draft a sequence, not {context.options.drafts}; use "
                "speculation=model for several"
            )
        return cls(draft, pages, context.options.draft_tokens, context.clock)

    def __init__(
        self,
        runner: ModelRunner,
        pages: int,
        window: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if window is not None and window < 1:
            raise ConfigurationError(f"the window has {window} tokens; 1 is the least")
        super().__init__(runner, pages, 1, clock)
        self.statistics = PearlStatistics()
        self._fixed_window = window
        self._target_seconds = self._draft_seconds = 0.0  # of one step, on average
        self._rooms: dict[Sequence, int] = {}  # who wants drafts, and how many at most
        self._round: _Round | None = None
        self._given_up: WeakSet[Sequence] = WeakSet()
        self._done = _Work(0, 0, 0.0)
        self._worker: ThreadPoolExecutor | None = None
        self._threads_before = 0

    @property
    def window(self) -> int:
        """Tokens that are drafted in one step: as many as fit into one of the target."""
        if self._fixed_window is not None:
            return self._fixed_window
        if not self._draft_seconds:
            return FIRST_WINDOW
        fits = round(self._target_seconds / self._draft_seconds)
        return max(1, min(LONGEST_WINDOW, fits))

    def propose(
        self, sequences: SequenceOf[Sequence], lengths: SequenceOf[int]
    ) -> list[Proposal | None]:
        """What was drafted in earlier steps and stands. Costs nothing: drafting comes later."""
        self._rooms = {}
        proposals: list[Proposal | None] = []
        for sequence, length in zip(sequences, lengths, strict=True):
            if length > 0 and sequence not in self._given_up:
                self._rooms[sequence] = sequence.max_tokens - sequence.num_generated
            tree = self._standing(sequence)
            proposals.append(tree.proposal().first(length) if tree else None)
        return proposals

    def begin(self, segments: SequenceOf[Segment]) -> None:
        """Draft behind what the target computes now, on the worker."""
        self._join()  # should the last step have ended without `finish`
        rooms, self._rooms = self._rooms, {}
        depths: dict[Sequence, int] = {}
        post = 0
        for segment in segments:
            sequence, nodes = segment.sequence, segment.num_nodes
            if sequence not in rooms or not self._is_ours(segment):
                continue
            depths[sequence] = min(nodes + self.window, rooms[sequence])
            post += nodes > 0
        if depths:
            worker = self._worker or self._start()
            decoding = all(segment.kind == "decode" for segment in segments)
            self._round = _Round(
                list(depths), post, decoding, self._clock(), worker.submit(self._work, depths)
            )

    def finish(self) -> dict[Sequence, Proposal]:
        """Wait for the worker. If it failed its sequences go on without drafts."""
        this, self._round = self._round, None
        if this is None:
            return {}
        target_seconds = self._clock() - this.began
        try:
            work = this.work.result()
        except Exception:
            for sequence in this.sequences:
                self._drop(sequence)
                self._given_up.add(sequence)
            raise
        self._record(this, work, target_seconds)
        trees = {sequence: self._standing(sequence) for sequence in this.sequences}
        return {sequence: tree.proposal() for sequence, tree in trees.items() if tree}

    def forget(self, sequence: Sequence) -> None:
        """Give its pages back, once nothing is drafted for it any more."""
        self._join()
        self._drop(sequence)

    def settle(self, mirror: Mirror, sequence: Sequence) -> None:
        """Go on behind accepted tokens. If another one follows them draft anew behind that."""
        own, tree = mirror.sequence, mirror.tree
        if tree is None:
            super().settle(mirror, sequence)
            return
        new = sequence.tokens[len(own.tokens) :]
        accepted = 0
        while accepted < min(len(new), len(tree.tokens)) and new[accepted] == tree.tokens[accepted]:
            accepted += 1
        self.statistics.accepted += accepted
        if accepted == len(new) < len(tree.tokens):
            tree.advance(accepted)
            own.tokens += new
            own.num_computed = len(own.tokens)
            return
        self.statistics.wasted += len(tree.tokens) - accepted
        self.statistics.refusals += accepted < len(tree.tokens)
        super().settle(mirror, sequence)

    def close(self) -> None:
        """End the worker and give its cores back. For the thread that runs the engine."""
        self._join()
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
            torch.set_num_threads(self._threads_before)

    def grow(self, trees: SequenceOf[Tree]) -> None:
        """Draw, and measure it."""
        missing = [max(0, tree.length - tree.depth) for tree in trees]
        began = self._clock()
        super().grow(trees)
        self._done = _Work(sum(missing), max(missing, default=0), self._clock() - began)

    def _drop(self, sequence: Sequence) -> None:
        tree = self._standing(sequence)
        if tree is not None:
            self.statistics.wasted += len(tree.tokens)
        super().forget(sequence)

    def _standing(self, sequence: Sequence) -> Tree | None:
        """What is drafted behind the sequence as it is now."""
        mirror = self._mirrors.get(sequence)
        if mirror is None:
            return None
        self.settle(mirror, sequence)
        return mirror.tree

    def _is_ours(self, segment: Segment) -> bool:
        """Whether the target computes what was proposed, or the beginning of it, or nothing."""
        if segment.draft is None:
            return True
        mirror = self._mirrors.get(segment.sequence)
        drafted = mirror.tree.tokens if mirror and mirror.tree else []
        return segment.draft.tokens == tuple(drafted[: len(segment.draft)])

    def _work(self, depths: dict[Sequence, int]) -> _Work:
        """On the worker: read prompts, then draw. The engine's thread touches no sequence now."""
        self._done = _Work(0, 0, 0.0)
        self.draft(depths)
        return self._done

    def _record(self, this: _Round, work: _Work, target_seconds: float) -> None:
        seconds = self._clock() - this.began
        self.statistics.rounds.append(
            PearlRound(
                len(this.sequences) - this.post,
                this.post,
                work.drafted,
                work.steps,
                work.seconds,
                target_seconds,
                seconds,
            )
        )
        # Prompts in the step say nothing of how long it takes to verify a window.
        if this.decoding and work.steps and work.seconds > 0:
            each = work.seconds / work.steps
            rate = RATE if self._draft_seconds else 1.0
            self._draft_seconds += rate * (each - self._draft_seconds)
            self._target_seconds += rate * (target_seconds - self._target_seconds)

    def _start(self) -> ThreadPoolExecutor:
        """Start the worker and share the cores between it and this thread, which the target uses.

        PyTorch's number of threads is each thread's own, once that thread has asked for it; the
        last number that anybody set is that of threads to come.
        """
        self._threads_before = torch.get_num_threads()
        cores = usable_cores()
        if cores == 1:
            logger.warning("speculation=pearl has a single core here: both models take turns on it")
        target, drafter = share_threads(self._threads_before, cores)
        self._worker = ThreadPoolExecutor(1, "pearl", torch.set_num_threads, (drafter,))
        self._worker.submit(torch.get_num_threads).result()
        torch.set_num_threads(target)
        return self._worker

    def _join(self) -> None:
        if self._round is not None:
            wait([self._round.work])


def usable_cores() -> int:
    """Cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_threads(threads: int, cores: int) -> tuple[int, int]:
    """Threads of the target and of the drafter, of ``threads`` that the target has alone.

    The drafter gets the cores that the target leaves free; if there is none, half of its threads.
    """
    if cores > threads:
        return threads, cores - threads
    drafter = max(1, threads // 2)
    return max(1, threads - drafter), drafter


@dataclass(frozen=True)
class _Work:
    """What the worker did in a round."""

    drafted: int
    steps: int
    seconds: float
    """Of these steps; reading prompts is not in it."""


@dataclass(frozen=True)
class _Round:
    """Drafting under way."""

    sequences: list[Sequence]
    post: int
    decoding: bool
    """Whether the target reads no prompt in this step."""
    began: float
    work: Future[_Work]
