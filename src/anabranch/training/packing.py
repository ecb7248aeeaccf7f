"""Where the token sequences of a step go: which micro-batch, which row, which columns. Pure.

A micro-batch is a grid of ``rows`` times ``columns`` tokens. Without packing a row holds one
sequence and padding; with best-fit-decreasing packing it holds as many as fit, one after the
other::

    none            bfd
    a a a a a       a a a a a
    b b b . .       b b b c c
    c c . . .       d d d d .
    d d d d .

Sequences of one item stay in one micro-batch, so that a loss can compare them.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Packing = Literal["none", "bfd"]

ATTENTION_COST = 1 / 2048
"""Cost of a token's attention to one column, relative to the rest of its forward pass. Attention
under a block mask is computed over the whole row, so that wide rows are not free; for a network of
135M parameters attention costs as much as everything else at about 2,000 columns. Causal attention
without a mask computes half of a row."""

MASK_COST = 1.05
"""Cost of a token in a row with a block mask, attention apart: grouped keys are written out for
every query head, which attention without a mask is spared."""

FORWARD_COST = {"cpu": 24.0, "cuda": 4096.0}
"""Cost of starting one more forward and backward pass, in tokens: reading the weights on a
processor, launching kernels on an accelerator."""

LARGEST_GROUP = 256
"""Items that one padded micro-batch may hold; bounds the search."""

WIDTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Row widths to try, in multiples of the longest sequence."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's place: example ``example`` of item ``item`` (index in the step)."""

    item: int
    example: int
    row: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """A micro-batch: its segments in order of item and example, and the grid that they fill."""

    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        """Rows of the grid."""
        return 1 + max(s.row for s in self.segments)

    @property
    def columns(self) -> int:
        """Tokens of the fullest row."""
        return max(s.start + s.length for s in self.segments)

    @property
    def size(self) -> int:
        """Tokens of the grid, padding included."""
        return self.rows * self.columns

    @property
    def packed(self) -> bool:
        """Whether some row holds more than one sequence, which then must not see each other."""
        return len(self.segments) > self.rows

    @property
    def items(self) -> list[int]:
        """Indices of the items in this micro-batch, ascending."""
        return sorted({s.item for s in self.segments})

    @property
    def cost(self) -> float:
        """Cost of the forward pass in tokens, without starting it."""
        return _cost(self.rows, self.columns, self.packed)


def plan_layouts(
    lengths: Sequence[Sequence[int]],
    micro_batch_tokens: int,
    packing: Packing,
    forward_cost: float = FORWARD_COST["cpu"],
) -> list[Layout]:
    """Lay out a step at the least cost. ``lengths[i][e]`` is the length of example e of item i.

    No grid exceeds ``micro_batch_tokens``, unless a single item does; the caller decides whether
    to accept that. ``bfd`` packs where that is cheaper than padding sequences of similar length.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-max(lengths[i]), -sum(lengths[i]), i))
    padded = [
        _one_a_row(group, lengths)
        for group in _similar(order, lengths, micro_batch_tokens, forward_cost)
    ]
    if packing == "none":
        return padded

    def total(layouts: Sequence[Layout]) -> float:
        return sum(layout.cost + forward_cost for layout in layouts)

    packed = _packed(order, lengths, micro_batch_tokens)
    return packed if total(packed) < total(padded) else padded


def _packed(
    order: Sequence[int], lengths: Sequence[Sequence[int]], micro_batch_tokens: int
) -> list[Layout]:
    """The fewest micro-batches of about equal size into which everything packs."""
    size = sum(map(sum, lengths))
    for count in range(max(1, -(-size // micro_batch_tokens)), len(order) + 1):
        layouts = [_pack(group, lengths) for group in _balanced(order, lengths, count)]
        if all(layout.size <= micro_batch_tokens for layout in layouts):
            return layouts
    return [_pack([item], lengths) for item in order]


def _cost(rows: int, columns: int, packed: bool) -> float:
    if packed:
        return rows * columns * (MASK_COST + ATTENTION_COST * columns)
    return rows * columns * (1 + ATTENTION_COST * columns / 2)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most ``capacity``.

    The longest first, each into the fullest bin that still takes it; lengths must be at most
    ``capacity``. Uses at most 11/9 of the fewest bins possible, plus one (Johnson et al., 1974).
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            bins.append([])
            left, target = capacity, len(bins) - 1
        else:
            left, target = room.pop(place)
        bins[target].append(index)
        bisect.insort(room, (left - lengths[index], target))
    return bins


def _similar(
    order: Sequence[int], lengths: Sequence[Sequence[int]], limit: int, forward_cost: float
) -> list[list[int]]:
    """Cut items, the longest first, into groups to be padded, at the least total cost.

    Dynamic programming over the last group: many groups pad little, few start few passes.
    """
    rows = [0, *itertools.accumulate(len(lengths[item]) for item in order)]
    best = [0.0] + [math.inf] * len(order)  # least cost of the first n items
    cut = [0] * (len(order) + 1)
    for start, item in enumerate(order):
        columns = max(lengths[item])
        for stop in range(start + 1, min(start + LARGEST_GROUP, len(order)) + 1):
            height = rows[stop] - rows[start]
            if height * columns > limit and stop > start + 1:
                break
            cost = best[start] + forward_cost + _cost(height, columns, packed=False)
            if cost < best[stop]:
                best[stop], cut[stop] = cost, start
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        groups.append(list(order[cut[stop] : stop]))
        stop = cut[stop]
    return groups[::-1]


def _one_a_row(group: Sequence[int], lengths: Sequence[Sequence[int]]) -> Layout:
    examples = [(i, e) for i in sorted(group) for e in range(len(lengths[i]))]
    return Layout(
        tuple(Segment(i, e, row, 0, lengths[i][e]) for row, (i, e) in enumerate(examples))
    )


def _balanced(
    order: Sequence[int], lengths: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """Items in ``count`` groups of about equal size: the longest first, each into the smallest."""
    groups: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item in order:
        smallest = sizes.index(min(sizes))
        groups[smallest].append(item)
        sizes[smallest] += sum(lengths[item])
    return [group for group in groups if group]


def _pack(group: Sequence[int], lengths: Sequence[Sequence[int]]) -> Layout:
    """The cheapest packing over the widths to try."""
    examples = [(i, e) for i in sorted(group) for e in range(len(lengths[i]))]
    sizes = [lengths[i][e] for i, e in examples]
    widths = sorted({min(int(max(sizes) * w), sum(sizes)) for w in WIDTHS})
    packings = (_place(examples, sizes, best_fit_decreasing(sizes, w)) for w in widths)
    return min(packings, key=lambda layout: layout.cost)


def _place(
    examples: Sequence[tuple[int, int]], sizes: Sequence[int], bins: Sequence[Sequence[int]]
) -> Layout:
    segments = []
    for row, members in enumerate(bins):
        start = 0
        for index in members:
            item, example = examples[index]
            segments.append(Segment(item, example, row, start, sizes[index]))
            start += sizes[index]
    return Layout(tuple(sorted(segments, key=lambda s: (s.item, s.example))))
