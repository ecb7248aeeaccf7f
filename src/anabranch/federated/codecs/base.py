"""What a codec is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import Payload, Value

MARK = "~"
"""Between a tensor's name and what a codec adds to it. No tensor of a method has it in its name."""
WHOLE = "all"
"""Stands for a payload's tensors as one vector."""


class Codec(ABC):
    """Turns a payload into a smaller one and back.

    ``unbiased`` says whether decoding gives the payload on average.
    """

    name: ClassVar[str]
    unbiased: bool = False

    @abstractmethod
    def encode(
        self, payload: Payload, state: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Value]:
        """The payload to send. ``state`` is kept by the sender between messages.

        Raises :class:`PayloadError` for values that have no code, such as NaN.
        """

    @abstractmethod
    def decode(self, payload: Payload) -> dict[str, Value]:
        """The payload as the receiver sees it; :class:`PayloadError` if it is damaged."""

    def omega(self, size: int) -> float:
        """For an unbiased codec: E|C(x) - x|^2 <= omega |x|^2 for ``size`` values.

        Raises :class:`ConfigurationError` for a codec that has no such bound.
        """
        raise ConfigurationError(f"{self!r} is not unbiased, so that it has no variance bound")

    def contraction(self, size: int) -> float:
        """For a biased codec: E|C(x) - x|^2 <= (1 - contraction) |x|^2.

        Raises :class:`ConfigurationError` for a codec that has no such bound.
        """
        raise ConfigurationError(f"{self!r} is not known to contract")

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


class TensorCodec(Codec):
    """Encodes each floating-point tensor ``x`` by itself, as values ``x~<suffix>``."""

    suffixes: ClassVar[tuple[str, ...]]
    """Names of what stands for one tensor."""

    def encode(
        self, payload: Payload, state: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Value]:
        """What stands for each tensor, and all other values as they are."""
        coded: dict[str, Value] = {}
        for key, value in payload.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                for suffix, part in self.shrink(value.detach().cpu(), rng).items():
                    coded[f"{key}{MARK}{suffix}"] = part
            else:
                coded[key] = value
        return coded

    def decode(self, payload: Payload) -> dict[str, Value]:
        """Each tensor again."""
        tensors: dict[str, dict[str, Value]] = {}
        decoded: dict[str, Value] = {}
        for key, value in payload.items():
            owner, mark, suffix = key.rpartition(MARK)
            if mark and suffix in self.suffixes:
                tensors.setdefault(owner, {})[suffix] = value
            else:
                decoded[key] = value
        for owner, parts in tensors.items():
            if parts.keys() != set(self.suffixes):
                raise PayloadError(f"{owner!r} lacks a part of {', '.join(self.suffixes)}")
            decoded[owner] = self.grow(owner, parts)
        return decoded

    @abstractmethod
    def shrink(self, x: Tensor, rng: np.random.Generator) -> dict[str, Value]:
        """What stands for a tensor, by suffix."""

    @abstractmethod
    def grow(self, name: str, parts: Mapping[str, Value]) -> Tensor:
        """The tensor again; :class:`PayloadError` if the parts do not fit together."""


class Identity(Codec):
    """Sends tensors as they are."""

    name = "identity"
    unbiased = True

    def encode(
        self, payload: Payload, state: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Value]:
        """The same payload."""
        return dict(payload)

    def decode(self, payload: Payload) -> dict[str, Value]:
        """The same payload."""
        return dict(payload)

    def omega(self, size: int) -> float:
        """Nothing is lost."""
        return 0.0

    def contraction(self, size: int) -> float:
        """Nothing is lost."""
        return 1.0


def tensor_of(parts: Mapping[str, Value], suffix: str, name: str) -> Tensor:
    """A part that must be a tensor."""
    value = parts[suffix]
    if not isinstance(value, Tensor):
        raise PayloadError(f"{name}{MARK}{suffix} is no tensor")
    return value


def finite(x: Tensor, codec: str) -> Tensor:
    """The tensor, if no value is NaN or infinite."""
    if not x.isfinite().all():
        raise PayloadError(f"{codec} cannot encode a tensor that holds NaN or infinity")
    return x


def floating(payload: Payload) -> tuple[dict[str, Tensor], dict[str, Value]]:
    """The floating-point tensors of a payload, on the CPU and by name, and everything else."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Value] = {}
    for name in sorted(payload):
        value = payload[name]
        if isinstance(value, Tensor) and value.is_floating_point():
            tensors[name] = value.detach().cpu()
        else:
            others[name] = value
    return tensors, others


def with_whole(others: Payload, parts: Mapping[str, Value]) -> dict[str, Value]:
    """A payload with the parts, by suffix, that stand for all its tensors."""
    return {**others, **{f"{WHOLE}{MARK}{suffix}": part for suffix, part in parts.items()}}


def without_whole(
    payload: Payload, suffixes: Sequence[str]
) -> tuple[dict[str, Value], dict[str, Value]]:
    """Everything else and these parts, all or none; :class:`PayloadError` if some are missing."""
    keys = {f"{WHOLE}{MARK}{suffix}": suffix for suffix in suffixes}
    others = {key: value for key, value in payload.items() if key not in keys}
    parts = {suffix: payload[key] for key, suffix in keys.items() if key in payload}
    if 0 < len(parts) < len(keys):
        raise PayloadError(f"the payload lacks one of {', '.join(keys)}")
    return others, parts
