"""Clouds, batches and edges against the obvious way, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.models.geometry import (
    GeometryError,
    PointCloud,
    collate,
    complete_edges,
    point_cloud,
    radius_edges,
)
from tests.geometry.clouds import cloud_of, seeds


def pairs(edges: torch.Tensor) -> set[tuple[int, int]]:
    found = [tuple(edge) for edge in edges.T.tolist()]
    assert len(found) == len(set(found)), "an edge twice"
    return set(found)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 3), max_size=14),
    st.floats(0.1, 3.0),
    st.booleans(),
    st.sampled_from([1, 7, 10**6]),
    seeds,
)
def test_edges_are_those_of_two_loops(
    owners: list[int], radius: float, loop: bool, at_once: int, seed: int
) -> None:
    """Points of a cloud need not follow each other, and blocks of any size find the same."""
    batch = torch.tensor(owners, dtype=torch.int64)
    pos = torch.randn(len(owners), 3, generator=torch.Generator().manual_seed(seed)).double()
    near, all_ = set(), set()
    for i in range(len(owners)):
        for j in range(len(owners)):
            if owners[i] == owners[j] and (loop or i != j):
                all_.add((j, i))
                if float((pos[i] - pos[j]).norm()) <= radius:
                    near.add((j, i))
    before = point_cloud.PAIRS_AT_ONCE
    point_cloud.PAIRS_AT_ONCE = at_once
    try:
        assert pairs(complete_edges(batch, loop)) == all_
        assert pairs(radius_edges(pos, batch, radius, loop)) == near
    finally:
        point_cloud.PAIRS_AT_ONCE = before


@settings(max_examples=20)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), seeds)
def test_collate_puts_clouds_one_after_another(sizes: list[int], seed: int) -> None:
    whole = cloud_of(tuple(sizes), seed=seed)
    edges = complete_edges(whole.batch)
    parts = []
    for number in range(len(sizes)):
        own = whole.batch == number
        first = int(own.nonzero()[0])
        assert whole.vectors is not None
        kept = edges[:, own[edges[0]]] - first
        parts.append(PointCloud(whole.pos[own], whole.scalars[own], whole.vectors[own], edges=kept))
    found = collate(parts)
    assert found.num_clouds == len(sizes)
    for name in ("pos", "scalars", "vectors", "batch"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
    assert found.edges is not None
    assert pairs(found.edges) == pairs(edges)
    twice = collate([found, found])
    assert twice.num_clouds == 2 * len(sizes)


def test_no_points_and_one_point() -> None:
    empty = PointCloud(torch.zeros(0, 3), torch.zeros(0, 1))
    assert (empty.num_points, empty.num_clouds) == (0, 0)
    assert complete_edges(empty.batch).shape == (2, 0)
    assert radius_edges(empty.pos, empty.batch, 1.0).shape == (2, 0)
    one = PointCloud(torch.zeros(1, 3), torch.zeros(1, 1))
    assert complete_edges(one.batch).shape == (2, 0)
    assert complete_edges(one.batch, loop=True).tolist() == [[0], [0]]


POS, SCALARS = torch.randn(4, 3), torch.randn(4, 2)
NAN = POS.clone()
NAN[2, 1] = float("nan")
TWO = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pos": NAN}, "pos of point 2 are not finite"),
        ({"scalars": torch.full((4, 2), float("inf"))}, "scalars of point 0 are not finite"),
        ({"vectors": torch.full((4, 1, 3), float("nan"))}, "vectors of point 0 are not finite"),
        ({"pos": torch.zeros(4, 3, dtype=torch.int64)}, "must be floating-point"),
        ({"pos": torch.zeros(4)}, r"pos is torch.float32 \[4\]"),
        ({"scalars": torch.zeros(3, 2)}, r"scalars are \[3, 2\], not \[4, channels\]"),
        ({"vectors": torch.zeros(4, 3)}, r"vectors are \[4, 3\], not \[4, channels, 3\]"),
        ({"vectors": torch.zeros(4, 1, 2)}, r"vectors are \[4, 1, 2\]"),
        ({"scalars": SCALARS.double()}, "scalars are torch.float64, but the positions"),
        ({"batch": torch.zeros(3, dtype=torch.int64)}, "batch is"),
        ({"batch": torch.zeros(4)}, "batch is torch.float32"),
        ({"batch": torch.tensor([0, 0, -1, 0])}, "int64 from 0"),
        ({"edges": torch.zeros(3, 2, dtype=torch.int64)}, "senders and receivers"),
        ({"edges": torch.zeros(2, 2)}, "edges are torch.float32"),
        ({"edges": torch.tensor([[0, 1], [1, 4]])}, r"edge 1 is \[1, 4\]; points are 0 to 3"),
        ({"edges": torch.tensor([[0, -1], [1, 2]])}, r"edge 1 is \[-1, 2\]"),
        (
            {"batch": TWO, "edges": torch.tensor([[0, 1], [1, 2]])},
            "edge 1 leads from point 1 of cloud 0 to point 2 of cloud 1",
        ),
    ],
)
def test_what_is_no_cloud_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        PointCloud(**{"pos": POS, "scalars": SCALARS, **arguments})


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_is_positive(radius: float) -> None:
    with pytest.raises(GeometryError, match=r"radius = .* greater than 0"):
        radius_edges(POS, TWO, radius)


def test_clouds_that_do_not_fit_together_are_refused() -> None:
    plain, rich = PointCloud(POS, SCALARS), cloud_of((4,), dtype=torch.float32)
    linked = PointCloud(POS, SCALARS, edges=torch.tensor([[0], [1]]))
    with pytest.raises(GeometryError, match="some of the clouds have vectors"):
        collate([plain, rich])
    with pytest.raises(GeometryError, match="some of the clouds have edges"):
        collate([plain, linked])
    with pytest.raises(GeometryError, match="no clouds"):
        collate([])


def test_turning_turns_positions_and_vectors_about_the_origin() -> None:
    cloud = cloud_of((2, 3))
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).double()
    each = torch.stack([torch.eye(3).double(), quarter])
    found = cloud.turned(each)
    assert torch.equal(found.pos[:2], cloud.pos[:2])
    assert torch.equal(found.pos[2:, 0], -cloud.pos[2:, 1])
    assert cloud.vectors is not None
    assert found.vectors is not None
    assert torch.equal(found.vectors[2:, :, 1], cloud.vectors[2:, :, 0])
    assert torch.equal(cloud.turned(quarter).pos[2:], found.pos[2:])
