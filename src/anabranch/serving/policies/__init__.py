"""How a step's token budget is shared between decoding and prompts.

A policy is one method. All of them run on the same scheduler, cache and runner, so that they can
be compared. ``anabranch list policies`` shows them; another package adds one by an entry point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from anabranch.serving.sequence import Segment
from anabranch.serving.sources import TokenSource

__all__ = ["Policy"]


class Policy(ABC):
    """Fills a step from the decode and prefill sources."""

    name: ClassVar[str]
    whole_prompts: ClassVar[bool] = False
    """Whether the prefill source must hand out prompts uncut."""

    @abstractmethod
    def fill(self, budget: int, decode: TokenSource, prefill: TokenSource) -> list[Segment]:
        """Segments of the next step. ``budget`` is the number of tokens wanted in it."""
