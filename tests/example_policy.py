"""A policy as another package would add it."""

from __future__ import annotations

from anabranch.serving.policies.splitfuse import SplitFuse


class Mine(SplitFuse):
    """SplitFuse under another name."""

    name = "mine"
