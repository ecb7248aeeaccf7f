"""Iteration-level scheduling with whole prompts, as in Orca (Yu et al., OSDI'22)."""

from __future__ import annotations

from anabranch.serving.policies import Policy
from anabranch.serving.sequence import Segment
from anabranch.serving.sources import TokenSource


class Orca(Policy):
    """All decode tokens and whole prompts together in one step.

    A baseline. Nothing waits for a batch to end, but a long prompt makes its step long for
    everybody in it.
    """

    name = "orca"
    whole_prompts = True

    def fill(self, budget: int, decode: TokenSource, prefill: TokenSource) -> list[Segment]:
        """Decodes, then prompts up to the rest of the budget (at least one)."""
        segments = decode.demand(budget)
        return segments + prefill.demand(max(1, budget - sum(s.length for s in segments)))
