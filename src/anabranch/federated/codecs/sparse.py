"""Some values of a payload instead of all: the largest, or random ones."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.codecs import bits, shapes
from anabranch.federated.codecs.base import (
    WHOLE,
    TensorCodec,
    floating,
    tensor_of,
    with_whole,
    without_whole,
)
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import Payload, Value


class _Sparse(TensorCodec):
    """Keeps a share of the values of one vector: all tensors in the order of their names.

    ``per_tensor`` keeps that share of every tensor instead.
    """

    def __init__(self, keep: float = 0.01, per_tensor: bool = False) -> None:
        if not 0 < keep <= 1:
            raise ConfigurationError(f"keep is a share above 0 up to 1, not {keep}")
        self.keep, self.per_tensor = keep, per_tensor

    def kept(self, size: int) -> int:
        """How many of so many values are sent: at least one."""
        return min(size, max(1, math.ceil(self.keep * size)))

    def encode(
        self, payload: Payload, state: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Value]:
        """One vector, its values chosen, and how to cut it into tensors again."""
        if self.per_tensor:
            return super().encode(payload, state, rng)
        tensors, others = floating(payload)
        if not tensors:
            return others
        vectors = [tensor.reshape(-1).to(torch.float32) for tensor in tensors.values()]
        parts = self.shrink(torch.cat(vectors), rng)
        parts[self.suffixes[-1]] = shapes.describe_all(tensors)
        return with_whole(others, parts)

    def decode(self, payload: Payload) -> dict[str, Value]:
        """The tensors, zero where nothing was sent."""
        if self.per_tensor:
            return super().decode(payload)
        decoded, parts = without_whole(payload, self.suffixes)
        if not parts:
            return decoded
        described = shapes.parse_all(parts[self.suffixes[-1]])
        sizes = [math.prod(shape) for _, shape in described.values()]
        vector = self._vector(WHOLE, parts, sum(sizes))
        pieces = torch.split(vector, sizes)
        for (name, (dtype, shape)), piece in zip(described.items(), pieces, strict=True):
            decoded[name] = piece.to(dtype).reshape(shape)
        return decoded

    def grow(self, name: str, parts: Mapping[str, Value]) -> Tensor:
        """One tensor, zero where nothing was sent."""
        dtype, shape = shapes.parse(parts[self.suffixes[-1]], name)
        return self._vector(name, parts, math.prod(shape)).to(dtype).reshape(shape)

    def _vector(self, name: str, parts: Mapping[str, Value], size: int) -> Tensor:
        if size > shapes.LARGEST:
            raise PayloadError(f"{name!r} claims {size} values")
        values = tensor_of(parts, self.suffixes[0], name)
        if values.shape != (self.kept(size),) or not values.is_floating_point():
            raise PayloadError(
                f"{name!r} has {tuple(values.shape)} values; {self.kept(size)} of {size} were due"
            )
        vector = torch.zeros(size, dtype=torch.float64 if values.dtype == torch.float64 else None)
        positions = torch.from_numpy(self._positions(name, parts, size))
        vector[positions] = values.to(vector.dtype) * self._factor(size)
        return vector

    @abstractmethod
    def _positions(self, name: str, parts: Mapping[str, Value], size: int) -> np.ndarray:
        """Where the values belong, int64, each place at most once."""

    def _factor(self, size: int) -> float:
        """By what the values are multiplied."""
        return 1.0


class TopK(_Sparse):
    """The ``keep`` share of largest absolute values, and their places of ``log2(d)`` bits.

    Of equal values the first are kept. Biased; it contracts by ``keep``.
    """

    name = "top_k"
    suffixes: ClassVar = ("top", "top.at", "top.shape")

    def shrink(self, x: Tensor, rng: np.random.Generator) -> dict[str, Value]:
        """The values in order of place, their places, and the shape."""
        flat = x.reshape(-1)
        size = len(flat)
        if flat.isnan().any():
            raise PayloadError("top_k cannot order a tensor that holds NaN")
        # Stable, so that ties are broken by place.
        order = torch.argsort(flat.abs(), descending=True, stable=True)
        places = order[: self.kept(size)].sort().values
        return {
            "top": flat[places],
            "top.at": bits.pack(places.numpy(), bits.width(size)),
            "top.shape": shapes.describe(x),
        }

    def _positions(self, name: str, parts: Mapping[str, Value], size: int) -> np.ndarray:
        packed = tensor_of(parts, "top.at", name)
        places = bits.unpack(packed, bits.width(size), self.kept(size), name)
        if len(places) and (places.max() >= size or (np.diff(places) <= 0).any()):
            raise PayloadError(f"{name!r} has values at places that are not ascending below {size}")
        return places

    def contraction(self, size: int) -> float:
        """The share that is kept."""
        return self.kept(size) / size if size else 1.0


class RandK(_Sparse):
    """A ``keep`` share of random values, scaled up so that the mean is right; places cost a seed.

    Within error feedback use top_k: scaled values would be fed back larger than they were.
    """

    name = "rand_k"
    unbiased = True
    suffixes: ClassVar = ("rand", "rand.seed", "rand.shape")

    def shrink(self, x: Tensor, rng: np.random.Generator) -> dict[str, Value]:
        """The values in order of place, the seed of the places, and the shape."""
        flat = x.reshape(-1)
        seed = int(rng.integers(2**63))
        return {
            "rand": flat[torch.from_numpy(self._draw(seed, len(flat)))],
            "rand.seed": seed,
            "rand.shape": shapes.describe(x),
        }

    def _draw(self, seed: int, size: int) -> np.ndarray:
        chosen = np.random.default_rng(seed).choice(size, self.kept(size), replace=False)
        return np.sort(chosen)

    def _positions(self, name: str, parts: Mapping[str, Value], size: int) -> np.ndarray:
        seed = parts["rand.seed"]
        if type(seed) is not int or seed < 0:
            raise PayloadError(f"{name!r} has no seed")
        return self._draw(seed, size)

    def _factor(self, size: int) -> float:
        return size / self.kept(size) if size else 1.0

    def omega(self, size: int) -> float:
        """d / k - 1."""
        return size / self.kept(size) - 1 if size else 0.0
