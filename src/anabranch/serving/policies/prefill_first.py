"""Prefill before decode, as vLLM scheduled in 2023 (Kwon et al., SOSP'23)."""

from __future__ import annotations

from anabranch.serving.policies import Policy
from anabranch.serving.sequence import Segment
from anabranch.serving.sources import TokenSource


class PrefillFirst(Policy):
    """Whole prompts as soon as there are any, and nothing else in that step; else all decodes.

    A baseline. It has the earliest first tokens, and every running stream stalls while it
    prefills.
    """

    name = "prefill_first"
    whole_prompts = True

    def fill(self, budget: int, decode: TokenSource, prefill: TokenSource) -> list[Segment]:
        """Prompts up to the budget (at least one), or one token of every running sequence."""
        return prefill.demand(budget) or decode.demand(budget)
