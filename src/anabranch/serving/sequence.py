"""Requests, the sequences they become, and the segments that a step computes.

A sequence has one number of progress: ``num_computed``, the tokens whose keys and values are in
the cache. Whether it prefills or decodes follows from it and is never stored.

    tokens        [ p p p p p p p p g g g ]      p: prompt, g: generated
    num_computed  ----------------->|            the next segment starts here
"""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from anabranch.models.protocol import FinishReason, SamplingParameters

if TYPE_CHECKING:
    from torch import Tensor

    from anabranch.serving.adapters import ServedAdapter
    from anabranch.serving.detokenizer import Detokenizer

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

    def __post_init__(self) -> None:
        seed = self.request.sampling.seed
        if seed is not None:
            self.random.seed(f"{seed}/{self.index}")

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
    """Tokens ``[start, stop)`` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    @property
    def kind(self) -> SegmentKind:
        """``decode`` for the newest generated token, ``prefill`` for anything else."""
        decoding = self.length == 1 and self.start >= self.sequence.prompt_length
        return "decode" if decoding else "prefill"

    @property
    def wants_logits(self) -> bool:
        """Only the row of a sequence's last token is ever sampled."""
        sampled = self.sequence.recorder is None and not self.sequence.request.pooling
        return sampled and self.stop == len(self.sequence.tokens)
