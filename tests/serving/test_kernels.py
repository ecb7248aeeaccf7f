"""The C++ operations against the plain PyTorch ones, on random shapes and values."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.serving import kernels
from anabranch.serving.kernels import reference
from anabranch.serving.runner.fused import PackedLinear
from anabranch.serving.speculation.proposal import Proposal

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="no C++ compiler: the reference operations are used",
)
pytestmark = needs_compiler
SIZES = st.integers(1, 15)
PLAIN = kernels.Operations.of(reference, compiled=False)


@pytest.fixture(scope="module")
def ops() -> Any:
    assert kernels.load().compiled, (
        "there is a compiler, but the kernels did not build; see the log"
    )
    return kernels.load()


@settings(max_examples=30, deadline=None)
@given(rows=SIZES, width=st.sampled_from((16, 48, 576)), delta=st.booleans(), seed=st.integers(0))
def test_add_rms_norm(ops: Any, rows: int, width: int, delta: bool, seed: int) -> None:
    torch.manual_seed(seed % 2**32)
    x, weight = torch.randn(rows, width) * 3, torch.randn(width)
    added = torch.randn(rows, width) if delta else None
    mine, theirs = x.clone(), x.clone()
    actual = ops.add_rms_norm(mine, added, weight, 1e-5)
    torch.testing.assert_close(actual, reference.add_rms_norm(theirs, added, weight, 1e-5))
    torch.testing.assert_close(mine, theirs)


@settings(max_examples=30, deadline=None)
@given(rows=SIZES, width=st.sampled_from((16, 64, 1536)), scale=st.sampled_from((1.0, 50.0)))
def test_silu_mul(ops: Any, rows: int, width: int, scale: float) -> None:
    x = torch.randn(rows, 2 * width) * scale
    x[0, 0], x[0, 1] = -200.0, 200.0
    torch.testing.assert_close(ops.silu_mul(x), reference.silu_mul(x))


@settings(max_examples=40, deadline=None)
@given(
    rows=SIZES,
    width=st.sampled_from((64, 192, 576)),
    outputs=st.integers(1, 130),
    bias=st.booleans(),
    weights=st.sampled_from(("bf16", "int8")),
)
def test_linear(ops: Any, rows: int, width: int, outputs: int, bias: bool, weights: Any) -> None:
    linear = nn.Linear(width, outputs, bias=bias)
    x = torch.randn(rows, width)
    with torch.inference_mode():
        actual = PackedLinear.of([linear], weights, ops)(x)
        expected = PackedLinear.of([linear], weights, PLAIN)(x)
        exact = linear(x)
    # An activation between two integers may be rounded to either: that is one step of its scale.
    step = float(x.abs().max() / 127 * linear.weight.abs().max()) if weights == "int8" else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 + 1.01 * step)
    tolerance = 0.02 if weights == "bf16" else 0.05
    assert (actual - exact).abs().max() <= tolerance * exact.abs().max().clamp_min(1.0)


@settings(max_examples=40, deadline=None)
@given(
    rows=SIZES,
    width=st.sampled_from((64, 80, 96, 112, 192, 576)),
    outputs=st.integers(1, 130),
    weights=st.sampled_from(("bf16", "int8")),
)
def test_transposed(ops: Any, rows: int, width: int, outputs: int, weights: Any) -> None:
    linear = nn.Linear(width, outputs, bias=False)
    gradient = torch.randn(rows, outputs)
    with torch.inference_mode():
        packed = PackedLinear.of([linear], weights, ops)
        expected = gradient @ packed.dense()
        plain = PackedLinear.of([linear], weights, PLAIN).transposed(gradient)
        assert (packed.dense() - linear.weight).abs().max() <= 0.01 * linear.weight.abs().max()
    torch.testing.assert_close(packed.transposed(gradient), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.tuples(SIZES, st.integers(0, 2)), max_size=5),
    rank=st.sampled_from((0, 16, 32)),
    width=st.sampled_from((64, 576)),
    parts=st.lists(st.sampled_from((16, 48, 64, 192)), min_size=1, max_size=3),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_add_lora(
    ops: Any, blocks: list[tuple[int, int]], rank: int, width: int, parts: list[int], dtype: Any
) -> None:
    rows = sum(length for length, _ in blocks) + 1  # the last row has no adapter
    x, y = torch.randn(rows, width), torch.randn(rows, sum(parts))
    ranks = (rank, 16, 0)
    a = [torch.randn(width, r).to(dtype) for r in ranks for _ in parts]
    tiles = [64 if out % 64 == 0 else 16 for out in parts]
    b = [
        torch.randn(out // tile, r, tile).to(dtype)
        for r in ranks
        for out, tile in zip(parts, tiles, strict=True)
    ]
    starts = torch.tensor([0, *(length for length, _ in blocks)]).cumsum(0)
    table = torch.tensor(
        [(starts[i], starts[i + 1], adapter) for i, (_, adapter) in enumerate(blocks)],
        dtype=torch.long,
    ).view(-1, 3)
    offsets = [sum(parts[:i]) for i in range(len(parts))]
    actual, expected = y.clone(), y.clone()
    ops.add_lora(actual, x, table, a, b, offsets)
    reference.add_lora(expected, x, table, a, b, offsets)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(actual[-1], y[-1])


def test_int8_extremes_do_not_overflow(ops: Any) -> None:
    linear = nn.Linear(1536, 32, bias=False)
    linear.weight.data.fill_(1.0)
    linear.weight.data[::2] = -1.0
    for x in (torch.ones(3, 1536), -torch.ones(3, 1536), torch.zeros(3, 1536)):
        packed = PackedLinear.of([linear], "int8", ops)
        torch.testing.assert_close(packed(x), linear(x).detach(), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_attention(ops: Any, data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, repeats = draw(st.sampled_from(((1, 1), (2, 3), (1, 8), (3, 3))))
    dim, page = draw(st.sampled_from((32, 64))), draw(st.sampled_from((16, 32)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    window = draw(st.sampled_from((0, 0, 1, 7, 40)))
    lengths = draw(st.lists(st.sampled_from((1, 1, 2, 9, 33)), min_size=1, max_size=5))
    pasts = [draw(st.sampled_from((0, 0, 1, 15, 16, 50))) for _ in lengths]
    norm = torch.rand(dim) + 0.5 if draw(st.booleans()) else None

    heads, rows = kv_heads * repeats, sum(lengths)
    context = torch.tensor([p + n for p, n in zip(pasts, lengths, strict=True)])
    depth = int(-(-context.max() // page))
    pages = torch.randperm(len(lengths) * depth)
    tables = pages.view(len(lengths), depth)
    caches = [
        torch.randn(kv_heads, len(pages), dim, page).to(dtype),
        torch.randn(kv_heads, len(pages), page, dim).to(dtype),
    ]
    positions = [p + i for p, n in zip(pasts, lengths, strict=True) for i in range(n)]
    owner = [s for s, n in enumerate(lengths) for _ in range(n)]
    slots = torch.tensor(
        [int(tables[s, p // page]) * page + p % page for s, p in zip(owner, positions, strict=True)]
    )
    visible, roots = None, None
    if draw(st.booleans()):  # the last of a segment's rows are nodes of a tree
        visible, roots = torch.full((rows,), -1), context.clone()
        for segment, length in enumerate(lengths):
            nodes = draw(st.integers(0, length - 1))
            parents = [draw(st.integers(-1, node - 1)) for node in range(nodes)]
            tree = Proposal((0,) * nodes, tuple(parents))
            if window and max(tree.depths, default=0) >= window:
                continue
            stop = sum(lengths[: segment + 1])
            visible[stop - nodes : stop] = torch.tensor(tree.visible, dtype=torch.long)
            roots[segment] -= nodes
    angles = torch.tensor(positions)[:, None] * torch.rand(dim // 2)
    cosine, sine = (torch.cat((f(angles), f(angles)), 1) for f in (torch.cos, torch.sin))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim)
    starts = torch.tensor([0, *lengths]).cumsum(0)

    results = []
    for implementation in (ops, reference):
        keys, values = (cache.clone() for cache in caches)
        out = implementation.attention(
            qkv.clone(),
            cosine,
            sine,
            keys,
            values,
            slots,
            starts,
            context,
            tables,
            visible,
            roots,
            heads,
            dim**-0.5,
            window,
            norm,
            norm,
            1e-6,
        )
        results.append((out, keys, values))
    # A rotation that differs in its last bit may be rounded to another bfloat16 in the cache.
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-4
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_a_failing_build_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    load = kernels.load.__wrapped__  # what is loaded stays: a second copy of it ends the process
    assert not load().compiled
    assert "do not build" in caplog.text
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not load().compiled
    assert "no C++ compiler" in caplog.text
