"""Sequences without an engine, and uniform numbers chosen by the test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from anabranch.models.protocol import SamplingParameters
from anabranch.serving.sampling import Sampled
from anabranch.serving.sequence import Request, Sequence
from anabranch.serving.speculation.verification import Candidate, Rejection, verify


def make_sequence(
    prompt: Iterable[int] = (0,),
    output: Iterable[int] = (),
    *,
    index: int = 0,
    max_tokens: int = 1000,
    pooling: bool = False,
    name: str = "r",
    **sampling: Any,
) -> Sequence:
    """A sequence that an engine would have made, ``output`` generated so far."""
    prompt = list(prompt)
    request = Request(name, prompt, SamplingParameters(**sampling), pooling)
    return Sequence(request, index, [*prompt, *output], max_tokens)


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Sampled | None]:
    """What each sequence chooses from its row of logits, without drafts."""
    candidates = [Candidate(sequence, row) for row, sequence in enumerate(sequences)]
    verdicts = verify(logits, candidates, Rejection())
    return [None if verdict is None else verdict.tokens[0] for verdict in verdicts]


class Scripted:
    """Stands in for a sequence's generator: returns these uniform numbers in turn."""

    def __init__(self, uniforms: Iterable[float]) -> None:
        self._uniforms = iter(uniforms)

    def random(self) -> float:
        return next(self._uniforms)
