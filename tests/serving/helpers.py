"""Sequences without an engine, and uniform numbers chosen by the test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from anabranch.models.protocol import SamplingParameters
from anabranch.serving.sequence import Request, Sequence


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


class Fixed:
    """Stands in for a sequence's generator: always the same uniform number."""

    def __init__(self, uniform: float) -> None:
        self._uniform = uniform

    def random(self) -> float:
        return self._uniform
