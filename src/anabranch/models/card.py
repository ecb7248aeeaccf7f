"""The facts about a model that a user sees before running it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelCard:
    """Size, limits, licence and origin of a model.

    ``fingerprint`` is a SHA-256 over the weights and configuration: two models with the same
    fingerprint compute the same function.
    """

    name: str
    architecture: str
    parameters: int
    context_length: int
    dtype: str
    licence: str
    provenance: str
    fingerprint: str
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
