"""Attention over a paged cache for a ragged batch, in plain PyTorch.

Transformers models call :func:`ragged_attention` once per layer, through ``AttentionInterface``,
with queries, keys and values of all segments packed in one row. The plan of the pass says what is
done with them. A :class:`PagedPlan` writes the new keys and values to their pages, then attends
group by group: segments of similar query length and context share one padded call, so that 200
decoding streams cost a few calls and not 200.

A layer's cache is ``[kv_heads, pages, page_size, head_dim]``: the heads come first so that
gathering a sequence's pages is a single copy of whole pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from anabranch.serving.batch import PackedBatch

NAME = "anabranch_ragged"
"""Key under which transformers finds this attention."""


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, ``[kv_heads, pages, page_size, head_dim]`` each."""

    keys: Tensor
    values: Tensor

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``[kv_heads, tokens, head_dim]`` at slots ``[tokens]``."""
        self.keys.flatten(1, 2).index_copy_(1, slots, keys.to(self.keys.dtype))
        self.values.flatten(1, 2).index_copy_(1, slots, values.to(self.values.dtype))

    def read(self, pages: Tensor, segments: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[segments, kv_heads, pages * page_size, head_dim]`` of a group."""
        return _gather(self.keys, pages, segments), _gather(self.values, pages, segments)


class GroupTrees(NamedTuple):
    """What the queries of a group see of drafted trees; see :class:`Trees`."""

    positions: Tensor
    """[S, Q], which are not their places"""
    visible: Tensor
    """[S, Q]"""
    roots: Tensor
    """[S]"""

    def sees(self, keys: Tensor) -> Tensor:
        """Whether a query's tree lets it see each of ``keys [K]``: ``[S, Q, K]``."""
        nodes = keys - self.roots[:, None]  # [S, K]
        bits = self.visible[:, :, None] >> nodes.clamp(0, 63)[:, None] & 1
        return (nodes < 0)[:, None] | (bits == 1)


@dataclass
class Group:
    """Segments of similar shape, padded to ``[S, Q]`` queries and ``[S, K]`` keys."""

    rows: Tensor
    """[S * Q] packed row of each query; padding repeats the segment's last row"""
    valid: Tensor
    """[S * Q] bool, False for padding"""
    pages: Tensor
    """[S * pages] flattened block tables"""
    places: Tensor
    """[S, Q] place of each query among its sequence's keys"""
    num_keys: int
    trees: GroupTrees | None = None
    masks: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, repeats: int, dtype: torch.dtype) -> Tensor:
        """Additive mask ``[S, 1, repeats * Q, K]``, made once per step for all layers."""
        key = (window, repeats, dtype)
        if key not in self.masks:
            keys = torch.arange(self.num_keys, device=self.places.device)
            visible = self.places[:, :, None] >= keys  # [S, Q, K]
            positions = self.places
            if self.trees is not None:
                visible &= self.trees.sees(keys)
                positions = self.trees.positions
            if window is not None:
                visible &= positions[:, :, None] - keys < window
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask.masked_fill_(~visible, float("-inf"))
            self.masks[key] = mask.repeat(1, repeats, 1)[:, None]
        return self.masks[key]


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks of its attention, after the rotation."""

    layer: int
    query: Tensor
    """``[1, heads, N, D]``"""
    key: Tensor
    """``[1, kv_heads, N, D]``"""
    value: Tensor
    """``[1, kv_heads, N, D]``"""
    scaling: float | None
    window: int | None
    """How many tokens a query sees; None for all."""
    softcap: float | None


class AttentionPlan(ABC):
    """How the layers attend in one pass; reaches the attention function as ``plan=``."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Returns ``[1, N, heads, D]``."""


