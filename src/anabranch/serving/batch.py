"""A step as data: segments packed without padding, and what comes back.

All arrays are flat. With two sequences, A decoding its 6th token and B prefilling 3 tokens:

    input_ids    [ a5 | b0 b1 b2 ]
    positions    [  5 |  0  1  2 ]
    query_start  [ 0    1          4 ]
    context      [ 6,   3 ]                tokens that each segment's last row attends to
    logits_index [ 0, 3 ]                  rows that reach the language-model head
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """[N] int64, position of each token in its sequence, as the model is told"""
    slots: torch.Tensor
    """[N] int64, where each token's keys and values go: ``page * page_size + offset``"""
    query_start: np.ndarray
    """[S + 1] int64, first row of each segment"""
    context: np.ndarray
    """[S] int64, places in the sequence up to and including each segment"""
    block_tables: np.ndarray
    """[S, pages] int64, pages of each sequence in order, padded with 0"""
    logits_index: torch.Tensor
    """[R] int64"""
    trees: Trees | None = None
    """None if every row sees all that lies before it in its sequence"""

    @property
    def num_tokens(self) -> int:
        """Rows of the packed batch."""
        return len(self.input_ids)


class Trees(NamedTuple):
    """What the rows of drafted trees see."""

    visible: torch.Tensor
    """[N] int64: bit j is set if a row sees node j of its tree; -1 for rows of no tree"""
    roots: torch.Tensor
    """[S] int64: the place in the sequence at which node 0 lies; ``context`` if there is no tree"""


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
        return sum(segment.context for segment in self.segments)

    def pack(self) -> PackedBatch:
        """Lay the segments out as arrays."""
        return pack(self.segments, self.page_size)


@dataclass(frozen=True)
class StepResult:
    """What a runner computed."""

    logits: torch.Tensor
    """[R, vocabulary]: ``num_logits`` rows of the first segment, then those of the next"""
    pooled: dict[int, torch.Tensor]
    """segment index -> [hidden] sum of last hidden states, for pooling requests"""


def pack(segments: SequenceOf[Segment], page_size: int) -> PackedBatch:
    """Pack segments into flat arrays. Costs O(tokens) in numpy and O(segments) in Python."""
    lengths = np.array([segment.length for segment in segments], dtype=np.int64)
    context = np.array([segment.context for segment in segments], dtype=np.int64)
    query_start = np.concatenate(([0], np.cumsum(lengths)))
    total = int(query_start[-1])

    owner = np.repeat(np.arange(len(segments)), lengths)  # [N] segment of each row
    places = np.arange(total) - query_start[owner] + (context - lengths)[owner]
    tokens = chain.from_iterable(map(_tokens, segments))

    width = max(len(segment.sequence.pages) for segment in segments)
    block_tables = np.zeros((len(segments), width), dtype=np.int64)
    for row, segment in enumerate(segments):
        block_tables[row, : len(segment.sequence.pages)] = segment.sequence.pages
    slots = block_tables[owner, places // page_size] * page_size + places % page_size

    wanted = np.array([segment.num_logits for segment in segments], dtype=np.int64)
    before = np.cumsum(wanted) - wanted  # rows of logits before each segment's own
    logits_index = np.arange(wanted.sum()) + np.repeat(query_start[1:] - wanted - before, wanted)
    positions, trees = _lay_out_trees(segments, places, query_start, context)
    return PackedBatch(
        input_ids=torch.from_numpy(np.fromiter(tokens, dtype=np.int64, count=total)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_start=query_start,
        context=context,
        block_tables=block_tables,
        logits_index=torch.from_numpy(logits_index),
        trees=trees,
    )


def _tokens(segment: Segment) -> Iterable[int]:
    own = segment.sequence.tokens[segment.start : segment.stop]
    return own if segment.draft is None else chain(own, segment.draft.tokens[segment.first_node :])


def _lay_out_trees(
    segments: SequenceOf[Segment], places: np.ndarray, query_start: np.ndarray, context: np.ndarray
) -> tuple[np.ndarray, Trees | None]:
    """Positions of the rows, which differ from their places in trees, and what they see."""
    trees = [
        (index, segment)
        for index, segment in enumerate(segments)
        if segment.draft is not None and segment.draft.parents is not None
    ]
    if not trees:
        return places, None
    positions, roots = places.copy(), context.copy()
    visible = np.full(len(places), -1, dtype=np.int64)
    for index, segment in trees:
        assert segment.draft is not None
        stop = query_start[index + 1]
        rows = slice(stop - segment.num_nodes, stop)
        depths = segment.draft.depths[segment.first_node :]
        positions[rows] = segment.stop - 1 + np.array(depths, dtype=np.int64)
        visible[rows] = segment.draft.visible[segment.first_node :]
        roots[index] = segment.stop
    return positions, Trees(torch.from_numpy(visible), torch.from_numpy(roots))
