"""Dynamic SplitFuse (Holmes et al. 2024, DeepSpeed-FastGen)."""

from __future__ import annotations

from anabranch.serving.policies import Policy
from anabranch.serving.sequence import Segment
from anabranch.serving.sources import TokenSource


class SplitFuse(Policy):
    """All decode tokens first, then pieces of prompts, cut so that every step has the same size.

    Use it always, unless you compare: streams never stall behind a long prompt, and the model
    stays where its throughput is saturated.
    """

    name = "splitfuse"

    def fill(self, budget: int, decode: TokenSource, prefill: TokenSource) -> list[Segment]:
        """Never more than the budget, and exactly the budget while prompts wait."""
        segments = decode.demand(budget)
        return segments + prefill.demand(budget - sum(s.length for s in segments))
