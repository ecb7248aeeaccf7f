"""Very sparse random projection whose rows belong to nodes, not to positions.

Li, Hastie and Church, "Very sparse random projections" (KDD 2006). The entries are a function of
(seed, node id, column), so that relabelling a graph permutes the rows, a node keeps its row when
others are added, and any shard can be drawn alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

_BLOCK = 2**22
"""Entries drawn at once: 32 MiB of random bits."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def projection(
    ids: NDArray[Any] | int, dim: int, sparsity: float, seed: int, stream: int = 0
) -> sparse.csr_array:
    """R [n, dim] in float32: +-sqrt(sparsity / dim), each with probability 1 / (2 sparsity).

    ``ids`` are the nodes' names, or n for 0..n-1. A larger ``sparsity`` keeps a subset of the
    entries of a smaller one. ``stream`` separates projections of one seed.
    """
    keys = _keys(ids, seed, stream)
    counters = _GOLDEN * np.arange(1, dim + 1, dtype=np.uint64)
    limit = np.uint64(min(int(2**63 / sparsity), 2**63))
    value = np.float32(np.sqrt(sparsity / dim))
    per_block = max(1, _BLOCK // dim)
    rows, columns, signs = [], [], []
    for start in range(0, len(keys), per_block):
        bits = _mix(keys[start : start + per_block, None] + counters)
        # The lowest bit is the sign, the others say whether the entry is there.
        row, column = np.nonzero((bits >> np.uint64(1)) < limit)
        rows.append((row + start).astype(np.int32))
        columns.append(column.astype(np.int32))
        signs.append((bits[row, column] & np.uint64(1)).astype(np.int8))
    if not rows:
        return sparse.csr_array((0, dim), dtype=np.float32)
    data = np.where(np.concatenate(signs) > 0, value, -value)
    where = np.concatenate(rows), np.concatenate(columns)
    return sparse.coo_array((data, where), shape=(len(keys), dim)).tocsr()


def _keys(ids: NDArray[Any] | int, seed: int, stream: int) -> NDArray[np.uint64]:
    """64 well-mixed bits of each node."""
    if isinstance(ids, int):
        numbers = np.arange(ids, dtype=np.uint64)
    elif ids.dtype.kind == "U":
        digests = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
        numbers = np.frombuffer(digests, "<u8").astype(np.uint64)
    else:
        numbers = ids.astype(np.int64).view(np.uint64)
    text = f"{seed} {stream}".encode()
    salt = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), "<u8").astype(np.uint64)
    return _mix(_mix(numbers + _GOLDEN) ^ salt)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
