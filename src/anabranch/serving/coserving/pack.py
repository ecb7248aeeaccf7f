"""Sequences of one optimiser step that pass the model together, and what is kept of them.

The tokens of all sequences lie side by side, so that one backward unit covers short sequences
together. With sequences of 5, 3 and 6 tokens, row 6 is the second token of the second one:

    rows        0 1 2 3 4 | 5 6 7 | 8 9 10 11 12 13
    positions   0 1 2 3 4 | 0 1 2 | 0 1 2 3 4 5
    starts      0           5       8                14

Keys and values stay in pages of the cache that no request can take; everything else that the
backward pass reads is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from anabranch.serving.adapters import ServedAdapter
from anabranch.serving.coserving.dropout import AdapterDropout
from anabranch.serving.sequence import Request, Segment
from anabranch.serving.sequence import Sequence as TokenSequence
from anabranch.training.example import Example


@dataclass(frozen=True)
class Span:
    """Rows ``[start, stop)`` of a pack that belong to one sequence, which begins at row ``first``.

    ``start - first`` tokens of the sequence come before.
    """

    sequence: int
    first: int
    start: int
    stop: int


class Pack:
    """Keeps the inputs of the layers from ``lowest`` on, and the last norm's as ``layers``.

    ``pages`` are those of each example. ``products`` are linear layers whose outputs are kept, so
    that they are not computed again.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pages: Sequence[list[int]],
        adapter: ServedAdapter,
        hidden: int,
        layers: int,
        lowest: int = 0,
        products: frozenset[str] = frozenset(),
        dropout: AdapterDropout | None = None,
        name: str = "finetune",
    ) -> None:
        self.examples = list(examples)
        self.starts = [0, *accumulate(len(example) for example in examples)]
        self.rows = self.starts[-1]
        self.positions = torch.cat([torch.arange(len(example)) for example in examples])
        self.predictors, self.targets = _predictions(examples, self.starts)
        self.inputs: dict[int, Tensor] = {
            layer: torch.empty(self.rows, hidden) for layer in range(lowest, layers + 1)
        }
        """Layer -> ``[rows, hidden]``."""
        self.outputs: dict[tuple[int, str], Tensor] = {}
        """Layer and linear layer -> ``[rows, outputs]``."""
        self.sequences = [
            TokenSequence(
                Request(f"{name}/{number}", example.tokens, adapter=adapter),
                0,
                list(example.tokens),
                max_tokens=0,
                pages=own,
                recorder=_Rows(self, start, products, dropout),
            )
            for number, (example, own, start) in enumerate(
                zip(examples, pages, self.starts, strict=False)
            )
        ]

    @property
    def computed(self) -> int:
        """Rows that have passed the model; sequences pass it in order."""
        return sum(sequence.num_computed for sequence in self.sequences)

    def segments(self, tokens: int) -> list[Segment]:
        """The next ``tokens`` tokens to compute."""
        segments = []
        for sequence in self.sequences:
            take = min(sequence.num_pending, tokens)
            if take > 0:
                start = sequence.num_computed
                segments.append(Segment(sequence, start, start + take))
                tokens -= take
        return segments

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """The sequences in rows ``[start, stop)``; only the first can have rows before them."""
        for number, (first, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if first < stop and start < end:
                yield Span(number, first, max(first, start), min(end, stop))

    @property
    def bytes(self) -> int:
        """Memory of what is kept here, without the pages."""
        return sum(t.nbytes for t in (*self.inputs.values(), *self.outputs.values()))


class _Rows:
    """Records one sequence of a pack; see :class:`~anabranch.serving.sequence.Recorder`."""

    def __init__(
        self,
        pack: Pack,
        first: int,
        products: frozenset[str],
        dropout: AdapterDropout | None,
    ) -> None:
        self.products = products
        self.drops = dropout is not None
        self._pack = pack
        self._first = first
        self._dropout = dropout

    def begin(self, start: int) -> None:
        if self._dropout is not None:
            self._dropout.first_row = self._first + start

    def layer_input(self, layer: int, start: int, rows: Tensor) -> None:
        kept = self._pack.inputs.get(layer)
        if kept is not None:
            kept[self._first + start :][: len(rows)] = rows

    def product(self, layer: int, module: str, start: int, rows: Tensor) -> None:
        pack = self._pack
        if layer not in pack.inputs:
            return
        if (layer, module) not in pack.outputs:
            with torch.inference_mode(False):
                pack.outputs[layer, module] = torch.empty(pack.rows, rows.shape[1])
        pack.outputs[layer, module][self._first + start :][: len(rows)] = rows

    def dropped(self, layer: int, module: str, start: int, rows: Tensor) -> Tensor:
        assert self._dropout is not None
        return self._dropout.drop(rows, layer, module, self._first + start)


def _predictions(examples: Sequence[Example], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows that predict a trained token, and these tokens, both ``[trained]``."""
    predictors, targets = [], []
    for example, start in zip(examples, starts, strict=False):
        trained = np.flatnonzero(np.asarray(example.trained, dtype=bool))
        predictors.append(trained + start - 1)
        targets.append(np.asarray(example.tokens, dtype=np.int64)[trained])
    return torch.from_numpy(np.concatenate(predictors)), torch.from_numpy(np.concatenate(targets))
