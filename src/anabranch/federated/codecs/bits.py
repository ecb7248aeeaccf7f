"""Whole numbers of a few bits, packed without gaps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anabranch.federated.errors import PayloadError

_CHUNK = 1 << 18
"""Numbers unpacked at a time: a bit is a byte meanwhile. A multiple of 8."""


def pack(values: np.ndarray, bits: int) -> Tensor:
    """Numbers from 0 to 2**bits - 1 as ``ceil(bits * n / 8)`` bytes."""
    if bits == 8:
        return torch.from_numpy(values.astype(np.uint8))
    shifts = np.arange(bits, dtype=np.int64)
    pieces = [np.empty(0, dtype=np.uint8)]
    for start in range(0, len(values), _CHUNK):
        piece = values[start : start + _CHUNK].astype(np.int64)[:, None] >> shifts & 1
        pieces.append(np.packbits(piece.astype(np.uint8).reshape(-1), bitorder="little"))
    return torch.from_numpy(np.concatenate(pieces))


def unpack(packed: Tensor, bits: int, count: int, name: str) -> np.ndarray:
    """``count`` numbers, int64; :class:`PayloadError` if the bytes are not so many."""
    if packed.dtype != torch.uint8 or packed.ndim != 1 or len(packed) != size(count, bits):
        raise PayloadError(
            f"{name!r} has {tuple(packed.shape)} bytes for {count} numbers of {bits} bits"
        )
    data = packed.numpy()
    if bits == 8:
        return data.astype(np.int64)
    weights = np.int64(1) << np.arange(bits, dtype=np.int64)
    pieces = [np.empty(0, dtype=np.int64)]
    step = _CHUNK * bits // 8
    for start in range(0, len(data), step):
        flat = np.unpackbits(data[start : start + step], bitorder="little")
        whole = len(flat) // bits
        pieces.append(flat[: whole * bits].reshape(whole, bits).astype(np.int64) @ weights)
    return np.concatenate(pieces)[:count]


def size(count: int, bits: int) -> int:
    """Bytes of so many numbers."""
    return -(-count * bits // 8)


def width(count: int) -> int:
    """Bits of the numbers below ``count``."""
    return max(1, (count - 1).bit_length())
