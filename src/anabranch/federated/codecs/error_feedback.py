"""What a codec loses is added to the next message."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.codecs.base import Codec
from anabranch.federated.payload import Payload, Value


class ErrorFeedback(Codec):
    """Sends ``C(x + e)`` and keeps ``e = x + e - C(x + e)`` (Seide et al. 2014).

    So the sum of all decoded messages is the sum of all x but for the last ``e``. ``e`` is the
    sender's state, one tensor a name, in the precision of x. For codecs of differences only: a
    message of weights has no use for what the last one lacked.
    """

    name = "error_feedback"

    def __init__(self, codec: Codec) -> None:
        if isinstance(codec, ErrorFeedback):
            raise ConfigurationError("error feedback within error feedback corrects nothing")
        self.codec = codec

    def encode(
        self, payload: Payload, state: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Value]:
        """The code of what is owed; what it misses stays in the state."""
        residual: dict[str, Tensor] = state.setdefault("residual", {})
        owed = {
            name: value.detach().cpu() + residual[name] if name in residual else value
            for name, value in payload.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        coded = self.codec.encode({**payload, **owed}, state.setdefault("inner", {}), rng)
        received = self.codec.decode(coded)
        for name, tensor in owed.items():
            seen = received[name]
            assert isinstance(seen, Tensor)
            residual[name] = tensor.detach().cpu() - seen
        return coded

    def decode(self, payload: Payload) -> dict[str, Value]:
        """As the codec does."""
        return self.codec.decode(payload)
