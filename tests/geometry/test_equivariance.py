"""Where the networks are exact, in float32 and float64, and that the measure finds where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from anabranch.models.geometry import (
    GeometryError,
    PointCloud,
    equivariance_error,
    error_by_angle,
    grid_symmetries,
    orientation_grid,
    random_rotations,
)
from anabranch.models.geometry.point_cloud import turn
from tests.geometry.clouds import DTYPES, TOLERANCE, cloud_of, egnn, permuted, ponita, seeds, sizes

MODELS: dict[str, Callable[..., Any]] = {
    "grid": ponita,
    "grid with radius": lambda d: ponita(d, radius=2.0),
    "full kernel": lambda d: ponita(d, orientations=6, separable=False),
    "extra invariant": lambda d: ponita(d, orientations=6, separable=False, extra_invariant=True),
    "pooled": lambda d: ponita(d, pool="mean"),
    "positions only": lambda d: ponita(d, orientations=0),
    "edge mode": lambda d: ponita(d, orientations=-1),
    "edge mode, extra": lambda d: ponita(d, orientations=-1, extra_invariant=True),
    "plane": lambda d: ponita(d, dimension=2, orientations=8),
    "plane, edge mode": lambda d: ponita(d, dimension=2, orientations=-1),
    "egnn": egnn,
}
EXACT = ("positions only", "edge mode", "edge mode, extra", "plane, edge mode", "egnn")


def fitting(model: Any, dtype: torch.dtype, sizes: tuple[int, ...] = (5, 3), seed: int = 0) -> Any:
    dimension = getattr(model.config, "dimension", 3)
    return cloud_of(
        sizes, dimension, vectors=model.config.vectors_in or None, seed=seed, dtype=dtype
    )


def assert_significant(output: Any) -> None:
    """Nothing is exact because nothing comes out."""
    for values in (output.scalars, output.vectors):
        if values.numel():
            assert 1e-2 < float(values.detach().abs().mean()) < 1e2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shifts_and_permutations(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name](dtype)
    cloud = fitting(model, dtype)
    output = model(cloud)
    assert_significant(output)
    shift = torch.tensor([3.0, -1.0, 2.0], dtype=dtype)[: cloud.dimension]
    shifted = model(cloud.shifted(shift))
    order = torch.randperm(cloud.num_points, generator=torch.Generator().manual_seed(0))
    shuffled = model(permuted(cloud, order))
    by_point = model.config.to_dict().get("pool") is None
    for kind in ("scalars", "vectors"):
        expected = getattr(output, kind)
        assert torch.allclose(getattr(shifted, kind), expected, atol=TOLERANCE[dtype])
        moved = expected[order] if by_point else expected
        assert torch.allclose(getattr(shuffled, kind), moved, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_modes_without_a_grid_are_exact(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name](dtype)
    cloud = fitting(model, dtype)
    assert_significant(model(cloud))
    generator = torch.Generator().manual_seed(1)
    # In the plane a2 is signed: a mirror image is another figure.
    turns = random_rotations(
        10, cloud.dimension, reflections=cloud.dimension == 3, generator=generator, dtype=dtype
    )
    assert equivariance_error(model, cloud, turns).largest < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["grid", "grid with radius", "full kernel", "pooled", "plane"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_turning_the_grid_along_is_exact(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name](dtype)
    cloud = fitting(model, dtype)
    assert_significant(model(cloud))
    dimension = cloud.dimension
    turns = random_rotations(5, dimension, reflections=dimension == 3, dtype=dtype)
    before = model.grid.clone()
    assert equivariance_error(model, cloud, turns, rotate_grid=True).largest < TOLERANCE[dtype]
    assert torch.equal(model.grid, before)
    approximate = equivariance_error(model, cloud, turns).largest
    assert approximate > 100 * TOLERANCE[dtype], "a grid cannot be exact without"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("orientations", "dimension"), [(12, 3), (20, 3), (5, 2), (8, 2)])
def test_the_symmetries_of_the_grid_are_exact(
    orientations: int, dimension: int, dtype: torch.dtype
) -> None:
    model = ponita(dtype, dimension=dimension, orientations=orientations)
    cloud = fitting(model, dtype)
    grid = orientation_grid(orientations, dimension)
    group = torch.from_numpy(grid_symmetries(grid, reflections=dimension == 3))
    assert equivariance_error(model, cloud, group[::7]).largest < TOLERANCE[dtype]


def test_a_reflection_of_the_plane_is_seen() -> None:
    """Invariants in the plane are of rotations only, as the paper's."""
    model = ponita(dimension=2, orientations=8)
    mirror = torch.tensor([[[1.0, 0], [0, -1]]])
    assert equivariance_error(model, fitting(model, torch.float64), mirror).largest > 1e-3


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(counts=sizes, seed=seeds)
def test_a_cloud_alone_is_a_cloud_in_a_batch(name: str, counts: tuple[int, ...], seed: int) -> None:
    model = MODELS[name](torch.float64)
    cloud = fitting(model, torch.float64, counts, seed)
    together = model(cloud)
    for number in range(len(counts)):
        own = cloud.batch == number
        vectors = None if cloud.vectors is None else cloud.vectors[own]
        alone = model(PointCloud(cloud.pos[own], cloud.scalars[own], vectors))
        rows: Any = own if model.config.to_dict().get("pool") is None else slice(number, number + 1)
        assert torch.allclose(alone.scalars, together.scalars[rows], atol=1e-10)
        assert torch.allclose(alone.vectors, together.vectors[rows], atol=1e-10)


