"""What all updates of a round have alike, so that each is checked once and then is only numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anabranch.federated.aggregation.tree.aggregator import TYPES, Runs
from anabranch.federated.errors import PayloadError, PayloadMismatch, TopologyError
from anabranch.federated.payload import decode, encode, entry


@dataclass(frozen=True)
class Layout:
    """Names, shapes and types of an update.

    A payload has exactly one encoding, so that all updates begin with the same ``header`` and go on
    with ``size`` bytes of values: ``runs`` of one type each, ``elements`` in all.
    """

    header: bytes
    size: int
    elements: int
    runs: Runs
    like: Mapping[str, Tensor]
    """An empty tensor of each name's shape, on the meta device."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of updates like these; :class:`TopologyError` for what cannot be averaged."""
        runs: list[tuple[str, int]] = []
        for name in sorted(tensors):
            kind = entry(name, tensors[name])[1]
            if kind not in TYPES:
                raise TopologyError(
                    f"aggregators add up {', '.join(TYPES)}; {name!r} is {kind}: use a star"
                )
            count = tensors[name].numel()
            if runs and runs[-1][0] == kind:
                count += runs.pop()[1]
            runs.append((kind, count))
        elements = sum(count for _, count in runs)
        if not elements:
            raise TopologyError("an update without a single value needs no aggregators")
        size = sum(count * TYPES[kind] for kind, count in runs)
        header = encode(tensors)[:-size]
        like = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return cls(header, size, elements, tuple(runs), like)

    def values(self, client: str, body: bytes) -> memoryview:
        """Where the values of a message begin.

        Raises :class:`PayloadError` or :class:`PayloadMismatch` for another message.
        """
        if not body.startswith(self.header) or len(body) != len(self.header) + self.size:
            self._explain(client, decode(body))
        return memoryview(body)[len(self.header) :]

    def check_header(self, client: str, header: bytes, size: int) -> None:
        """The same for a message whose values are not there yet."""
        if header != self.header or size != self.size:
            raise PayloadMismatch(client, "the header", f"that of {self}", "another one")

    def tensors(self, sums: np.ndarray) -> dict[str, Tensor]:
        """Sums [elements] by name, as they were added up."""
        flat, start, found = torch.from_numpy(sums), 0, {}
        for name, like in sorted(self.like.items()):
            found[name] = flat[start : start + like.numel()].reshape(like.shape)
            start += like.numel()
        return found

    def _explain(self, client: str, payload: Mapping[str, object]) -> None:
        for name in sorted(self.like.keys() | payload.keys()):
            expected = _describe(self.like.get(name))
            got = _describe(payload.get(name))
            if expected != got:
                raise PayloadMismatch(client, name, expected, got)
        raise PayloadError(f"the message of {client} is not in its one encoding")

    def __str__(self) -> str:
        return ", ".join(f"{name} {_describe(like)}" for name, like in sorted(self.like.items()))


def _describe(value: object) -> str:
    if value is None:
        return "absent"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"
