"""Which items make the next step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from anabranch.training.errors import DataError

Order = Callable[[int], Sequence[int]]
"""``order(epoch)``: indices of that epoch's items. Pure, so that a resumed run agrees."""


def shuffled(count: int, seed: int) -> Order:
    """Every item once an epoch, in an order that depends on seed and epoch only."""

    def order(epoch: int) -> Sequence[int]:
        # One generator, advanced an epoch at a time, would have to be stored; this needs no state.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(count, generator=generator).tolist()

    return order


def in_order(count: int) -> Order:
    """Every item once an epoch, as given."""
    return lambda epoch: range(count)


class Sampler:
    """Walks through epochs in batches; the last batch of an epoch may be smaller.

    ``epoch`` and ``position`` (items drawn in it) are the whole state.
    """

    def __init__(self, order: Order, batch: int) -> None:
        self.epoch = 0
        self.position = 0
        self._order = order
        self._batch = batch
        self._loaded: tuple[int, Sequence[int]] = 0, order(0)
        if not self._loaded[1]:
            raise DataError("there are no items to train on")

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the first epoch."""
        return -(-len(self._order(0)) // self._batch)

    @property
    def at_epoch_end(self) -> bool:
        """Whether the batch drawn last ended its epoch."""
        return self.position >= len(self._epoch_order())

    def next_batch(self) -> list[int]:
        """Indices of the next step's items."""
        if self.position >= len(self._epoch_order()):
            self.epoch, self.position = self.epoch + 1, 0
        batch = self._epoch_order()[self.position : self.position + self._batch]
        if not batch:
            raise DataError(f"the order of epoch {self.epoch} has no items")
        self.position += len(batch)
        return list(batch)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self.epoch, self.position = state["epoch"], state["position"]

    def _epoch_order(self) -> Sequence[int]:
        if self._loaded[0] != self.epoch:
            self._loaded = self.epoch, self._order(self.epoch)
        return self._loaded[1]