def test_forces_turn_with_the_cloud() -> None:
    """The gradient of an exact energy is exact, self-loops and cutoff included."""
    model = ponita(orientations=0, vectors_out=0, scalars_out=1, pool="sum", radius=3.0)
    cloud = fitting(model, torch.float64)
    rotation = random_rotations(1, 3, dtype=torch.float64)[0]

    def forces(given: PointCloud) -> torch.Tensor:
        pos = given.pos.clone().requires_grad_()
        energy = model(PointCloud(pos, given.scalars, batch=given.batch)).scalars.sum()
        (gradient,) = torch.autograd.grad(energy, pos, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(gradient.square().sum(), pos)[0]).all()
        return -gradient.detach()

    found = forces(cloud)
    assert float(found.norm()) > 1e-3
    assert torch.allclose(forces(cloud.turned(rotation)), found @ rotation.T, atol=1e-12)
    assert torch.allclose(found.sum(0), torch.zeros(3).double(), atol=1e-12)  # Newton's third law


def test_forces_of_a_grid_are_the_slope_of_its_energy() -> None:
    model = ponita(orientations=8, vectors_out=0, scalars_out=1, pool="sum")
    cloud = fitting(model, torch.float64, (3,))

    def energy(pos: torch.Tensor) -> torch.Tensor:
        return model(PointCloud(pos, cloud.scalars, cloud.vectors)).scalars

    assert torch.autograd.gradcheck(energy, (cloud.pos.clone().requires_grad_(),), atol=1e-5)


@torch.no_grad()
def test_the_deviation_is_that_of_a_loop() -> None:
    model = ponita()
    cloud = fitting(model, torch.float64)
    turns = random_rotations(3, 3, dtype=torch.float64)
    found = equivariance_error(model, cloud, turns)
    straight, largest, means = model(cloud), [0.0, 0.0], []
    for rotation in turns:
        turned = model(cloud.turned(rotation))
        apart = (turned.vectors - turn(straight.vectors, rotation, cloud.batch)).norm(dim=-1)
        scalars = (turned.scalars - straight.scalars).abs()
        largest = [max(largest[0], float(scalars.max())), max(largest[1], float(apart.max()))]
        means.append(float(apart.mean()))
    assert (found.scalars, found.vectors) == pytest.approx(tuple(largest))
    assert found.mean_vector == pytest.approx(sum(means) / 3)
    assert found.largest == max(found.scalars, found.vectors)


def test_no_turn_no_deviation() -> None:
    model = ponita().train()
    axes = torch.eye(3)
    cloud = fitting(model, torch.float64)
    none, some, half = error_by_angle(model, cloud, (0.0, 50.0, 180.0), axes)
    assert none.largest < 1e-11
    assert some.largest > 1e-3
    assert half.largest < 1e-4, "the icosahedron's own symmetry, up to float32 matrices"
    assert model.training
    assert equivariance_error(model, cloud, torch.zeros(0, 3, 3)).largest == 0
    with pytest.raises(GeometryError, match="EGNN has none"):
        equivariance_error(egnn(), cloud, torch.eye(3)[None], rotate_grid=True)
