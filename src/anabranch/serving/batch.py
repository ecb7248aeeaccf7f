"""A step as data: segments packed without padding, and what comes back.

All arrays are flat. With two sequences, A decoding its 6th token and B prefilling 3 tokens:

    input_ids    [ a5 | b0 b1 b2 ]
    positions    [  5 |  0  1  2 ]
    query_start  [ 0    1          4 ]
    context      [ 6,   3 ]                tokens that each segment's last row attends to
    logits_index [ 0, 3 ]                  rows that reach the language-model head
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from anabranch.serving.sequence import Segment


class PageCopy(NamedTuple):
    """Copy one page's keys and values before the step computes anything."""

    source: int
    target: int


@dataclass(frozen=True)
class PackedBatch:
    """The arrays of one step; N tokens, S segments, R rows that want logits."""

    input_ids: torch.Tensor
    """[N] int64"""
    positions: torch.Tensor
    """[N] int64, position of each token in its sequence"""
    slots: torch.Tensor
    """[N] int64, where each token's keys and values go: ``page * page_size + offset``"""
    query_start: np.ndarray
    """[S + 1] int64, first row of each segment"""
    context: np.ndarray
    """[S] int64, tokens up to and including each segment"""
    block_tables: np.ndarray
    """[S, pages] int64, pages of each sequence in order, padded with 0"""
    logits_index: torch.Tensor
    """[R] int64"""

    @property
    def num_tokens(self) -> int:
        """Rows of the packed batch."""
        return len(self.input_ids)


@dataclass(frozen=True)
class StepPlan:
    """Everything a runner needs for one step."""

    segments: tuple[Segment, ...]
    page_size: int
    page_copies: tuple[PageCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(segment.length for segment in self.segments)

    @property
    def num_context(self) -> int:
        """Tokens attended to, summed over the segments."""
        return sum(segment.stop for segment in self.segments)

    def pack(self) -> PackedBatch:
        """Lay the segments out as arrays."""
        return pack(self.segments, self.page_size)


@dataclass(frozen=True)
class StepResult:
    """What a runner computed. Row r of ``logits`` belongs to the r-th segment that wants logits."""

    logits: torch.Tensor
    """[R, vocabulary]"""
    pooled: dict[int, torch.Tensor]
    """segment index -> [hidden] sum of last hidden states, for pooling requests"""


def pack(segments: SequenceOf[Segment], page_size: int) -> PackedBatch:
    """Pack segments into flat arrays. Costs O(tokens) in numpy and O(segments) in Python."""
    lengths = np.array([segment.length for segment in segments], dtype=np.int64)
    starts = np.array([segment.start for segment in segments], dtype=np.int64)
    query_start = np.concatenate(([0], np.cumsum(lengths)))
    total = int(query_start[-1])

    owner = np.repeat(np.arange(len(segments)), lengths)  # [N] segment of each row
    positions = np.arange(total) - query_start[owner] + starts[owner]
    tokens = chain.from_iterable(s.sequence.tokens[s.start : s.stop] for s in segments)

    width = max(len(segment.sequence.pages) for segment in segments)
    block_tables = np.zeros((len(segments), width), dtype=np.int64)
    for row, segment in enumerate(segments):
        block_tables[row, : len(segment.sequence.pages)] = segment.sequence.pages
    slots = block_tables[owner, positions // page_size] * page_size + positions % page_size

    wanted = [i for i, segment in enumerate(segments) if segment.wants_logits]
    return PackedBatch(
        input_ids=torch.from_numpy(np.fromiter(tokens, dtype=np.int64, count=total)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_start=query_start,
        context=starts + lengths,
        block_tables=block_tables,
        logits_index=torch.from_numpy(query_start[1:][wanted] - 1),
    )
