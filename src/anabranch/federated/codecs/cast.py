"""Sixteen bits instead of thirty-two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.codecs import shapes
from anabranch.federated.codecs.base import TensorCodec, tensor_of
from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import DTYPES, Value


class Cast(TensorCodec):
    """Sends tensors as float16 or bfloat16, rounded to nearest; too large values are clamped.

    The receiver gets them in the type that they had.
    """

    name = "cast"
    suffixes: ClassVar = ("cast", "cast.type")

    def __init__(self, dtype: Literal["f16", "bf16"] = "bf16") -> None:
        if dtype not in ("f16", "bf16"):
            raise ConfigurationError(f"cast to f16 or bf16, not {dtype!r}")
        self.dtype = dtype

    def shrink(self, x: Tensor, rng: np.random.Generator) -> dict[str, Value]:
        """The tensor with fewer bits, and the name of its own type."""
        target = DTYPES[self.dtype]
        largest = torch.finfo(target).max
        return {
            "cast": x.clamp(-largest, largest).to(target),
            "cast.type": shapes.describe(x).split()[0],
        }

    def grow(self, name: str, parts: Mapping[str, Value]) -> Tensor:
        """In its own type."""
        x, dtype = tensor_of(parts, "cast", name), parts["cast.type"]
        if x.dtype != DTYPES[self.dtype] or not isinstance(dtype, str):
            raise PayloadError(f"{name!r} came as {x.dtype}, not as {self.dtype}")
        return x.to(shapes.parse(dtype, name)[0])
