"""Many LoRA adapters in one packed batch, for the fused runner.

Each adapter is kept as pairs of matrices in the order in which the kernel reads them, one pair for
each linear layer of the model, also where several layers are packed into one. A step computes the
base for all rows at once and adds to each row what its own adapter says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from anabranch.errors import AdapterError
from anabranch.serving.adapters import LowRank
from anabranch.serving.sequence import Segment

BLOCK = 12
"""Rows of one task of the kernel."""
LANES = 16


@dataclass(frozen=True)
class Site:
    """One packed linear layer: the modules in it, with their outputs side by side.

    ``names`` are the modules' names within their decoder layer.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    inputs: int
    widths: tuple[int, ...]

    @cached_property
    def offsets(self) -> list[int]:
        """First output column of each module."""
        return np.concatenate(([0], np.cumsum(self.widths)[:-1])).tolist()


@dataclass(frozen=True, eq=False)
class FusedAdapter:
    """For each site, for each of its modules: A and B, scaled, as ``add_lora`` reads them."""

    a: list[list[Tensor]]
    b: list[list[Tensor]]

    @classmethod
    def pack(
        cls, layers: Mapping[str, LowRank], sites: Sequence[Site], dtype: torch.dtype, where: str
    ) -> FusedAdapter:
        """Raises :class:`AdapterError`, beginning with ``where``, for other layers or shapes."""
        left = dict(layers)
        packed = cls([], [])
        for site in sites:
            packed.a.append([])
            packed.b.append([])
            for module, width in zip(site.modules, site.widths, strict=True):
                found = left.pop(module, None)
                if found is None:
                    a, b = torch.zeros(site.inputs, 0), torch.zeros(0, width)
                else:
                    a, b = found.a.float().T, found.b.float().T * found.scaling
                if (len(a), b.shape[1]) != (site.inputs, width):
                    raise AdapterError(
                        f"{where} was made for another model: {module} maps "
                        f"{len(a)} to {b.shape[1]} channels there, {site.inputs} to {width} here"
                    )
                pad = -a.shape[1] % LANES
                packed.a[-1].append(torch.nn.functional.pad(a, (0, pad)).to(dtype).contiguous())
                b = torch.nn.functional.pad(b, (0, 0, 0, pad)).to(dtype)
                tile = 4 * LANES if width % (4 * LANES) == 0 else LANES
                packed.b[-1].append(b.unflatten(1, (-1, tile)).transpose(0, 1).contiguous())
        if left:
            raise AdapterError(
                f"{where} changes {sorted(left)[0]}, which this runner does not know or cannot "
                f"adapt"
            )
        return packed

    @property
    def memory(self) -> int:
        """Bytes of all matrices."""
        return sum(m.nbytes for matrices in (self.a, self.b) for site in matrices for m in site)


class LoraBatch:
    """The adapters of one step, and which rows are whose."""

    def __init__(self, adapters: Sequence[FusedAdapter], blocks: Tensor) -> None:
        self.adapters = tuple(adapters)
        self.blocks = blocks
        sites = range(len(adapters[0].a))
        self.a = [[m for adapter in adapters for m in adapter.a[site]] for site in sites]
        self.b = [[m for adapter in adapters for m in adapter.b[site]] for site in sites]

    @classmethod
    def of(
        cls, segments: Sequence[Segment], query_start: np.ndarray, last: LoraBatch | None
    ) -> LoraBatch | None:
        """None if no segment has an adapter. ``last`` is reused if it has the same adapters."""
        index: dict[FusedAdapter, int] = {}
        blocks = []
        for number, segment in enumerate(segments):
            adapter = segment.sequence.request.adapter
            if adapter is None:
                continue
            slot = index.setdefault(adapter.handle, len(index))
            start, stop = int(query_start[number]), int(query_start[number + 1])
            blocks += [(at, min(at + BLOCK, stop), slot) for at in range(start, stop, BLOCK)]
        if not index:
            return None
        rows = torch.tensor(blocks)
        if last is not None and last.adapters == tuple(index):
            last.blocks = rows
            return last
        return cls(tuple(index), rows)
