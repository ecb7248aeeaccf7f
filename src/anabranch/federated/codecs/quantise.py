"""Few bits a value, on evenly spaced levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.codecs import bits as packing
from anabranch.federated.codecs import shapes
from anabranch.federated.codecs.base import TensorCodec, finite, tensor_of
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import Value


class Quantise(TensorCodec):
    """``bits`` a value and one float32 a tensor: the norm and its share in ``s`` levels with sign.

    ``s = 2**(bits - 1) - 1``. With ``stochastic`` rounding it is unbiased (QSGD, Alistarh et al.
    2017, section 3.1), otherwise no value is off by more than half a level. ``norm`` ``inf`` is the
    largest value of the tensor, ``l2`` its Euclidean norm, as in QSGD.
    """

    name = "quantise"
    suffixes: ClassVar = ("q", "q.norm", "q.shape")

    def __init__(
        self, bits: int = 8, stochastic: bool = True, norm: Literal["inf", "l2"] = "inf"
    ) -> None:
        if not 2 <= bits <= 16:
            raise ConfigurationError(f"quantise to 2 to 16 bits, not {bits}; sign takes one")
        if norm not in ("inf", "l2"):
            raise ConfigurationError(f"norm is inf or l2, not {norm!r}")
        self.bits, self.stochastic, self.norm = bits, stochastic, norm

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether rounding is stochastic."""
        return self.stochastic

    @property
    def levels(self) -> int:
        """Levels on each side of zero."""
        return 2 ** (self.bits - 1) - 1

    def shrink(self, x: Tensor, rng: np.random.Generator) -> dict[str, Value]:
        """Packed levels, the norm, and the shape."""
        flat = finite(x, self.name).reshape(-1).to(torch.float64).numpy()
        scale = np.float32(0)
        if len(flat):
            largest = np.abs(flat).max() if self.norm == "inf" else np.linalg.norm(flat)
            scale = np.float32(largest)
            if scale < largest:  # rounded down, the largest value would be beyond the last level
                scale = np.nextafter(scale, np.float32(np.inf))
        if not np.isfinite(scale):
            raise PayloadError("quantise cannot encode values beyond the range of float32")
        level = flat / float(scale) * self.levels if scale else np.zeros_like(flat)
        if self.stochastic:
            floor = np.floor(level)
            level = floor + (rng.random(len(level)) < level - floor)
        else:
            level = np.rint(level)
        unsigned = level.astype(np.int64) + self.levels
        return {
            "q": packing.pack(unsigned, self.bits),
            "q.norm": torch.tensor(scale),
            "q.shape": shapes.describe(x),
        }

    def grow(self, name: str, parts: Mapping[str, Value]) -> Tensor:
        """Levels times norm, in the tensor's own type."""
        dtype, shape = shapes.parse(parts["q.shape"], name)
        packed, scale = tensor_of(parts, "q", name), tensor_of(parts, "q.norm", name)
        if scale.shape != () or not scale.isfinite() or scale < 0:
            raise PayloadError(f"{name!r} has no norm")
        unsigned = packing.unpack(packed, self.bits, math.prod(shape), name)
        if len(unsigned) and unsigned.max() > 2 * self.levels:
            raise PayloadError(f"{name!r} has a level beyond {2 * self.levels}")
        values = (unsigned - self.levels) * (float(scale) / self.levels)
        return torch.from_numpy(values).to(dtype).reshape(shape)

    def omega(self, size: int) -> float:
        """Of QSGD, Lemma 3.1: min(d / s^2, sqrt(d) / s); for ``inf`` d / (4 s^2)."""
        if not self.stochastic:
            return super().omega(size)
        s = self.levels
        # A value between two levels has variance of at most a quarter, and |x|_inf <= |x|_2.
        return size / (4 * s**2) if self.norm == "inf" else min(size / s**2, math.sqrt(size) / s)
