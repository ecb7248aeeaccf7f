"""The fused runner's operations in plain PyTorch: what they mean, and a fallback.

All activations are float32. Weights are packed in tiles of 32 output channels; activations of the
8-bit product have one scale for each group of 64 input channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32
GROUP = 64


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """``x [N, H] += delta`` in place; returns ``x / rms(x) * weight``."""
    if delta is not None:
        x += delta
    return F.rms_norm(x, (x.shape[1],), weight, eps)


def silu_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[N, 2 I] = [gate, up]``."""
    gate, up = x.chunk(2, dim=1)
    return F.silu(gate) * up


def linear_bfloat16(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, K] -> [N, O]``, multiplied in single precision.

    Weights are ``[O / 32, K, 16, 2]``: channel c of a tile is at ``[c % 16, c // 16]``.
    """
    return F.linear(x, unpack_bfloat16(packed), bias)


def unpack_bfloat16(packed: Tensor) -> Tensor:
    """The weight ``[O, K]`` of :func:`linear_bfloat16` in float32."""
    return packed.permute(0, 3, 2, 1).flatten(0, 2).float()


def linear_int8(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, K] -> [N, O]`` with weights ``[O / 32, K / 4, 32, 4]`` stored 128 too high.

    Integer products of a group are exact in float32: 64 x 127 x 127 is below 2**24.
    """
    weight = unpack_int8(packed, torch.ones(len(packed) * TILE))
    y = x.new_zeros(len(x), len(weight))
    for start in range(0, x.shape[1], GROUP):
        group = x[:, start : start + GROUP]
        peak = group.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        integers = (group * (127.0 / peak)).round()
        y += integers @ weight[:, start : start + GROUP].T * (peak / 127.0)
    y *= scale
    return y if bias is None else y + bias


def unpack_int8(packed: Tensor, scale: Tensor) -> Tensor:
    """The weight ``[O, K]`` of :func:`linear_int8` in float32."""
    tiles, quarter = packed.shape[:2]
    weight = packed.permute(0, 2, 1, 3).reshape(tiles * TILE, quarter * 4)
    return (weight.float() - 128) * scale[:, None]


def transposed_bfloat16(y: Tensor, packed: Tensor) -> Tensor:
    """``[N, O] -> [N, K]`` by the transpose of :func:`linear_bfloat16`'s weight, unpadded O."""
    return y @ unpack_bfloat16(packed)[: y.shape[1]]


def transposed_int8(y: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """``[N, O] -> [N, K]`` by the transpose of :func:`linear_int8`'s weight, unpadded O."""
    return y @ unpack_int8(packed, scale)[: y.shape[1]]


def add_lora(
    y: Tensor,
    x: Tensor,
    blocks: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    offsets: list[int],
) -> None:
    """``y [N, O] += x A B`` in place, for rows of many adapters.

    ``blocks [M, 3]``: rows ``[start, stop)`` belong to adapter i. An adapter has a pair of matrices
    ``A [K, r]``, ``B [width / tile, r, tile]`` for each entry of ``offsets``, the column where its
    outputs begin; ``a`` and ``b`` list the pairs adapter by adapter. r is 0 or a multiple of 16,
    a tile has 64 or 16 columns.
    """
    for start, stop, adapter in blocks.tolist():
        for part, offset in enumerate(offsets):
            index = adapter * len(offsets) + part
            expand = b[index].transpose(0, 1).flatten(1).float()
            delta = x[start:stop] @ a[index].float() @ expand
            y[start:stop, offset : offset + delta.shape[1]] += delta


def attention(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query_start: Tensor,
    context: Tensor,
    tables: Tensor,
    visible: Tensor | None,
    roots: Tensor | None,
    heads: int,
    scale: float,
    window: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Rotate ``qkv [N, (heads + 2 kv_heads) D]``, write keys and values to slots, attend.

    Caches: keys ``[kv_heads, pages, D, P]``, values ``[kv_heads, pages, P, D]``. ``window`` 0 sees
    the whole context; else it is larger than a drafted tree is deep. ``visible`` and ``roots`` are
    those of :class:`~anabranch.serving.batch.Trees`. Returns ``[N, heads D]``.
    """
    kv_heads, _, page_size, head_dim = values.shape
    parts = qkv.view(len(qkv), -1, head_dim)
    query, key, value = parts.split([heads, kv_heads, kv_heads], dim=1)
    query = _rotate(query, cosine, sine, q_norm, eps)
    key = _rotate(key, cosine, sine, k_norm, eps)
    page, offset = slots // page_size, slots % page_size
    keys[:, page, :, offset] = key.to(keys.dtype)
    values[:, page, offset] = value.transpose(0, 1).to(values.dtype)

    out = torch.empty_like(query)
    for index, (start, stop) in enumerate(pairwise(query_start)):
        seen = int(context[index])
        pages = tables[index, : -(-seen // page_size)]
        past_keys = keys[:, pages].transpose(2, 3).flatten(1, 2)[:, :seen].float()
        past_values = values[:, pages].flatten(1, 2)[:, :seen].float()
        places, past = torch.arange(seen - int(stop - start), seen), torch.arange(seen)
        sees = places[:, None] >= past
        if visible is not None and roots is not None:
            nodes, bits = past - roots[index], visible[start:stop, None]
            sees &= (nodes < 0) | (bits >> nodes.clamp(0, 63) & 1 == 1)
            depth = (bits >> torch.arange(63) & 1).sum(dim=1)
            places = torch.where(bits[:, 0] == -1, places, roots[index] - 1 + depth)
        if window:
            sees &= places[:, None] - past < window
        attended = F.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1)[None],
            past_keys[None],
            past_values[None],
            attn_mask=sees,
            scale=scale,
            enable_gqa=True,
        )
        out[start:stop] = attended[0].transpose(0, 1)
    return out.flatten(1)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    if norm is not None:
        x = F.rms_norm(x, (x.shape[2],), norm, eps)
    first, second = x.chunk(2, dim=2)
    turned = torch.cat((-second, first), dim=2)
    return x * cosine[:, None] + turned * sine[:, None]
