"""One bit a value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from anabranch.federated.codecs import bits, shapes
from anabranch.federated.codecs.base import TensorCodec, finite, tensor_of
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import Value


class Sign(TensorCodec):
    """One bit a value: its sign (0 counts as positive), times the tensor's mean absolute value.

    Biased; use it within error feedback (Karimireddy et al. 2019).
    """

    name = "sign"
    suffixes: ClassVar = ("sign", "sign.mean", "sign.shape")

    def shrink(self, x: Tensor, rng: np.random.Generator) -> dict[str, Value]:
        """Packed signs, mean absolute value, and shape."""
        flat = finite(x, self.name).reshape(-1).to(torch.float64)
        mean = flat.abs().mean() if len(flat) else flat.sum()
        return {
            "sign": bits.pack((flat >= 0).numpy(), 1),
            "sign.mean": mean.to(torch.float32),
            "sign.shape": shapes.describe(x),
        }

    def grow(self, name: str, parts: Mapping[str, Value]) -> Tensor:
        """Plus or minus the mean."""
        dtype, shape = shapes.parse(parts["sign.shape"], name)
        packed, mean = tensor_of(parts, "sign", name), tensor_of(parts, "sign.mean", name)
        if mean.shape != () or not mean.isfinite() or mean < 0:
            raise PayloadError(f"{name!r} has no mean absolute value")
        signs = bits.unpack(packed, 1, math.prod(shape), name)
        values = (2 * signs - 1) * float(mean)
        return torch.from_numpy(values).to(dtype).reshape(shape)

    def contraction(self, size: int) -> float:
        """At least 1 / d, by |x|_1 >= |x|_2."""
        return 1 / max(size, 1)
