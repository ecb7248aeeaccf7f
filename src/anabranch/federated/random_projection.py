"""A change of a model as its inner products with random directions that both sides can draw.

Block by block: the relative squared error of a block of n values told by k inner products is about
n / k, so small blocks need few. Errors of different clients and rounds are independent and average
out.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anabranch.federated.errors import FederationError, PayloadError
from anabranch.federated.randomness import derive_seed, generator
from anabranch.federated.seeded_directions import ENGINE, truncated

LARGEST_BLOCK = 2**22
FEWEST = 2
"""Directions of a block that hardly moved."""


class BlockPlanMismatch(FederationError):
    """A site has other blocks or directions than the run: its products mean something else."""


@dataclass(frozen=True)
class Piece:
    """Values ``start`` to ``stop`` of a flattened tensor."""

    name: str
    start: int
    stop: int


class RandomProjection:
    """Inner products of tensors of these shapes with at most ``k`` directions a block (Ferret, Shu
    et al. 2024, section 4; the released code for how blocks are made).

    Tensors, sorted by name, are packed into blocks of up to 0.9 times the median size; a larger one
    is a block of its own, or several of ``LARGEST_BLOCK``. The block that changed most gets ``k``
    directions, the others in proportion to their norms.

    A message is a 2-byte count for each block, then 4 bytes a direction.

    With a ``pool`` all messages share ``k`` directions a block, named by it. Which of them a
    message uses follows from its seed, so that it need not say.
    """

    def __init__(self, tensors: Mapping[str, Tensor], k: int, pool: int | None = None) -> None:
        self.shapes = {name: t.shape for name, t in sorted(tensors.items())}
        self.k, self.pool = k, pool
        self.blocks = _blocks({name: t.numel() for name, t in sorted(tensors.items()) if t.numel()})

    @property
    def layout(self) -> str:
        """Names blocks, ``k`` and how values are drawn: the same message means the same for all."""
        found = hashlib.blake2b(str(ENGINE).encode(), digest_size=6)
        for block in self.blocks:
            found.update(f"{[(p.name, p.start, p.stop) for p in block]};".encode())
        return f"{len(self.blocks)} blocks, k = {self.k}, {found.hexdigest()}"

    def require(self, client: str, theirs: str) -> None:
        """:class:`BlockPlanMismatch` with both layouts, if they differ."""
        if theirs != self.layout:
            raise BlockPlanMismatch(
                f"{client} tells changes by {self.layout}; the run has {theirs}: give it the same "
                f"model, strategy and version of anabranch"
            )

    def products(self, change: Mapping[str, Tensor], seed: int) -> list[Tensor]:
        """The inner products of each block, float32, divided by their number.

        Raises :class:`FederationError` if the change is not finite.
        """
        vectors = [_gather(change, block) for block in self.blocks]
        norms = [float(vector.norm()) for vector in vectors]
        if not all(map(math.isfinite, norms)):
            raise FederationError("the local change holds NaN or infinity; lower the local rate")
        largest = max(1e-8, *norms)
        counts = [max(FEWEST, math.floor(norm / largest * self.k)) for norm in norms]
        told = []
        for index, (vector, count) in enumerate(zip(vectors, counts, strict=True)):
            rows = self._directions(seed, index, count, len(vector))
            told.append(torch.cat([part @ vector for part in rows]) / count)
        return told

    def estimate(self, products: Sequence[Tensor], seed: int) -> dict[str, Tensor]:
        """An unbiased estimate of the change: the sum of ``c_j v_j``, as E[v v'] is the identity.

        In float32 whatever the model is in, so that sums of estimates are rounded to it once.
        """
        estimate = {name: torch.zeros(math.prod(shape)) for name, shape in self.shapes.items()}
        for index, (block, told) in enumerate(zip(self.blocks, products, strict=True)):
            width = _width(block)
            vector, at = torch.zeros(width), 0
            for rows in self._directions(seed, index, len(told), width):
                vector += told[at : at + len(rows)] @ rows
                at += len(rows)
            at = 0
            for piece in block:
                size = piece.stop - piece.start
                estimate[piece.name][piece.start : piece.stop] = vector[at : at + size]
                at += size
        return {name: estimate[name].reshape(shape) for name, shape in self.shapes.items()}

    def encode(self, change: Mapping[str, Tensor], seed: int) -> bytes:
        """The :meth:`products` of a change as a message."""
        return message_of(self.products(change, seed))

    def decode(self, message: bytes, seed: int) -> dict[str, Tensor]:
        """The :meth:`estimate` of a message; :class:`PayloadError` if this is no such message."""
        return self.estimate(self.read(message), seed)

    def read(self, message: bytes) -> list[Tensor]:
        """The inner products of each block; :class:`PayloadError` if there are not as many."""
        head = 2 * len(self.blocks)
        counts = np.frombuffer(message[:head], dtype="<u2") if len(message) >= head else None
        if counts is None or len(message) != head + 4 * int(counts.sum()):
            raise PayloadError(
                f"{len(message)} bytes are not the inner products of {len(self.blocks)} blocks"
            )
        told = torch.from_numpy(np.frombuffer(message[head:], dtype="<f4").astype(np.float32))
        return self.split(told, counts.tolist())

    def split(self, products: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Products of all blocks as those of each; :class:`PayloadError` if they cannot be."""
        if len(counts) != len(self.blocks) or len(products) != sum(counts):
            raise PayloadError(
                f"{len(products)} inner products of {len(counts)} blocks for {len(self.blocks)}"
            )
        if not all(FEWEST <= count <= max(self.k, FEWEST) for count in counts):
            raise PayloadError(f"a block has {FEWEST} to {self.k} directions")
        if not products.isfinite().all():
            raise PayloadError("an inner product is NaN or infinite")
        return list(products.split(list(counts)))

    def clip(self, message: bytes, bound: float) -> tuple[bytes, int]:
        """The message with no ``c_j v_j`` longer than ``bound``, and how many were cut.

        For the length of ``v_j`` its root mean square is taken, ``sqrt(n)``.
        """
        kept, cut = [], 0
        for block, told in zip(self.blocks, self.read(message), strict=True):
            most = bound * _width(block) ** -0.5
            cut += int((told.abs() > most).sum())
            kept.append(told.clamp(-most, most))
        return message_of(kept), cut

    def pooled(self, messages: Iterable[tuple[int, float, bytes]]) -> Tensor:
        """The sum of ``factor * c_j`` for each direction of the pool, float64 [blocks, k].

        ``messages`` are (seed, factor, message).
        """
        total = torch.zeros(len(self.blocks), self.k, dtype=torch.float64)
        for seed, factor, message in messages:
            for index, told in enumerate(self.read(message)):
                total[index, self.chosen(seed, index, len(told))] += factor * told.double()
        return total

    def chosen(self, seed: int, index: int, count: int) -> list[int]:
        """The directions of the pool that a message of this seed uses in a block, ascending."""
        drawn = generator("chosen", seed, index).choice(self.k, count, replace=False)
        return sorted(drawn.tolist())

    def _directions(self, seed: int, index: int, count: int, width: int) -> Iterator[Tensor]:
        if self.pool is None:
            yield from truncated(seed, index, count, width)
            return
        for number in self.chosen(seed, index, count):
            yield from truncated(derive_seed("pool", self.pool, number), index, 1, width)


def message_of(products: Iterable[Tensor]) -> bytes:
    """The message that tells these inner products of each block, float32."""
    told = list(products)
    counts = np.array([len(block) for block in told], dtype="<u2").tobytes()
    return b"".join([counts, *(block.numpy().astype("<f4").tobytes() for block in told)])


def _blocks(sizes: Mapping[str, int]) -> list[Sequence[Piece]]:
    if not sizes:
        return []
    target = int(0.9 * statistics.median(sizes.values()))
    blocks: list[list[Piece]] = []
    room = 0
    for name, size in sizes.items():
        if size <= room:
            blocks[-1].append(Piece(name, 0, size))
            room -= size
            continue
        for start in range(0, size, LARGEST_BLOCK):
            blocks.append([Piece(name, start, min(start + LARGEST_BLOCK, size))])
        room = target - size
    return list(blocks)


def _width(block: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in block)


def _gather(tensors: Mapping[str, Tensor], block: Sequence[Piece]) -> Tensor:
    parts = [tensors[p.name].reshape(-1)[p.start : p.stop].to(torch.float32) for p in block]
    return torch.cat(parts)
