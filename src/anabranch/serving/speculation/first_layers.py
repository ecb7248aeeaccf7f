"""Drafts of the target's own first layers: no second model, no second cache.

The first layers' keys and values of everything that was verified are in the cache already. What is
drafted is written to where the verification will write the same again, and what the later layers
lack there is written by it (as in LayerSkip, Elhoushi et al. 2024, section 4.3). A model that was
not trained to exit early drafts poorly; how poorly decides whether it is asked at all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

from anabranch.errors import ConfigurationError
from anabranch.serving.kv_cache import KVCacheManager
from anabranch.serving.runner import LayeredRunner, ModelRunner
from anabranch.serving.sequence import Sequence
from anabranch.serving.speculation.drafting import ModelDrafter, Tree
from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.proposer import DraftingContext


class FirstLayers(ModelDrafter):
    """``runner`` and ``cache`` are those of the target; ``layers`` of it draft."""

    name = "layers"

    @classmethod
    def of(cls, context: DraftingContext) -> FirstLayers:
        """On the engine's own runner."""
        layers = context.options.draft_layers
        if layers is None:
            raise ConfigurationError(
                "speculation=layers needs draft_layers, how many of them draft"
            )
        drafts, clock = context.options.drafts, context.clock
        return cls(context.target, context.cache, layers, drafts, clock)

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCacheManager,
        layers: int,
        drafts: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(runner, LayeredRunner):
            raise ConfigurationError(
                "drafting with the model's first layers needs the fused runner, which does not "
                "run here; use speculation=lookup or a draft model"
            )
        super().__init__(runner.first_layers(layers), drafts, clock)
        self._cache = cache
        self._random: WeakKeyDictionary[Sequence, random.Random] = WeakKeyDictionary()

    def propose(
        self, sequences: SequenceOf[Sequence], lengths: SequenceOf[int]
    ) -> list[Proposal | None]:
        """Draw drafts where the cache has room for them."""
        trees: dict[Sequence, Tree] = {}
        for sequence, length in zip(sequences, lengths, strict=True):
            length = self.longest(length)
            room = len(sequence.tokens) + length * self.drafts
            if length > 0 and self._cache.extend(sequence, room):
                draws = self._generator(sequence)
                trees[sequence] = Tree(sequence, sequence, draws, self.drafts, length)
        self.grow(list(trees.values()))
        found = [trees.get(sequence) for sequence in sequences]
        return [tree.proposal() if tree else None for tree in found]

    def _generator(self, sequence: Sequence) -> random.Random:
        if sequence not in self._random:
            seed = sequence.request.sampling.seed
            name = None if seed is None else f"{seed}/{sequence.index}/draft"
            self._random[sequence] = random.Random(name)
        return self._random[sequence]
