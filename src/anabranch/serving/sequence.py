"""Requests, the sequences they become, and the segments that a step computes.

A sequence has one number of progress: ``num_computed``, the tokens whose keys and values are in
the cache. Whether it prefills or decodes follows from it and is never stored.

    tokens        [ p p p p p p p p g g g ]      p: prompt, g: generated
    num_computed  ----------------->|            the next segment starts here
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from anabranch.models.protocol import FinishReason, SamplingParameters

if TYPE_CHECKING:
    from torch import Tensor

    from anabranch.serving.adapters import ServedAdapter
    from anabranch.serving.constraints import CompiledConstraint, ConstraintState
    from anabranch.serving.contrast.pairs import Contrast
    from anabranch.serving.detokenizer import Detokenizer
    from anabranch.serving.speculation.proposal import Proposal

SegmentKind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Request:
    """What a client asks of the engine: token ids in, sampled tokens (or a pooled vector) out."""

    id: str
    prompt: SequenceOf[int]
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    pooling: bool = False
    """Return the mean of the last hidden states over the prompt instead of generating."""
    adapter: ServedAdapter | None = None
    """The adapter on top of the base model, in the version that the request started with."""
    constraint: CompiledConstraint | None = None
    """``sampling.constraint`` for this model's tokenizer."""
    contrast: Contrast | None = None
    """A prompt without what the answer should follow, whose habits are subtracted."""
    prediction: SequenceOf[int] = ()
    """``sampling.prediction`` in tokens: what the answer may repeat."""


class Recorder(Protocol):
    """Keeps what training needs of the rows that steps compute for one sequence.

    ``start`` is the position of the first row in the sequence. ``module`` names a linear layer
    within its decoder layer, for example ``mlp.down_proj``.
    """

    products: frozenset[str]
    """Linear layers whose outputs are wanted, before an adapter changes them."""
    drops: bool
    """Whether :meth:`dropped` does anything."""

    def begin(self, start: int) -> None:
        """Rows from this one on are computed now, for a runner whose modules drop values."""

    def layer_input(self, layer: int, start: int, rows: Tensor) -> None:
        """Input ``[n, hidden]`` of a decoder layer; of the last norm for ``layer`` = layers."""

    def product(self, layer: int, module: str, start: int, rows: Tensor) -> None:
        """Output ``[n, outputs]`` of a linear layer."""

    def dropped(self, layer: int, module: str, start: int, rows: Tensor) -> Tensor:
        """What an adapter at this linear layer sees of the layer's input ``[n, inputs]``."""


@dataclass(eq=False)
class Sequence:
    """One choice of a request under way. Compared and hashed by identity."""

    request: Request
    index: int
    tokens: list[int]
    max_tokens: int
    detokenizer: Detokenizer | None = None
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    siblings: list[Sequence] = field(default_factory=list)
    """Further choices of the request, started from this one's prompt once it is computed."""
    last_turn: int = -1
    """Number of the last segment it was given, over all sequences."""
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    random: random.Random = field(default_factory=random.Random)
    token_counts: Tensor | None = None
    """[2, vocabulary]: occurrences in the prompt and in the output; only with penalties."""
    pooled: Tensor | None = None
    """[hidden]: sum of last hidden states so far; only for pooling requests."""
    recorder: Recorder | None = None
    """Only for sequences that are trained on; nothing is sampled from them."""
    constraint: ConstraintState | None = None
    """Where the answer is in the language that it must be from."""
    failure: str | None = None
    """Why it cannot go on, if that shows before its next token is drawn."""
    partner: Sequence | None = None
    """The companion of a sequence that is contrasted, and the other way round."""
    follows: bool = False
    """Whether it is the companion: its tokens are chosen by its partner."""
    draft: Proposal | None = None
    """What may follow, to be verified in the coming step; only while that step runs."""
    _uniforms: deque[float] = field(default_factory=deque)
    """Drawn ahead for drafted tokens."""

    def __post_init__(self) -> None:
        seed = self.request.sampling.seed
        if seed is not None:
            self.random.seed(f"{seed}/{self.index}")

    def uniform(self, ahead: int = 0) -> float:
        """The random number of the next token, or of the one so many tokens ahead of it."""
        while len(self._uniforms) <= ahead:
            self._uniforms.append(self.random.random())
        return self._uniforms[ahead]

    def append(self, token: int) -> None:
        """Take a token that was chosen."""
        self.tokens.append(token)
        if self._uniforms:
            self._uniforms.popleft()
        if self.token_counts is not None:
            self.token_counts[1, token] += 1

    @property
    def prompt_length(self) -> int:
        """Tokens that came from the client."""
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far; they survive a preemption."""
        return len(self.tokens) - self.prompt_length

    @property
    def num_pending(self) -> int:
        """Tokens that must be computed before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True)
class Segment:
    """Tokens ``[start, stop)`` of a sequence, to be computed in one step, and drafts after them.

    The nodes of ``draft`` from ``first_node`` on are computed, too; those before it have been.
    Keys and values of node i go where token ``stop + i`` of the sequence would have its own.
    """

    sequence: Sequence
    start: int
    stop: int
    draft: Proposal | None = None
    first_node: int = 0

    @property
    def num_nodes(self) -> int:
        """Drafted tokens that are computed."""
        return len(self.draft) - self.first_node if self.draft else 0

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start + self.num_nodes

    @property
    def context(self) -> int:
        """Places in the cache up to and including the segment."""
        return self.stop + (len(self.draft) if self.draft else 0)

    @property
    def kind(self) -> SegmentKind:
        """``decode`` for the newest generated token, ``prefill`` for anything else."""
        decoding = self.stop - self.start <= 1 and self.start >= self.sequence.prompt_length
        return "decode" if decoding else "prefill"

    @property
    def num_logits(self) -> int:
        """Rows at the segment's end that somebody reads: of the last token, and of all drafts."""
        sampled = self.sequence.recorder is None and not self.sequence.request.pooling
        if not sampled or self.stop < len(self.sequence.tokens):
            return 0
        return min(1, self.stop - self.start) + self.num_nodes
