"""Drafters that a test controls, and a model whose laws are a table."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.serving import Engine, EngineOptions
from anabranch.serving.batch import PageCopy, StepPlan, StepResult
from anabranch.serving.sequence import Sequence as TokenSequence
from anabranch.serving.speculation import DraftingContext, Proposal, Proposer
from anabranch.serving.speculation.controller import FixedLength
from anabranch.serving.speculation.verification import KSequential, Rejection

Continuation = Callable[[TokenSequence, int], list[int]]
"""What really comes next, ``count`` tokens of it."""


class Guess(Proposer):
    """Guesses right and wrong at random, as a chain or as a tree with wrong branches."""

    name = "guess"

    def __init__(
        self, continuation: Continuation, vocabulary: int, trees: bool, seed: int = 0
    ) -> None:
        self._continuation = continuation
        self._vocabulary = vocabulary
        self._trees = trees
        self._random = random.Random(seed)

    @classmethod
    def of(cls, context: DraftingContext) -> Guess:
        raise NotImplementedError

    def propose(
        self, sequences: Sequence[TokenSequence], lengths: Sequence[int]
    ) -> list[Proposal | None]:
        return [
            self._guess(sequence, length)
            for sequence, length in zip(sequences, lengths, strict=True)
        ]

    def _guess(self, sequence: TokenSequence, length: int) -> Proposal | None:
        length = self._random.randint(0, length)
        right = self._continuation(sequence, length)
        if not right:
            return None
        if not self._trees:
            return Proposal(tuple(map(self._perhaps, right)))
        tokens: list[int] = []
        parents: list[int] = []
        trunk = -1  # the node that ends what is right so far
        for token in right:
            siblings = [self._wrong() for _ in range(self._random.randint(0, 2))]
            siblings = [s for s in siblings if s != token]
            siblings.insert(self._random.randint(0, len(siblings)), token)
            first = len(tokens)
            tokens += siblings
            parents += [trunk] * len(siblings)
            for sibling in range(first, len(tokens)):  # something hangs on wrong branches, too
                if self._random.random() < 0.3:
                    tokens.append(self._wrong())
                    parents.append(sibling)
            trunk = first + siblings.index(token)
        return Proposal(tuple(tokens), tuple(parents)).first(63)

    def _perhaps(self, token: int) -> int:
        return token if self._random.random() < 0.8 else self._wrong()

    def _wrong(self) -> int:
        return self._random.randrange(self._vocabulary)


class Table:
    """A model of which the next token's logits depend on the last token only."""

    page_size = 16
    page_bytes = 1
    context_length = 256

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.vocabulary = logits.shape[1]
        self.rows = 0

    def allocate(self, num_pages: int) -> None: ...

    def add_adapter(self, checkpoint: Any) -> tuple[None, int]:
        return None, 0

    def remove_adapter(self, handle: None) -> None: ...

    def copy_pages(self, copies: Sequence[PageCopy]) -> None: ...

    def clear_pages(self, pages: Sequence[int]) -> None: ...

    def move_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None: ...

    def execute(self, plan: StepPlan) -> StepResult:
        batch = plan.pack()
        self.rows += len(batch.logits_index)
        return StepResult(self.logits[batch.input_ids[batch.logits_index]], {})


def speculating(engine: Engine, proposer: Proposer | None, length: int = 5) -> Engine:
    """Let an engine draft a fixed length with a proposer, or nothing."""
    engine.speculation.proposer = proposer
    engine.speculation.controller = FixedLength(length)
    return engine


def table_engine(target: Tensor, draft: Tensor | None, drafts: int, **options: Any) -> Engine:
    """An engine on tables, with a draft model if there is a table for it."""
    engine = Engine(
        Table(target),
        options=EngineOptions(
            kv_memory=4000,
            page_size=16,
            speculation="off" if draft is None else "model",
            drafts=drafts,
            **options,
        ),
        draft_runner=None if draft is None else Table(draft),
    )
    verifier = Rejection() if drafts == 1 else KSequential()
    assert type(engine.speculation._verifier) is type(verifier)
    return engine


def markov(seed: int, vocabulary: int, spread: float = 1.5) -> Tensor:
    """Logits ``[vocabulary, vocabulary]`` of a random chain."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(vocabulary, vocabulary, generator=generator)
