"""A micro-batch of token sequences as tensors: the packed grid, its mask, the trained tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.training.example import Item
from anabranch.training.packing import Layout

PADDING = -1
"""Segment number of a cell that holds no token."""


@dataclass(frozen=True)
class SequenceBatch:
    """The grid ``[rows, columns]`` of a layout, and one entry per trained token for the rest.

    ``segments`` numbers the sequences (:data:`PADDING` where there is none); ``positions`` counts
    within each. ``predictors`` are cells of the flattened grid whose output predicts a trained
    token, ``targets`` those tokens; ``item`` and ``example`` say where each belongs. In order of
    item, example, position.
    """

    packed: bool
    input_ids: Tensor
    positions: Tensor
    segments: Tensor
    predictors: Tensor
    targets: Tensor
    item: Tensor
    example: Tensor


def build(
    items: Sequence[Item], layout: Layout, pad_id: int, device: torch.device
) -> SequenceBatch:
    """Fill the grid from a step's ``items``; the batch's ``item`` counts within the layout."""
    shape = layout.rows, layout.columns
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    segments = np.full(shape, PADDING, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    local = {item: index for index, item in enumerate(layout.items)}
    predictors, targets, counts = [], [], []
    for number, place in enumerate(layout.segments):
        example = items[place.item][place.example]
        cells = place.row, slice(place.start, place.start + place.length)
        tokens = np.asarray(example.tokens, dtype=np.int64)
        input_ids[cells] = tokens
        segments[cells] = number
        positions[cells] = np.arange(place.length)
        trained = np.flatnonzero(np.asarray(example.trained, dtype=bool))
        # The output at a position predicts the token after it.
        predictors.append(place.row * layout.columns + place.start + trained - 1)
        targets.append(tokens[trained])
        counts.append(len(trained))

    def per_token(values: list[int]) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.int64), counts)).to(device)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return SequenceBatch(
        packed=layout.packed,
        input_ids=tensor(input_ids),
        positions=tensor(positions),
        segments=tensor(segments),
        predictors=tensor(np.concatenate(predictors)),
        targets=tensor(np.concatenate(targets)),
        item=per_token([local[s.item] for s in layout.segments]),
        example=per_token([s.example for s in layout.segments]),
    )


def block_mask(batch: SequenceBatch, window: int | None = None) -> Tensor:
    """Which cell may attend to which: ``[rows, 1, columns, columns]``, bool.

    A token sees earlier tokens of its own sequence, at most ``window`` of them, itself included.
    Padding sees padding, because a row of a softmax may not be empty.
    """
    columns = batch.segments.shape[1]
    place = torch.arange(columns, device=batch.segments.device)
    distance = place[:, None] - place[None, :]  # [columns, columns], query minus key
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    return (same & visible)[:, None]


def attention_inputs(batch: SequenceBatch, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What the model's forward needs so that packed sequences do not see each other.

    An explicit mask: transformers 5.23 separates sequences by position ids alone only without a
    cache, and not in every attention implementation. Rows of one sequence need none; what follows
    it is padding, which a causal model does not look ahead to.
    """
    if not batch.packed:
        return {}
    text = config.get_text_config()

    def mask(window: int | None) -> Tensor:
        allowed = block_mask(batch, window)
        if text._attn_implementation == "sdpa":
            return allowed
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )

    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        # Models that mix kinds of layers take one mask for each kind.
        masks = {"full_attention": mask(None), "sliding_attention": mask(window)}
        return {"position_ids": batch.positions, "attention_mask": {k: masks[k] for k in kinds}}
    if window is not None and getattr(text, "use_sliding_window", True):
        return {"position_ids": batch.positions, "attention_mask": mask(window)}
    return {"position_ids": batch.positions, "attention_mask": mask(None)}
