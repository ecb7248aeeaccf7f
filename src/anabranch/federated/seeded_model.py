"""A model that is its base minus a sum of seeded directions, and needs nothing but the scalars.

Scalars are whole multiples of 2**-20 and directions of 2**-13, so their products and sums have no
rounding in float64. The sum therefore does not depend on the order in which it was made: a replica
that replays a year of scalars has the same bits as one that was there, and what was added can be
taken away again without a trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anabranch.federated.errors import AggregationError, FederationError
from anabranch.federated.randomness import derive_seed
from anabranch.federated.seeded_directions import VALUE_BITS, normal
from anabranch.federated.shared import lent

UNIT = 2.0**-20
"""Scalars are counted in these."""
LARGEST = 2.0 ** (53 - VALUE_BITS - 20 - 3)
"""What all scalars together may come to in absolute value, so that no bit of a sum is lost."""
_HELD_VALUES = 2**22
"""A direction of up to so many values is kept until another one is asked for."""


class BaseModelMismatch(FederationError):
    """A site has other base weights than the rest: replaying scalars would give another model."""


class ModelDiverged(AggregationError):
    """Scalars have grown beyond anything that a model can survive."""


class SeededModel:
    """``tensors = start - rate * sum of c z(seed)``.

    ``start`` maps names to tensors of any floating-point type. Keeps float64 sums beside the
    present values. :attr:`tensors` are rounded once, from the exact sum.
    """

    def __init__(self, start: Mapping[str, Tensor], rate: float) -> None:
        for name, tensor in start.items():
            if not tensor.is_floating_point():
                raise FederationError(
                    f"{name} is {tensor.dtype}: directions are added to floating-point weights only"
                )
        self.start = start
        self.rate = rate
        self.sums = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in start.items()}
        self._tensors: dict[str, Tensor] | None = None
        self._held: tuple[int, dict[str, Tensor]] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The present values, of the types of ``start``. Never changed in place."""
        if self._tensors is None:
            self._tensors = {
                name: (tensor.to(torch.float64) - self.rate * self.sums[name]).to(tensor.dtype)
                for name, tensor in self.start.items()
            }
        return self._tensors

    def add(self, seed: int, units: int) -> None:
        """Add ``units * UNIT`` times the direction to the sum; minus the same undoes it exactly."""
        if units:
            for name, direction in self._direction(seed):
                self.sums[name].add_(direction, alpha=units * UNIT)
            self._tensors = None

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from stored :attr:`sums`."""
        self.sums, self._tensors = dict(sums), None

    @contextmanager
    def lend(self, model: nn.Module) -> Iterator[None]:
        """``model`` holds the present values inside, and what it held before afterwards."""
        with lent(model, self.tensors):
            yield

    @torch.no_grad()
    def shift(self, model: nn.Module, seed: int, distance: float) -> None:
        """Let ``model`` hold ``tensors + distance * z(seed)``.

        From untouched values, not from what the model holds: steps there and back would not meet.
        """
        parameters = dict(model.named_parameters())
        values = self.tensors
        for name, direction in self._direction(seed):
            moved = values[name].to(torch.float32).add(direction, alpha=distance)
            parameters[name].copy_(moved)

    def _direction(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        if sum(tensor.numel() for tensor in self.start.values()) > _HELD_VALUES:
            for name, tensor in self.start.items():
                yield name, normal(seed, name, tensor.shape)
            return
        if self._held is None or self._held[0] != seed:
            self._held = seed, {n: normal(seed, n, t.shape) for n, t in self.start.items()}
        yield from self._held[1].items()


class PooledModel(SeededModel):
    """A seeded model whose directions come from a pool of ``k``; the scalars are its version.

    ``pool`` names the seeds; that of direction j is derived from ``pool`` and j.
    """

    def __init__(self, start: Mapping[str, Tensor], rate: float, pool: int, k: int) -> None:
        super().__init__(start, rate)
        self.pool = pool
        self.units: NDArray[np.int64] = np.zeros(k, dtype=np.int64)
        """The scalar of each direction."""

    def seed(self, index: int) -> int:
        """That of a direction."""
        return derive_seed(self.pool, index)

    def step(self, index: int, units: int) -> None:
        """Add to one scalar."""
        self.add(self.seed(index), units)
        self.units[index] += units

    def move_to(self, units: NDArray[np.int64]) -> int:
        """Become the version with these scalars [k]; how many directions differed.

        Only those are drawn: following a run costs what happened since, not the whole pool.
        """
        (different,) = np.nonzero(units != self.units)
        for index in different.tolist():
            self.step(index, int(units[index] - self.units[index]))
        return len(different)


def to_units(scalars: Sequence[float] | NDArray[np.floating]) -> NDArray[np.int64]:
    """Scalars as whole numbers of ``UNIT``.

    :class:`ModelDiverged` if they are not finite or too large to be added exactly.
    """
    values = np.asarray(scalars, dtype=np.float64)
    total = float(np.abs(values).sum())
    if not total <= LARGEST:
        raise ModelDiverged(
            f"the scalars add up to {total:g}, more than {LARGEST:g}: the run has diverged; lower "
            f"its rate"
        )
    return np.rint(values / UNIT).astype(np.int64)


def digest(tensors: Mapping[str, Tensor]) -> int:
    """A number below 2**48 that names tensors, shapes, types and values."""
    found = hashlib.blake2b(digest_size=6)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest(), "little")


def require_same_base(client: str, mine: int, theirs: int) -> None:
    """:class:`BaseModelMismatch` with both digests, if they differ."""
    if mine != theirs:
        raise BaseModelMismatch(
            f"{client} has the base weights {mine:012x}, the run began with {theirs:012x}; give it "
            f"the same model, of the same type and with the same parameters trained"
        )
