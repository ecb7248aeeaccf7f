"""What an aggregation rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from anabranch.federated.errors import EmptyRound, PayloadMismatch, TooFewUpdates

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Aggregate:
    """What a rule made of p updates: ``update`` [d], and a score for each, [p], if it has any.

    A higher score means a more trusted update.
    """

    update: Tensor
    scores: Tensor | None = None


@dataclass(frozen=True)
class Combined:
    """The same by name: one tensor for each name, scores by client, and clients left out because
    their update was not finite.
    """

    tensors: dict[str, Tensor]
    scores: dict[str, float] = field(default_factory=dict)
    removed: tuple[str, ...] = ()


class Rule(ABC):
    """Combines updates. Options are constructor arguments.

    Either call it on a matrix of updates, or :meth:`fold` named tensors one by one and
    :meth:`finish`. Updates of weight 0 do not count.
    """

    name: ClassVar[str]
    associative: ClassVar[bool] = False
    """Whether accumulators may be merged as soon as they are there."""
    needs_differences: ClassVar[bool] = False
    """Whether updates must be changes of the model: the direction of weights means nothing."""

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Aggregate:
        """Combine finite ``rows`` [p, d] with ``weights`` [p] > 0 (default: all 1).

        Raises :class:`TooFewUpdates` if p is below :attr:`minimum`.
        """
        if len(rows) < self.minimum:
            raise TooFewUpdates(self.name, len(rows), self.minimum, self.tolerates)
        if weights is None:
            weights = torch.ones(len(rows), dtype=torch.float64)
        return self.combine(rows, weights.to(torch.float64))

    @abstractmethod
    def combine(self, rows: Tensor, weights: Tensor) -> Aggregate:
        """Combine [p, d]; there are at least :attr:`minimum` rows. ``weights`` is float64."""

    @property
    def minimum(self) -> int:
        """Fewest updates that it works with."""
        return 1

    @property
    def tolerates(self) -> int:
        """Bad updates that it was told to withstand; 0 if it has no such option."""
        return 0

    def settings(self) -> dict[str, Any]:
        """Name and options as JSON values."""
        return {"name": self.name, **vars(self)}

    def fold(self, acc: Any, tensors: Tensors, weight: float, client: str) -> Any:
        """Add an update to an accumulator (None: a new one)."""
        acc = acc or {"clients": [], "weights": [], "updates": []}
        if weight > 0:
            acc["clients"].append(client)
            acc["weights"].append(float(weight))
            acc["updates"].append(dict(tensors))
        return acc

    def merge(self, one: Any, other: Any) -> Any:
        """Join two accumulators."""
        return {key: one[key] + other[key] for key in one}

    def finish(self, acc: Any) -> Combined:
        """Combine what was folded, leaving out updates that hold NaN or infinity.

        Raises :class:`EmptyRound` if nothing is left, :class:`TooFewUpdates` if too little is.
        """
        if acc is None or not acc["clients"]:
            raise EmptyRound(f"{self.name} got no update with a weight above 0")
        shapes = {name: tensor.shape for name, tensor in acc["updates"][0].items()}
        rows = [
            flatten(update, shapes, client)
            for update, client in zip(acc["updates"], acc["clients"], strict=True)
        ]
        good = [i for i, row in enumerate(rows) if bool(row.isfinite().all())]
        removed = tuple(c for i, c in enumerate(acc["clients"]) if i not in set(good))
        if not good:
            raise EmptyRound(f"no update is finite; clients: {', '.join(removed)}")
        clients = [acc["clients"][i] for i in good]
        weights = torch.tensor([acc["weights"][i] for i in good], dtype=torch.float64)
        made = self(torch.stack([rows[i] for i in good]), weights)
        scores = (
            {} if made.scores is None else dict(zip(clients, made.scores.tolist(), strict=True))
        )
        return Combined(unflatten(made.update, acc["updates"][0]), scores, removed)


def flatten(tensors: Tensors, shapes: Mapping[str, torch.Size], client: str) -> Tensor:
    """All values in the order of names, [d], float32 (float64 if a tensor is).

    Raises :class:`PayloadMismatch` naming the tensor that is missing or has another shape.
    """
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors or name not in shapes or tensors[name].shape != shapes[name]:
            expected = f"a tensor {list(shapes[name])}" if name in shapes else "absent"
            got = f"a tensor {list(tensors[name].shape)}" if name in tensors else "absent"
            raise PayloadMismatch(client, name, expected, got)
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if double else torch.float32
    flat = [tensors[name].reshape(-1).to(dtype) for name in sorted(tensors)]
    return torch.cat(flat) if flat else torch.empty(0, dtype=dtype)


def unflatten(vector: Tensor, like: Tensors) -> dict[str, Tensor]:
    """Tensors of these names, shapes and types from a vector in the order of names."""
    names = sorted(like)
    pieces = torch.split(vector, [like[name].numel() for name in names])
    return {
        name: piece.reshape(like[name].shape).to(like[name].dtype)
        for name, piece in zip(names, pieces, strict=True)
    }
