"""Rotations and reflections as matrices that multiply column vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anabranch.models.geometry.errors import GeometryError


def random_rotations(
    count: int,
    dimension: int,
    *,
    reflections: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform on the rotation group [count, D, D]; with ``reflections`` on all of O(D).

    QR decomposition of Gaussian matrices (Mezzadri, "How to generate random matrices from the
    classical compact groups", 2007), in float64.
    """
    shape = (count, dimension, dimension)
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # Householder's signs are not random; those of R's diagonal make the distribution uniform.
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    if not reflections:
        q[..., 0] *= torch.linalg.det(q).sign().unsqueeze(-1)
    return q.to(dtype)


def rotations_by(
    angle: float, axes: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rotations [count, D, D] by ``angle`` in radians, about unit ``axes`` [count, 3].

    Without axes the one of the plane, [1, 2, 2]. Rodrigues' formula.
    """
    cos, sin = math.cos(angle), math.sin(angle)
    if axes is None:
        return torch.tensor([[[cos, -sin], [sin, cos]]], dtype=dtype)
    if axes.ndim != 2 or axes.shape[1] != 3:
        raise GeometryError(f"axes are {list(axes.shape)}, not [count, 3]")
    x, y, z = axes.to(torch.float64).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    eye = torch.eye(3, dtype=torch.float64)
    return (eye + sin * cross + (1 - cos) * cross @ cross).to(dtype)
