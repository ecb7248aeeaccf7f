"""Drafts of a smaller model with the target's vocabulary.

It keeps keys and values of its own. What it computed for drafts that the target accepted stays; the
rest is overwritten.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from anabranch.errors import ConfigurationError
from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.runner import ModelRunner
from anabranch.serving.sequence import Request, Segment, Sequence
from anabranch.serving.speculation.drafting import ModelDrafter, Tree
from anabranch.serving.speculation.errors import VocabularyMismatch
from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.proposer import DraftingContext

CATCH_UP = 256
"""Tokens of prompts that the drafter computes before one step; longer ones take several steps."""
FEW = 16
"""Missing tokens that are computed along with the first drafted one."""


class DraftModel(ModelDrafter):
    """``pages`` is the size of its cache."""

    name = "model"

    @classmethod
    def of(cls, context: DraftingContext) -> DraftModel:
        """With as many tokens of cache as the target has."""
        draft, pages = cls.draft_of(context)
        return cls(draft, pages, context.options.drafts, context.clock)

    @classmethod
    def draft_of(cls, context: DraftingContext) -> tuple[ModelRunner, int]:
        """The runner that drafts, and the pages of its cache.

        Raises :class:`ConfigurationError` if there is none that fits the target.
        """
        if context.draft is None:
            raise ConfigurationError(
                f"speculation={cls.name} needs draft_model, the name of a smaller model of this "
                "family"
            )
        if context.draft.vocabulary != context.target.vocabulary:
            raise VocabularyMismatch(
                f"the draft model's vocabulary has {context.draft.vocabulary} tokens, the "
                f"target's {context.target.vocabulary}; a drafter must speak in the same tokens"
            )
        return context.draft, -(-context.cache.capacity // context.draft.page_size)

    def __init__(
        self,
        runner: ModelRunner,
        pages: int,
        drafts: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(runner, drafts, clock)
        runner.allocate(pages)
        self._cache = KVCacheManager(pages, runner.page_size)
        self._mirrors: dict[Sequence, Mirror] = {}

    def propose(
        self, sequences: SequenceOf[Sequence], lengths: SequenceOf[int]
    ) -> list[Proposal | None]:
        """Draw drafts. A sequence whose prompt the drafter has not read yet gets none."""
        wanting = {
            sequence: self.longest(length)
            for sequence, length in zip(sequences, lengths, strict=True)
            if length > 0
        }
        trees = self.draft(wanting)
        return [trees[s].proposal() if s in trees else None for s in sequences]

    def forget(self, sequence: Sequence) -> None:
        """Give its pages back."""
        mirror = self._mirrors.pop(sequence, None)
        if mirror is not None:
            self._cache.release(mirror.sequence)

    def draft(self, lengths: Mapping[Sequence, int]) -> dict[Sequence, Tree]:
        """Draw trees that are as deep as ``lengths`` say, going on with those that are there.

        Sequences are missing whose prompt has not been read yet, or for which there is no room.
        """
        self._catch_up(lengths)
        trees: dict[Sequence, Tree] = {}
        for sequence, length in lengths.items():
            mirror = self._mirrors.get(sequence)
            if mirror is None or mirror.sequence.num_pending > FEW:
                continue
            room = len(sequence.tokens) + length * self.drafts
            fits = len(sequence.tokens) + length <= self.runner.context_length
            if fits and self._cache.extend(mirror.sequence, room):
                if mirror.tree is None:
                    mirror.tree = Tree(sequence, mirror.sequence, mirror.random, self.drafts)
                mirror.tree.length = length
                trees[sequence] = mirror.tree
        self.grow(list(trees.values()))
        return trees

    def _catch_up(self, sequences: Iterable[Sequence]) -> None:
        """Compute what sequences have beyond their mirrors, but for their last tokens."""
        budget = CATCH_UP
        segments: list[Segment] = []
        for sequence in sequences:
            own = self._mirrored(sequence)
            if own is None or own.num_pending <= FEW or budget <= 0:
                continue
            take = min(own.num_pending - 1, budget)
            if self._cache.extend(own, own.num_computed + take):
                segments.append(Segment(own, own.num_computed, own.num_computed + take))
                budget -= take
        if segments:
            self.execute(segments)
            for segment in segments:
                segment.sequence.num_computed = segment.stop
                self._cache.publish(segment.sequence, computed_before=segment.start)

    def _mirrored(self, sequence: Sequence) -> Sequence | None:
        """The drafter's own sequence with the same tokens; None if there is no room for it."""
        mirror = self._mirrors.get(sequence)
        if mirror is not None:
            self.settle(mirror, sequence)
            return mirror.sequence
        request = Request(sequence.request.id, sequence.request.prompt, sequence.request.sampling)
        own = Sequence(request, sequence.index, list(sequence.tokens), sequence.max_tokens)
        if not self._cache.admit(own):
            return None
        seed = sequence.request.sampling.seed
        draws = random.Random(None if seed is None else f"{seed}/{own.index}/draft")
        self._mirrors[sequence] = Mirror(own, draws)
        return own

    def settle(self, mirror: Mirror, sequence: Sequence) -> None:
        """Keep what was computed for accepted drafts: move it to where their tokens are now."""
        own, tree, mirror.tree = mirror.sequence, mirror.tree, None
        before = len(own.tokens)
        own.tokens += sequence.tokens[before:]
        if tree is None:
            return
        draft, num_nodes = tree.without_laws(), tree.newest[0]  # the newest are not computed
        kept: list[int] = []
        for token in own.tokens[before:]:
            child = draft.children[kept[-1] + 1 if kept else 0].get(token)
            if child is None or child >= num_nodes:
                break
            kept.append(child)
        # A sequence that was not served since has no new token: its last one is computed again.
        own.num_computed = min(before + len(kept), len(own.tokens) - 1)
        moved = [(before + node, before + i) for i, node in enumerate(kept) if node != i]
        if moved:
            sources, targets = zip(*moved, strict=True)
            self.runner.move_slots(
                [self._cache.slot(own, place) for place in sources],
                [self._cache.slot(own, place) for place in targets],
            )


@dataclass
class Mirror:
    """What the drafter keeps of a sequence."""

    sequence: Sequence
    """In the drafter's cache."""
    random: random.Random
    tree: Tree | None = None
    """What is being verified."""
