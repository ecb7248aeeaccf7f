"""How a codec says the shape and type of a tensor that it replaced: ``"f32 64 10"``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from anabranch.federated.errors import PayloadError
from anabranch.federated.payload import DTYPES, Value

LARGEST = 2**33
"""Values of one tensor; a few bytes that claim more are not believed."""


def describe(x: Tensor) -> str:
    """Type and shape as a text."""
    kind = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
    return " ".join([kind, *map(str, x.shape)])


def parse(text: Value, name: str) -> tuple[torch.dtype, list[int]]:
    """Type and shape; :class:`PayloadError` if the text is something else."""
    words = text.split(" ") if isinstance(text, str) else []
    sides = [int(word) for word in words[1:] if word.isdecimal() and len(word) < 12]
    known = bool(words) and words[0] in DTYPES and len(sides) == len(words) - 1
    if not known or len(sides) > 32 or math.prod(sides) > LARGEST:
        raise PayloadError(f"{name!r} has {str(text)[:80]!r} for type and shape")
    if not DTYPES[words[0]].is_floating_point:
        raise PayloadError(f"{name!r} has the type {words[0]}, which is not floating point")
    return DTYPES[words[0]], sides


def describe_all(tensors: Mapping[str, Tensor]) -> str:
    """Types and shapes of several tensors, by name, as JSON."""
    return json.dumps({name: describe(x) for name, x in tensors.items()}, separators=(",", ":"))


def parse_all(text: Value) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Types and shapes again; :class:`PayloadError` if the text is something else, or too much."""
    try:
        read = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise PayloadError("the shapes of a payload's tensors are no JSON object")
    found = {name: parse(value, name) for name, value in read.items()}
    if (values := sum(math.prod(shape) for _, shape in found.values())) > LARGEST:
        raise PayloadError(f"the payload claims {values} values")
    return found
