"""One codec after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.federated.codecs.base import Codec
from anabranch.federated.payload import Payload, Value


class Chain(Codec):
    """Each codec encodes the floating-point tensors that the one before left.

    Example: ``Chain([TopK(0.1), Quantise(8)])`` sends 10 % of the values with 8 bits each.
    """

    name = ""  # not a codec of its own in a job file, where a list is a chain

    def __init__(self, codecs: Sequence[Codec]) -> None:
        if not codecs:
            raise ConfigurationError("a chain needs at least one codec")
        self.codecs = list(codecs)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether every link is."""
        return all(codec.unbiased for codec in self.codecs)

    def encode(
        self, payload: Payload, state: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Value]:
        """First codec first."""
        coded = dict(payload)
        for index, codec in enumerate(self.codecs):
            coded = codec.encode(coded, state.setdefault(str(index), {}), rng)
        return coded

    def decode(self, payload: Payload) -> dict[str, Value]:
        """Last codec first."""
        decoded = dict(payload)
        for codec in reversed(self.codecs):
            decoded = codec.decode(decoded)
        return decoded
