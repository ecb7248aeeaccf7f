"""Directions that a signal on the circle or the sphere is sampled at, and their symmetries."""

from __future__ import annotations

import itertools
import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from anabranch.models.geometry.errors import GeometryError

Grid = Literal["auto", "circle", "repulsion", "fibonacci", "icosahedron", "dodecahedron"]
GOLDEN = (1 + math.sqrt(5)) / 2
POLYHEDRA = {12: "icosahedron", 20: "dodecahedron"}

_STEPS, _STEP_SIZE, _NOISE = 100, 0.1, 0.001
_NEAR = 1e-6
"""Between products of unit vectors that are meant to be equal; a grid may be float32."""

Directions = NDArray[np.float64]


def orientation_grid(n: int, dim: int = 3, seed: int = 0, kind: Grid = "auto") -> Directions:
    """Unit vectors, float64 [n, dim].

    In the plane always angles 2 pi k / n. In space, ``auto`` takes the vertices of the icosahedron
    for 12 and of the dodecahedron for 20, because rotations of their symmetry group move no signal
    off the grid, and else the solution of a ``repulsion`` from a random start (``seed``);
    ``fibonacci`` is a spiral that needs no random numbers.

    Raises :class:`GeometryError` if so few directions cannot represent a vector.
    """
    if dim not in (2, 3):
        raise GeometryError(f"dimension = {dim}: there are grids of directions in 2 and 3 only")
    if n < dim + 1:
        raise GeometryError(
            f"{n} orientations in {dim}D cannot represent a vector; use at least {dim + 1}"
        )
    if kind not in get_args(Grid):
        raise GeometryError(f"grid = {kind!r}: choose from {', '.join(get_args(Grid))}")
    if (dim == 2) != (kind == "circle") and kind != "auto":
        raise GeometryError(f"grid = {kind!r} is not one of {dim}D")
    if dim == 2:
        angles = 2 * math.pi * np.arange(n) / n
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if kind == "auto":
        kind = POLYHEDRA.get(n, "repulsion")  # type: ignore[assignment]
    if kind == "repulsion":
        return _repulsion(n, seed)
    if kind == "fibonacci":
        return _fibonacci(n)
    points = _icosahedron() if kind == "icosahedron" else _dodecahedron()
    if len(points) != n:
        raise GeometryError(f"the {kind} has {len(points)} vertices, not {n}")
    return points


def grid_symmetries(grid: Directions, reflections: bool = False) -> Directions:
    """All rotations that permute the directions, float64 [count, D, D]; the identity is first.

    ``reflections`` adds the other orthogonal maps that do. 60 and 120 of the icosahedron.
    """
    # A map is fixed by where it sends two directions that span a plane (one, in the plane).
    frames = [_frame(first, second, 1) for first, second in _pairs_like_the_first(grid)]
    if reflections:
        frames += [_frame(first, second, -1) for first, second in _pairs_like_the_first(grid)]
    inverse = np.linalg.inv(frames[0])
    maps = [frame @ inverse for frame in frames]
    return np.array([m for m in maps if _permutes(m, grid)])


def _permutes(matrix: Directions, grid: Directions) -> bool:
    return bool(((grid @ matrix.T) @ grid.T > 1 - _NEAR).any(axis=1).all())


def _pairs_like_the_first(grid: Directions) -> list[tuple[Directions, Directions]]:
    """Pairs of directions with the inner product of the first pair that is not on one line."""
    if grid.shape[1] == 2:
        return [(point, point) for point in grid]
    products = grid @ grid.T
    partner = int(np.argmax(np.abs(products[0]) < 1 - _NEAR))
    wanted = products[0, partner]
    first = [(grid[0], grid[partner])]
    others = itertools.permutations(range(len(grid)), 2)
    return first + [
        (grid[i], grid[j])
        for i, j in others
        if (i, j) != (0, partner) and abs(products[i, j] - wanted) < _NEAR
    ]


def _frame(first: Directions, second: Directions, hand: int) -> Directions:
    if len(first) == 2:
        return np.stack([first, hand * np.array([-first[1], first[0]])], axis=1)
    return np.stack([first, second, hand * np.cross(first, second)], axis=1)


def _repulsion(n: int, seed: int) -> Directions:
    """Descends the mean of (pi / angle)^2 over pairs (the paper's appendix)."""
    generator = np.random.default_rng(seed)
    points = _unit(generator.standard_normal((n, 3)))
    for step in range(_STEPS):
        cosines = np.clip(points @ points.T, -1 + 1e-7, 1 - 1e-7)
        angles = np.arccos(cosines)
        # d/dx_i of (pi / angle_ij)^2 is this times x_j: towards the neighbour, so descend away.
        slopes = 2 * math.pi**2 / (angles**3 * np.sqrt(1 - cosines**2))
        np.fill_diagonal(slopes, 0)
        gradient = 2 * slopes @ points / (n * (n - 1))
        along = np.sum(gradient * points, axis=1, keepdims=True) * points
        noise = _NOISE * (1 - step / _STEPS) * generator.standard_normal((n, 3))
        points = _unit(points - _STEP_SIZE * (gradient - along) + noise)
    return points


def _fibonacci(n: int) -> Directions:
    index = np.arange(n)
    z = 1 - (2 * index + 1) / n
    angle = 2 * math.pi * index / GOLDEN
    ring = np.sqrt(1 - z**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1)


def _icosahedron() -> Directions:
    signs = itertools.product((-1, 1), repeat=2)
    corners = [(0.0, a, b * GOLDEN) for a, b in signs]
    return _unit(np.array([np.roll(corner, shift) for corner in corners for shift in range(3)]))


def _dodecahedron() -> Directions:
    cube = [np.array(corner, float) for corner in itertools.product((-1, 1), repeat=3)]
    signs = itertools.product((-1, 1), repeat=2)
    corners = [(0.0, a / GOLDEN, b * GOLDEN) for a, b in signs]
    others = [np.roll(corner, shift) for corner in corners for shift in range(3)]
    return _unit(np.array(cube + others))


def _unit(points: Directions) -> Directions:
    return points / np.linalg.norm(points, axis=1, keepdims=True)
