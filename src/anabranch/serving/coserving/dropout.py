"""Dropout that is the same whenever a token is computed again.

A forward window and the backward unit that recomputes it must drop the same values, however the
sequence is cut into windows each time. So a mask is not drawn from a running generator: it is a
function of the seed, the optimiser step, the layer and the token's row (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3", the Philox generator).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_WORDS = 8
"""32-bit numbers that one value of Philox's counter gives."""


@dataclass
class AdapterDropout:
    """Masks of one job. ``probability`` is that of a value to be dropped.

    ``first_row`` is the row of the pack at which the call of a :class:`ReplayedDropout` begins.
    """

    probability: float
    seed: int
    shared: dict[str, str]
    """Linear layer -> the one whose mask it uses, because both read the same input once."""
    pack: int = 0
    """Counts the packs of the job: every one has masks of its own."""
    first_row: int = 0

    def drop(self, x: Tensor, layer: int, module: str, first_row: int) -> Tensor:
        """Drop values of rows ``[n, width]`` and scale up the others."""
        module = self.shared.get(module, module)
        key = zlib.crc32(f"{layer}/{module}".encode())
        kept = _uniform(self.seed, (self.pack << 32) + key, first_row, *x.shape)
        mask = torch.from_numpy(kept >= int(self.probability * 2**32)).to(x.device)
        return x * mask / (1 - self.probability)


class ReplayedDropout(nn.Module):
    """Takes the place of ``nn.Dropout`` in an adapter at one linear layer."""

    def __init__(self, dropout: AdapterDropout, layer: int, module: str) -> None:
        super().__init__()
        self._dropout = dropout
        self._layer, self._module = layer, module

    def forward(self, x: Tensor) -> Tensor:
        """``[1, n, width]``."""
        rows = x.flatten(0, -2)
        dropped = self._dropout.drop(rows, self._layer, self._module, self._dropout.first_row)
        return dropped.view_as(x)


def _uniform(seed: int, stream: int, first_row: int, rows: int, width: int) -> Any:
    """32-bit numbers ``[rows, width]`` that depend on their row and column, not on the window."""
    blocks = -(-width // _WORDS)
    generator = np.random.Philox(key=[seed, stream], counter=[first_row * blocks, 0, 0, 0])
    words = generator.random_raw(rows * blocks * _WORDS // 2).view(np.uint32)
    return words.reshape(rows, blocks * _WORDS)[:, :width]
