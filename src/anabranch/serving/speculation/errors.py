"""What can be wrong with drafts."""

from __future__ import annotations

from anabranch.errors import AnabranchError, ConfigurationError


class InvalidLaw(AnabranchError, ValueError):
    """A distribution is none, two do not belong together, or a draft cannot have come from its own.

    Nobody who sends a request can cause it: a drafter or a model is at fault.
    """


class VocabularyMismatch(ConfigurationError):
    """A draft model and its target do not share their tokens."""
