"""Random directions that have a name: whoever knows the seed has the vector, on every machine.

A value is an entry of a table of 65,536 quantiles, chosen by 16 bits of the counter-based generator
Philox (Salmon et al. 2011). No floating-point arithmetic lies between the bits and the value, so
that processors and libraries cannot disagree, and a table look-up is several times faster than a
normal variate. Each tensor has a stream of its own: tensors may be drawn in any order, or on
different machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.federated.randomness import derive_seed

ENGINE = 1
"""Number of the way from names to values below. Another one makes other models of the same scalars,
so that all parties of a run must have the same."""
VALUE_BITS = 13
"""Values of :func:`normal` are multiples of 2**-13, and below 8."""
_VALUES_AT_ONCE = 2**20


def normal(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Independent standard normal values, float32 of this shape, rounded to ``VALUE_BITS``.

    ``name`` is the tensor's. The largest value is 4.3 standard deviations.
    """
    values = _draw(_standard_normal(), seed, derive_seed(name), math.prod(shape))
    return torch.from_numpy(values).reshape(tuple(shape))


def truncated(seed: int, block: int, rows: int, width: int) -> Iterator[Tensor]:
    """Independent values [rows, width] of mean 0 and variance 1, float32, some rows at a time: a
    normal variable cut off at ``width ** -0.5`` and scaled up (Ferret, Shu et al. 2024, section 4).

    For all but the shortest rows it is uniform between the square roots of 3. The same ``seed`` and
    ``block`` give the same first rows, whatever their number.
    """
    table = _cut_off_normal(width**-0.5)
    philox = _philox(seed, block)
    words = -(-width // 4)
    at_once = max(1, _VALUES_AT_ONCE // width)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        drawn = philox.random_raw(count * words).astype("<u8", copy=False).reshape(count, words)
        yield torch.from_numpy(table.take(drawn.view("<u2")[:, :width]))


def _draw(table: NDArray[np.float32], seed: int, stream: int, count: int) -> NDArray[np.float32]:
    # Each word holds four indices; the lowest bits come first, whatever the machine's byte order.
    words = _philox(seed, stream).random_raw(-(-count // 4)).astype("<u8", copy=False)
    return table.take(words.view("<u2")[:count])


def _philox(seed: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))


@lru_cache(maxsize=1)
def _standard_normal() -> NDArray[np.float32]:
    steps = 2.0**VALUE_BITS
    return (np.round(_quantiles(math.inf) * steps) / steps).astype(np.float32)


@lru_cache(maxsize=64)
def _cut_off_normal(bound: float) -> NDArray[np.float32]:
    return _quantiles(bound).astype(np.float32)


def _quantiles(bound: float) -> NDArray[np.float64]:
    """65,536 quantiles of a normal variable within ``bound``, scaled to mean square 1."""
    below = torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64))
    middles = (torch.arange(2**15, dtype=torch.float64) + 0.5) / 2**16
    lower = torch.special.ndtri(below + middles * (1 - 2 * below)).numpy()
    both = np.concatenate([lower, -lower[::-1]])  # exactly symmetric
    return both / math.sqrt(float(np.square(both).mean()))
