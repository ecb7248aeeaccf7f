"""Tensors as integers modulo a power of two, so that sums are exact in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.errors import FederationError

Vector = np.ndarray[Any, np.dtype[Any]]


class OutOfRange(FederationError):
    """A value is too large, or none, for the integers that a secure sum is made of."""


@dataclass(frozen=True)
class FixedPoint:
    """Values are rounded to multiples of ``2 ** -fraction`` and added modulo ``2 ** bits``.

    Rounding moves a value by at most ``2 ** -(fraction + 1)``, and so the weighted mean. The sum
    over ``sites`` sites cannot wrap around while each keeps ``|weight * value| * 2 ** fraction``
    below ``2 ** (bits - 1) / sites``; one that does not is told so instead of being wrong.
    """

    bits: Literal[32, 64] = 64
    fraction: int = 24

    def __post_init__(self) -> None:
        if self.bits not in (32, 64):
            raise ConfigurationError(f"bits is 32 or 64, not {self.bits}")
        if not 1 <= self.fraction < self.bits - 1:
            raise ConfigurationError(
                f"fraction is from 1 to {self.bits - 2} bits, not {self.fraction}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of vectors."""
        return np.dtype(np.uint64 if self.bits == 64 else np.uint32)

    @property
    def wire_dtype(self) -> torch.dtype:
        """The signed type of the same size, which messages have."""
        return torch.int64 if self.bits == 64 else torch.int32

    def encode(self, values: Vector, weight: int, sites: int, what: str = "the update") -> Vector:
        """``weight * values`` [d] as integers; :class:`OutOfRange` if a sum could wrap around."""
        scaled = np.rint(values.astype(np.float64) * 2.0**self.fraction)
        largest = float(np.abs(scaled).max(initial=0.0))
        # A product just below the limit is rounded in float64; one part in 2**40 is kept free.
        limit = 2.0 ** (self.bits - 1) / sites * (1 - 2.0**-40)
        if not largest * max(weight, 1) < limit:  # also if it is NaN
            most = limit / max(weight, 1) / 2.0**self.fraction
            raise OutOfRange(
                f"{what} has a value of {largest / 2.0**self.fraction:g} at weight {weight}; with "
                f"{sites} sites, {self.bits} bits and a fraction of {self.fraction} bits the limit "
                f"is {most:g}"
            )
        return (scaled.astype(np.int64) * weight).astype(self.dtype)

    def decode(self, total: Vector) -> Vector:
        """The sums of ``weight * values`` [d] in float64."""
        signed = total.view(np.int64 if self.bits == 64 else np.int32)
        return signed.astype(np.float64) / 2.0**self.fraction

    def whole(self, number: int, sites: int, what: str) -> Vector:
        """A whole number [1], such as a weight."""
        if not 0 <= number < 2 ** (self.bits - 1) // sites:
            raise OutOfRange(f"{what} is {number}, too large for {self.bits} bits")
        return np.array([number], dtype=self.dtype)

    def to_tensor(self, vector: Vector) -> Tensor:
        """For a message."""
        return torch.from_numpy(vector.view(np.int64 if self.bits == 64 else np.int32))

    def from_tensor(self, tensor: Tensor) -> Vector:
        """From a message."""
        found: Vector = tensor.numpy().view(self.dtype)
        return found


def flatten(tensors: Mapping[str, Tensor]) -> Vector:
    """All values in the order of names, [d], float64."""
    flat = [tensors[name].detach().cpu().to(torch.float64).reshape(-1) for name in sorted(tensors)]
    found: Vector = torch.cat(flat).numpy()
    return found


def unflatten(vector: Vector, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these names, shapes and types from values in the order of names."""
    names = sorted(like)
    pieces = torch.split(torch.from_numpy(vector), [like[name].numel() for name in names])
    return {
        name: piece.reshape(like[name].shape).to(like[name].dtype)
        for name, piece in zip(names, pieces, strict=True)
    }
