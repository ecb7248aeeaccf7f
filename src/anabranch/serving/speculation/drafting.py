"""Drafts drawn from a model, token by token, for many sequences in one packed step.

Several drafts of one sequence are a tree: their common beginnings are drawn, computed and verified
once, and how many drafts pass through a node is remembered, because SpecTr's rule (Sun et al. 2023)
needs independent drafts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.planning import CostModel
from anabranch.serving.adjustment import Row, adjust
from anabranch.serving.batch import StepPlan
from anabranch.serving.runner import ModelRunner
from anabranch.serving.sampling import distributions, is_greedy
from anabranch.serving.sequence import Segment, Sequence
from anabranch.serving.speculation.proposal import MAX_NODES, Proposal
from anabranch.serving.speculation.proposer import Proposer
from anabranch.serving.speculation.spectr import draw


class ModelDrafter(Proposer):
    """What drafters that run a model share: they draw ``drafts`` independent drafts a sequence."""

    free = False

    def __init__(
        self, runner: ModelRunner, drafts: int = 1, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        if not 1 <= drafts <= MAX_NODES:
            raise ConfigurationError(f"drafts must be between 1 and {MAX_NODES}, not {drafts}")
        self.runner = runner
        self.drafts = drafts
        self.cost_model = CostModel()
        self._clock = clock

    def seconds(self, sequences: int, context: int, length: int) -> float:
        """So many small steps."""
        tokens = sequences * self.drafts
        return length * self.cost_model.predict(tokens, context)

    def longest(self, length: int) -> int:
        """How deep a tree of this drafter may be."""
        return length if self.drafts == 1 else min(length, MAX_NODES // self.drafts)

    def grow(self, trees: SequenceOf[Tree]) -> None:
        """Draw depth after depth until every tree is as long as it should be."""
        growing = [tree for tree in trees if tree.depth < tree.length]
        while growing:
            logits = self.execute([tree.segment() for tree in growing])
            rows = [row for tree in growing for row in tree.rows()]
            laws = distributions(adjust(logits, rows), rows)
            for tree, mine in zip(
                growing, laws.split([len(tree.newest) for tree in growing]), strict=True
            ):
                tree.add(mine)
            growing = [tree for tree in growing if tree.depth < tree.length]

    def execute(self, segments: list[Segment]) -> Tensor:
        """Run one step of the drafting model."""
        plan = StepPlan(tuple(segments), self.runner.page_size)
        began = self._clock()
        logits = self.runner.execute(plan).logits
        self.cost_model.observe(plan.num_tokens, plan.num_context, self._clock() - began)
        return logits


@dataclass
class Tree:
    """A proposal that grows by one depth at a time."""

    sequence: Sequence
    computed: Sequence
    """The sequence in the cache of the model that drafts."""
    random: random.Random
    drafts: int
    length: int = 0
    """Depth to which it is grown."""
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    laws: dict[int, Tensor] = field(default_factory=dict)
    newest: list[int] = field(default_factory=lambda: [-1])
    """Nodes of the greatest depth; -1 is the sequence itself."""
    depth: int = 0

    def segment(self) -> Segment:
        """What must be computed to draw children of the newest nodes."""
        stop = len(self.computed.tokens)
        if self.depth == 0:
            return Segment(self.computed, self.computed.num_computed, stop)
        return Segment(self.computed, stop, stop, self.without_laws(), self.newest[0])

    def rows(self) -> list[Row]:
        """Whose laws the segment's logits are: of the sequence's own request."""
        draft = self.without_laws()
        return [Row(self.sequence, draft.spelled(node)) for node in self.newest]

    def add(self, laws: Tensor) -> None:
        """Draw as many children of each newest node as drafts pass through it."""
        parents, self.newest = self.newest, []
        for parent, law in zip(parents, laws, strict=True):
            self.laws[parent] = law
            count = self.counts[parent] if parent >= 0 else self.drafts
            drawn: dict[int, int] = {}
            for token in self._draw(law, count):
                drawn[token] = drawn.get(token, 0) + 1
            for token, times in drawn.items():
                self.newest.append(len(self.tokens))
                self.tokens.append(token)
                self.parents.append(parent)
                self.counts.append(times)
        self.depth += 1

    def advance(self, count: int) -> None:
        """The first ``count`` tokens of a chain are the sequence's own now; the others stay."""
        self.tokens = self.tokens[count:]
        self.parents = list(range(-1, len(self.tokens) - 1))
        self.counts = self.counts[count:]
        self.laws = {node - count: law for node, law in self.laws.items() if node >= count - 1}
        self.newest = [len(self.tokens) - 1]
        self.depth -= count

    def proposal(self) -> Proposal:
        """The tree as it is."""
        greedy = is_greedy(self.sequence.request.sampling)
        return self._proposal(None if greedy else self._all_laws())

    def without_laws(self) -> Proposal:
        """Its tokens and how they hang together."""
        return self._proposal(None)

    def _proposal(self, laws: Tensor | None) -> Proposal:
        chain = self.drafts == 1
        return Proposal(
            tuple(self.tokens),
            None if chain else tuple(self.parents),
            laws,
            None if chain else tuple(self.counts),
        )

    def _all_laws(self) -> Tensor:
        some = self.laws[-1]
        nothing = torch.zeros_like(some)
        nodes = range(-1, len(self.tokens))
        return torch.stack([self.laws.get(node, nothing) for node in nodes])

    def _draw(self, law: Tensor, count: int) -> list[int]:
        if is_greedy(self.sequence.request.sampling):
            return [int(law.argmax())] * count
        return [draw(law, self.random.random()) for _ in range(count)]
