"""Inner products with random directions instead of a change."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from anabranch.errors import ConfigurationError
from anabranch.federated.codecs import shapes
from anabranch.federated.codecs.base import (
    WHOLE,
    Codec,
    finite,
    floating,
    tensor_of,
    with_whole,
    without_whole,
)
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import Payload, Value
from anabranch.federated.random_projection import FEWEST, RandomProjection


class Projection(Codec):
    """At most ``k`` inner products for each block of tensors, as in Ferret (Shu et al. 2024,
    section 4), for changes of any method.

    The block that changed most is told by ``k``, the others in proportion, by two at least; see
    :class:`~anabranch.federated.random_projection.RandomProjection`. Directions cost a seed.
    Unbiased, and far longer than the change where ``k`` is small: many clients average that out.
    ``FedAvg`` with it is :class:`~anabranch.federated.strategies.ferret.Ferret` without what that
    saves on the way down. Within error feedback use top_k, as for rand_k.
    """

    name = "projection"
    unbiased = True
    suffixes: ClassVar = ("dot", "dot.count", "dot.seed", "dot.shape")

    def __init__(self, k: int = 128) -> None:
        if type(k) is not int or not FEWEST <= k < 2**16:
            raise ConfigurationError(f"k is from {FEWEST} to 65,535 directions a block, not {k!r}")
        self.k = k

    def encode(
        self, payload: Payload, state: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Value]:
        """The inner products of all tensors, and how to rebuild tensors from them."""
        tensors, others = floating(payload)
        if not tensors:
            return others
        seed = int(rng.integers(2**63))
        projection = RandomProjection({n: finite(x, self.name) for n, x in tensors.items()}, self.k)
        products = projection.products(tensors, seed)
        parts: dict[str, Value] = {
            "dot": torch.cat([torch.empty(0), *products]),
            "dot.count": torch.tensor([len(block) for block in products], dtype=torch.uint16),
            "dot.seed": seed,
            "dot.shape": shapes.describe_all(tensors),
        }
        return with_whole(others, parts)

    def decode(self, payload: Payload) -> dict[str, Value]:
        """An estimate of each tensor."""
        decoded, parts = without_whole(payload, self.suffixes)
        if not parts:
            return decoded
        told = tensor_of(parts, "dot", WHOLE)
        counts = tensor_of(parts, "dot.count", WHOLE)
        seed = parts["dot.seed"]
        if told.ndim != 1 or not told.is_floating_point():
            raise PayloadError("inner products are one vector of floating-point numbers")
        if counts.ndim != 1 or counts.dtype != torch.uint16:
            raise PayloadError("numbers of inner products are one vector of 16-bit numbers")
        if type(seed) is not int or seed < 0:
            raise PayloadError("inner products came without the seed of their directions")
        described = shapes.parse_all(parts["dot.shape"])
        projection = RandomProjection(
            {name: torch.empty(shape, device="meta") for name, (_, shape) in described.items()},
            self.k,
        )
        products = projection.split(told.to(torch.float32), counts.tolist())
        found = projection.estimate(products, seed)
        return decoded | {name: found[name].to(kind) for name, (kind, _) in described.items()}

    def omega(self, size: int) -> float:
        """A bound of the sum over blocks of (n_b / k_b) |x_b|^2 / |x|^2.

        An estimate of n values by k products is (n + kurtosis - 2) / k off, kurtosis below 2; the
        largest block counts most, and no block has less than its share of ``k`` rounded down.
        """
        return 1.5 * max(1.0, 3 / self.k) * size / self.k