@dataclass
class PagedPlan(AttentionPlan):
    """Write the keys and values of a step to their pages, and attend to whole contexts."""

    slots: Tensor
    groups: list[Group]
    caches: list[LayerCache]

    def attend(self, call: AttentionCall) -> Tensor:
        """Segments never see each other."""
        query, value = call.query, call.value
        cache = self.caches[call.layer]
        cache.write(self.slots, call.key[0], value[0])

        heads, tokens = query.shape[1:3]
        kv_heads = call.key.shape[1]
        repeats = heads // kv_heads
        output = query.new_empty(tokens, heads, value.shape[3])
        for group in self.groups:
            segments, width = group.places.shape
            rows = query[0].transpose(0, 1)[group.rows]  # [S * Q, heads, head_dim]
            # Query heads that share a key head become further queries of it: keys are not repeated.
            grouped = rows.view(segments, width, kv_heads, repeats, -1)
            grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [S, kv_heads, repeats * Q, D]
            keys, values = cache.read(group.pages, segments)
            mask = group.mask(call.window, repeats, query.dtype)
            attended = attention(grouped, keys.to(query), values.to(query), mask, call)
            attended = attended.unflatten(2, (repeats, width)).permute(0, 3, 1, 2, 4)
            attended = attended.reshape(segments * width, heads, -1)  # [S * Q, heads, head_dim]
            output[group.rows[group.valid]] = attended[group.valid]
        return output[None]


def make_plan(batch: PackedBatch, page_size: int, caches: list[LayerCache]) -> PagedPlan:
    """Group a batch's segments by powers of two of query length and of pages."""
    lengths = np.diff(batch.query_start)
    num_pages = -(-batch.context // page_size)
    keys = np.stack([_ceil_log2(lengths), _ceil_log2(num_pages)], axis=1)
    device = batch.positions.device
    groups = []
    for key in np.unique(keys, axis=0):
        members = np.flatnonzero((keys == key).all(axis=1))
        width, depth = int(lengths[members].max()), int(num_pages[members].max())
        offsets = np.minimum(np.arange(width), lengths[members, None] - 1)  # [S, Q]
        valid = np.arange(width) < lengths[members, None]
        rows = batch.query_start[members, None] + offsets
        starts = batch.context[members] - lengths[members]
        trees = None
        if batch.trees is not None:
            index = torch.from_numpy(rows)
            visible, roots = batch.trees.visible[index], batch.trees.roots[members]
            trees = GroupTrees(batch.positions[index], visible, roots)
            trees = GroupTrees(*(part.to(device) for part in trees))
        groups.append(
            Group(
                rows=torch.from_numpy(rows.reshape(-1)).to(device),
                valid=torch.from_numpy(valid.reshape(-1)).to(device),
                pages=torch.from_numpy(batch.block_tables[members, :depth].reshape(-1)).to(device),
                places=torch.from_numpy(starts[:, None] + offsets).to(device),
                num_keys=depth * page_size,
                trees=trees,
            )
        )
    return PagedPlan(batch.slots, groups, caches)


def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention function for transformers' ``AttentionInterface``.

    See :class:`AttentionCall` for the shapes.
    """
    if plan is None:
        raise RuntimeError(
            "this model belongs to a serving engine and runs only through it; "
            "load another copy to call it directly"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    call = AttentionCall(layer, query, key, value, scaling, sliding_window, softcap)
    return plan.attend(call), None


AttentionInterface.register(NAME, ragged_attention)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, call: AttentionCall
) -> Tensor:
    """Plain attention ``[S, heads, Q, D]`` under an additive mask, with Gemma's capped scores."""
    if call.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scaling)
    scores = query @ key.transpose(2, 3) * (call.scaling or query.shape[-1] ** -0.5)
    scores = call.softcap * torch.tanh(scores / call.softcap) + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _gather(cache: Tensor, pages: Tensor, segments: int) -> Tensor:
    kv_heads, _, _, head_dim = cache.shape
    gathered = cache.index_select(1, pages)  # [kv_heads, S * pages, page_size, head_dim]
    return gathered.view(kv_heads, segments, -1, head_dim).transpose(0, 1)


def _ceil_log2(values: np.ndarray) -> np.ndarray:
    return np.ceil(np.log2(values)).astype(np.int64)
