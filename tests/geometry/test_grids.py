"""Grids of directions, their symmetries, and rotations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.models.geometry import (
    GeometryError,
    grid_symmetries,
    orientation_grid,
    random_rotations,
    rotations_by,
)


def nearest_angle(grid: np.ndarray) -> float:
    """Smallest angle between two directions, in degrees."""
    products = grid @ grid.T - 2 * np.eye(len(grid))
    return math.degrees(math.acos(min(1.0, float(products.max()))))


@settings(max_examples=30)
@given(st.integers(4, 40), st.sampled_from(["repulsion", "fibonacci"]), st.integers(0, 5))
def test_directions_are_of_length_one_and_spread(n: int, kind: str, seed: int) -> None:
    grid = orientation_grid(n, 3, seed, kind)  # type: ignore[arg-type]
    assert grid.shape == (n, 3)
    np.testing.assert_allclose(np.linalg.norm(grid, axis=1), 1, atol=1e-12)
    # Caps around points of the best possible packing would cover the sphere at about this angle.
    ideal = math.degrees(math.sqrt(8 * math.pi / (math.sqrt(3) * n)))
    assert nearest_angle(grid) > 0.55 * ideal
    np.testing.assert_array_equal(grid, orientation_grid(n, 3, seed, kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [8, 12, 16, 20])
def test_repulsion_spreads_better_than_chance(n: int) -> None:
    random = np.random.default_rng(0).standard_normal((n, 3))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    assert nearest_angle(orientation_grid(n, 3, 0, "repulsion")) > 2 * nearest_angle(random)


def test_the_plane_has_equal_angles() -> None:
    grid = orientation_grid(8, 2)
    np.testing.assert_allclose(grid[2], [0, 1], atol=1e-15)
    assert nearest_angle(grid) == pytest.approx(45)


@pytest.mark.parametrize(
    ("n", "dim", "rotations"), [(12, 3, 60), (20, 3, 60), (6, 2, 6), (7, 2, 7)]
)
def test_symmetric_grids_have_their_groups(n: int, dim: int, rotations: int) -> None:
    grid = orientation_grid(n, dim)
    for reflections, count in ((False, rotations), (True, 2 * rotations)):
        group = grid_symmetries(grid, reflections)
        assert len(group) == count
        np.testing.assert_allclose(group[0], np.eye(dim), atol=1e-12)
        for matrix in group:
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-12)
            moved = grid @ matrix.T
            nearest = np.argmax(moved @ grid.T, axis=1)
            assert sorted(nearest) == list(range(n))
            np.testing.assert_allclose(moved, grid[nearest], atol=1e-12)
        assert len(np.unique(group.round(6), axis=0)) == count
    assert len(grid_symmetries(orientation_grid(16), reflections=False)) < 60


@pytest.mark.parametrize("n", [12, 20])
def test_polyhedra_integrate_products_exactly(n: int) -> None:
    """The mean of o o^T is I / 3, so that a vector comes back as v / 3."""
    grid = orientation_grid(n)
    np.testing.assert_allclose(grid.T @ grid / n, np.eye(3) / 3, atol=1e-14)
    np.testing.assert_allclose(grid.mean(axis=0), 0, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 3), "3 orientations in 3D cannot represent a vector; use at least 4"),
        ((1, 3), "cannot represent"),
        ((2, 2), "2 orientations in 2D"),
        ((8, 4), "dimension = 4"),
        ((8, 3, 0, "cube"), "grid = 'cube'.*fibonacci"),
        ((8, 3, 0, "circle"), "not one of 3D"),
        ((8, 2, 0, "fibonacci"), "not one of 2D"),
        ((8, 3, 0, "icosahedron"), "has 12 vertices, not 8"),
    ],
)
def test_what_is_no_grid_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        orientation_grid(*arguments)


@pytest.mark.parametrize("dimension", [2, 3, 5])
def test_random_rotations_are_rotations_and_uniform(dimension: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda **o: random_rotations(  # noqa: E731
        4000, dimension, generator=generator, dtype=torch.float64, **o
    )
    for reflections in (False, True):
        found = draw(reflections=reflections)
        eye = torch.eye(dimension).double()
        assert torch.allclose(found @ found.mT, eye.expand_as(found), atol=1e-12)
        determinants = torch.linalg.det(found)
        assert torch.allclose(determinants.abs(), torch.ones(4000).double())
        share = float((determinants < 0).double().mean())
        assert share == (0 if not reflections else pytest.approx(0.5, abs=0.03))
        # Of a uniform one every entry has mean 0 and variance 1 / D: standard error 0.016 at most.
        assert float(found.mean(0).abs().max()) < 0.05
        assert torch.allclose((found**2).mean(0), torch.full_like(eye, 1 / dimension), atol=0.05)


def test_rotations_about_an_axis() -> None:
    axes = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=-1)
    found = rotations_by(1.1, axes, torch.float64)
    kept = torch.einsum("nij,nj->ni", found, axes)
    assert torch.allclose(kept, axes, atol=1e-12)
    traces = found.diagonal(dim1=1, dim2=2).sum(-1)
    assert torch.allclose(traces, torch.full((5,), 1 + 2 * math.cos(1.1)).double(), atol=1e-6)
    z = torch.tensor([[0.0, 0, 1]])
    turned = rotations_by(math.pi / 2, z)[0] @ torch.tensor([1.0, 0, 0])
    assert torch.allclose(turned, torch.tensor([0.0, 1, 0]), atol=1e-6)
    assert torch.allclose(rotations_by(math.pi / 2)[0] @ torch.tensor([1.0, 0]), turned[:2])
    with pytest.raises(GeometryError, match=r"axes are \[3\]"):
        rotations_by(1.0, torch.ones(3))
