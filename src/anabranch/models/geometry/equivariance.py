"""How far a model is from equivariance: turn the input, or turn the output, and compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.models.geometry.errors import GeometryError
from anabranch.models.geometry.point_cloud import PointCloud, turn
from anabranch.models.geometry.ponita import GeometryOutput, Ponita
from anabranch.models.geometry.rotations import rotations_by


@dataclass(frozen=True)
class Deviation:
    """Between the output for a turned cloud and the turned output, over points and channels.

    ``vectors`` are lengths of differences. ``largest`` is over both kinds.
    """

    scalars: float
    vectors: float
    mean_vector: float
    """Mean length, where ``vectors`` is the largest."""

    @property
    def largest(self) -> float:
        """The larger of both."""
        return max(self.scalars, self.vectors)


@torch.no_grad()
def equivariance_error(
    model: Callable[[PointCloud], GeometryOutput],
    cloud: PointCloud,
    rotations: Tensor,
    *,
    rotate_grid: bool = False,
) -> Deviation:
    """Largest deviation over ``rotations`` [count, D, D], about the origin.

    ``rotate_grid`` turns the directions of a :class:`Ponita` with the cloud: what is left is
    rounding, and shows that nothing but the grid is approximate.
    """
    if rotate_grid and not isinstance(model, Ponita):
        raise GeometryError(
            f"rotate_grid turns the grid of a Ponita; {type(model).__name__} has none"
        )
    was_training = getattr(model, "training", False)
    if isinstance(model, torch.nn.Module):
        model.eval()
    straight = model(cloud)
    scalars, vectors, means = [0.0], [0.0], [0.0]
    owners = torch.zeros(len(straight.vectors), dtype=torch.int64)  # one matrix turns all
    for rotation in rotations.to(cloud.pos):
        context = (
            model.turned_grid(rotation)
            if rotate_grid and isinstance(model, Ponita)
            else nullcontext()
        )
        with context:
            found = model(cloud.turned(rotation))
        scalars.append(_largest((found.scalars - straight.scalars).abs()))
        apart = (found.vectors - turn(straight.vectors, rotation, owners)).norm(dim=-1)
        vectors.append(_largest(apart))
        means.append(float(apart.mean()) if apart.numel() else 0.0)
    if isinstance(model, torch.nn.Module):
        model.train(was_training)
    count = max(1, len(rotations))
    return Deviation(max(scalars), max(vectors), sum(means) / count)


def error_by_angle(
    model: Callable[[PointCloud], GeometryOutput],
    cloud: PointCloud,
    angles: Sequence[float],
    axes: Tensor | None = None,
) -> list[Deviation]:
    """The deviation at each angle in degrees, about the unit ``axes`` [count, 3] (none in 2D)."""
    return [
        equivariance_error(model, cloud, rotations_by(math.radians(angle), axes))
        for angle in angles
    ]


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
