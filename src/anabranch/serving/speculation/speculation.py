"""Speculation in the engine: drafts before a step, judgements after it."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from torch import Tensor

from anabranch import registry
from anabranch.errors import RequestFailed
from anabranch.planning import CostModel
from anabranch.serving.sequence import Segment, Sequence
from anabranch.serving.speculation.acceptance import RequestClass
from anabranch.serving.speculation.controller import (
    FixedLength,
    Load,
    NoSpeculation,
    SpeculationController,
)
from anabranch.serving.speculation.goodput import GoodputController
from anabranch.serving.speculation.proposal import MAX_NODES, Proposal
from anabranch.serving.speculation.proposer import DraftingContext, Proposer
from anabranch.serving.speculation.verification import (
    Candidate,
    KSequential,
    Rejection,
    Verdict,
    Verifier,
    verify,
)

logger = logging.getLogger(__name__)

OFF = "off"
LONGEST_LOOKUP = 16
"""Tokens of a draft that costs nothing. Long ones are worth their rows where the text is copied."""
LONGEST = 8
"""Tokens of a draft that a model makes."""


@dataclass
class SpeculationStatistics:
    """Totals. The tokens that are emitted behind accepted ones are in neither."""

    drafted: int = 0
    """Tokens that were verified."""
    accepted: int = 0


class Speculation:
    """Asks a proposer for as many tokens as a controller finds worth verifying.

    Text that a constraint forces is drafted in any case: it is accepted nearly always. Without a
    ``proposer`` nothing else is.
    """

    def __init__(
        self,
        proposer: Proposer | None,
        controller: SpeculationController,
        verifier: Verifier,
        max_context: int,
        end_tokens: SequenceOf[int] = (),
    ) -> None:
        self.statistics = SpeculationStatistics()
        self.proposer = proposer
        self.controller = controller
        self._verifier = verifier
        self._max_context = max_context
        self._end_tokens = frozenset(end_tokens)
        self._likeness: dict[Sequence, Hashable] = {}
        """Of each sequence's newest draft."""

    @classmethod
    def of(
        cls,
        context: DraftingContext,
        cost_model: CostModel,
        max_context: int,
        end_tokens: SequenceOf[int],
    ) -> Speculation:
        """As the options say, with lengths that follow goodput."""
        name, proposer = context.options.speculation, None
        controller: SpeculationController = NoSpeculation()
        if name != OFF:
            proposer = registry.get("proposers", name).of(context)
            controller = (
                GoodputController.of(cost_model, None, LONGEST_LOOKUP)
                if proposer.free
                else GoodputController.of(cost_model, proposer.seconds, LONGEST)
            )
            if proposer.own_lengths:
                controller = FixedLength(MAX_NODES)
        verifier = Rejection() if context.options.drafts == 1 else KSequential()
        return cls(proposer, controller, verifier, max_context, end_tokens)

    def propose(self, sequences: SequenceOf[Sequence], prompt_tokens: int, free_slots: int) -> None:
        """Set the drafts of the sequences that decode in the coming step.

        The step computes ``prompt_tokens`` besides; the cache has ``free_slots`` for drafts.
        """
        wanting: list[Sequence] = []
        rooms: list[int] = []
        others = 0  # tokens of sequences that draft nothing of their own
        for sequence in sequences:
            sequence.draft = None
            left = sequence.max_tokens - sequence.num_generated
            room = min(left, self._max_context - len(sequence.tokens)) - 1
            if room < 1 or sequence.partner is not None:
                others += 1
                continue
            forced = _forced(sequence)
            if forced:
                sequence.draft = Proposal(tuple(forced[:room]), forced=True)
                others += 1 + len(sequence.draft)
            else:
                wanting.append(sequence)
                rooms.append(room)
        if self.proposer is None or not wanting:
            return
        contexts = [len(sequence.tokens) for sequence in wanting]
        load = Load(prompt_tokens + others, contexts, free_slots)
        try:
            drafts = self._drafts(self.proposer, wanting, rooms, load)
        except Exception:  # a defect in a drafter costs speed, never a request
            logger.exception("drafting failed; this step goes on without")
            return
        for sequence, draft in zip(wanting, drafts, strict=True):
            sequence.draft = self._useful(sequence, draft)

    def verify(self, logits: Tensor, candidates: SequenceOf[Candidate]) -> list[Verdict | None]:
        """What each sequence emits."""
        return verify(logits, candidates, self._verifier)

    def begin(self, segments: SequenceOf[Segment]) -> None:
        """The target computes these now."""
        if self.proposer is None:
            return
        try:
            self.proposer.begin(segments)
        except Exception:
            logger.exception("drafting failed; this step goes on without")

    def finish(self) -> dict[Sequence, Proposal]:
        """Drafts that are longer than what was computed since :meth:`begin`."""
        if self.proposer is None:
            return {}
        try:
            return self.proposer.finish()
        except Exception:
            logger.exception("drafting failed; this step goes on without")
            return {}

    def observe(self, sequence: Sequence, draft: Proposal, verdict: Verdict) -> None:
        """Learn from a judgement."""
        accepted = len(verdict.nodes)
        self.statistics.drafted += len(draft)
        self.statistics.accepted += accepted
        if not draft.forced:
            rejected = accepted < max(draft.depths)
            self.controller.observe(self._class(sequence, draft.likeness), accepted, rejected)

    def record(self, seconds: float) -> None:
        """How long a step took, from before its drafts to after its judgements."""
        self.controller.record(seconds)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has finished."""
        if self.proposer is not None:
            self.controller.release(_request(sequence))
            self.proposer.forget(sequence)
            self._likeness.pop(sequence, None)

    def close(self) -> None:
        """The engine has stopped."""
        if self.proposer is not None:
            self.proposer.close()

    def _drafts(
        self,
        proposer: Proposer,
        sequences: list[Sequence],
        rooms: list[int],
        load: Load,
    ) -> list[Proposal | None]:
        classes = [self._class(one, self._likeness.get(one)) for one in sequences]
        if not self.controller.worth_proposing(classes, load):
            return [None] * len(sequences)
        longest = [min(room, self.controller.longest) for room in rooms]
        if not proposer.free:
            lengths = self.controller.lengths(classes, load, None)
            return proposer.propose(sequences, list(map(min, lengths, longest)))
        drafts = [
            self._useful(sequence, draft)
            for sequence, draft in zip(sequences, proposer.propose(sequences, longest), strict=True)
        ]
        for row, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
            if draft:
                self._likeness[sequence] = draft.likeness
                classes[row] = self._class(sequence, draft.likeness)
        available = [len(draft) if draft else 0 for draft in drafts]
        lengths = self.controller.lengths(classes, load, available)
        return [
            draft.first(length) if draft else None
            for draft, length in zip(drafts, lengths, strict=True)
        ]

    def _class(self, sequence: Sequence, likeness: Hashable) -> Hashable:
        """Drafts of one class are accepted about equally often.

        How well a drafting model does is a matter of the adapter; whether an answer repeats its
        context is one of the request, and of how much of the context it repeated just now.
        """
        adapter = sequence.request.adapter
        group = adapter.key if adapter else None, likeness
        if self.proposer is None or not self.proposer.free:
            return group
        return RequestClass(group, _request(sequence))

    def _useful(self, sequence: Sequence, draft: Proposal | None) -> Proposal | None:
        """A chain without what can never be accepted: end tokens, and what a constraint refuses.

        The row before an end token draws it just as well.
        """
        if draft is None or draft.parents is not None or draft.laws is not None:
            return draft
        count = 0
        state = sequence.constraint
        for token in draft.tokens:
            if token in self._end_tokens or (state is not None and not state.accept(token)):
                break
            count += 1
        if state is not None and count:
            state.rollback(count)
        return draft.first(count)


def _request(sequence: Sequence) -> Hashable:
    return sequence.request.id, sequence.index


def _forced(sequence: Sequence) -> list[int]:
    """Tokens that a sequence's constraint leaves no choice about."""
    if sequence.constraint is None or sequence.failure is not None:
        return []
    try:
        return sequence.constraint.forced()
    except RequestFailed as error:
        sequence.failure = str(error)
        return []
