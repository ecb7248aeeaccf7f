"""Points with features, several clouds in one batch, and which points see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anabranch.models.geometry.errors import GeometryError

PAIRS_AT_ONCE = 2**22
"""Pairs whose distances are in memory together."""


@dataclass(frozen=True)
class PointCloud:
    """One cloud, or several in a batch; checked when it is made.

    Without ``batch`` all points are one cloud. Without ``edges`` a model connects what its
    configuration says: everything within a radius, or all points of a cloud. Features have the
    dtype of the positions.
    """

    pos: Tensor
    """[points, dimension]"""
    scalars: Tensor
    """[points, channels]: what no rotation changes."""
    vectors: Tensor | None = None
    """[points, channels, dimension]: what turns with the cloud, and no shift changes."""
    batch: Tensor = None  # type: ignore[assignment]  # always a tensor once it is made
    """[points] int64: the cloud of each point, from 0."""
    edges: Tensor | None = None
    """[2, edges] int64: senders and receivers."""

    def __post_init__(self) -> None:
        if self.batch is None:
            batch = torch.zeros(len(self.pos), dtype=torch.int64, device=self.pos.device)
            object.__setattr__(self, "batch", batch)
        _check(self)

    @property
    def num_points(self) -> int:
        """Points of all clouds."""
        return len(self.pos)

    @property
    def dimension(self) -> int:
        """Of the space."""
        return self.pos.shape[1]

    @cached_property
    def num_clouds(self) -> int:
        """Clouds of the batch; none without points."""
        return int(self.batch.max()) + 1 if self.num_points else 0

    def to(self, target: Any) -> PointCloud:
        """The same in another dtype or on another device."""
        moved = {"pos": self.pos.to(target), "scalars": self.scalars.to(target)}
        if self.vectors is not None:
            moved["vectors"] = self.vectors.to(target)
        if not isinstance(target, torch.dtype):
            moved["batch"] = self.batch.to(target)
            if self.edges is not None:
                moved["edges"] = self.edges.to(target)
        return replace(self, **moved)

    def turned(self, rotations: Tensor) -> PointCloud:
        """Every cloud turned about the origin: by one matrix [D, D], or each by its own [B, D, D].

        Orthogonal matrices that are no rotations reflect.
        """
        vectors = None if self.vectors is None else turn(self.vectors, rotations, self.batch)
        return replace(self, pos=turn(self.pos, rotations, self.batch), vectors=vectors)

    def shifted(self, by: Tensor) -> PointCloud:
        """Every point moved by the same vector [D]; vectors are directions and stay."""
        return replace(self, pos=self.pos + by)


def turn(values: Tensor, rotations: Tensor, batch: Tensor) -> Tensor:
    """Positions [N, D] or vectors [N, V, D], times one matrix or the one of their cloud."""
    if rotations.ndim == 2:
        return values @ rotations.T
    return torch.einsum("nij,n...j->n...i", rotations[batch], values)


def collate(clouds: Sequence[PointCloud]) -> PointCloud:
    """Several batches as one, in order."""
    if not clouds:
        raise GeometryError("there are no clouds to put together")
    sizes = torch.tensor([cloud.num_points for cloud in clouds])
    counts = torch.tensor([cloud.num_clouds for cloud in clouds])
    first_points = sizes.cumsum(0) - sizes
    first_clouds = counts.cumsum(0) - counts
    device = clouds[0].pos.device
    batch = torch.cat([cloud.batch for cloud in clouds])
    batch = batch + first_clouds.repeat_interleave(sizes).to(device)
    edges = [cloud.edges for cloud in clouds]
    if any((e is None) != (edges[0] is None) for e in edges):
        raise GeometryError("some of the clouds have edges and others have none")
    vectors = [cloud.vectors for cloud in clouds]
    if any((v is None) != (vectors[0] is None) for v in vectors):
        raise GeometryError("some of the clouds have vectors and others have none")
    shifted = [e + at for e, at in zip(edges, first_points.tolist(), strict=True) if e is not None]
    return PointCloud(
        torch.cat([cloud.pos for cloud in clouds]),
        torch.cat([cloud.scalars for cloud in clouds]),
        torch.cat([v for v in vectors if v is not None]) if vectors[0] is not None else None,
        batch,
        torch.cat(shifted, dim=1) if shifted else None,
    )


def complete_edges(batch: Tensor, loop: bool = False) -> Tensor:
    """Every point to every point of its cloud, int64 [2, edges]; ``loop``: to itself as well."""
    return torch.cat([p if loop else without_loops(p) for p in _pairs(batch)], dim=1)


def radius_edges(pos: Tensor, batch: Tensor, radius: float, loop: bool = False) -> Tensor:
    """Points of one cloud at most ``radius`` apart, int64 [2, edges].

    Exact: every pair of a cloud is measured, a block at a time. Fine below 20,000 points a cloud.
    """
    require_radius(radius)
    found = []
    for pairs in _pairs(batch):
        senders, receivers = pairs
        near = torch.linalg.vector_norm(pos[senders] - pos[receivers], dim=-1) <= radius
        if not loop:
            near &= senders != receivers
        found.append(pairs[:, near])
    return torch.cat(found, dim=1)


def edges_of(cloud: PointCloud, radius: float | None) -> Tensor:
    """The cloud's own edges, or else all within ``radius``, or else all of each cloud."""
    if cloud.edges is not None:
        return cloud.edges
    if radius is not None:
        return radius_edges(cloud.pos, cloud.batch, radius)
    return complete_edges(cloud.batch)


def without_loops(edges: Tensor) -> Tensor:
    """The edges that join two points."""
    return edges[:, edges[0] != edges[1]]


def with_loops(edges: Tensor, num_points: int) -> Tensor:
    """The edges with exactly one from each point to itself, at the end."""
    own = torch.arange(num_points, device=edges.device)
    return torch.cat([without_loops(edges), own.expand(2, -1)], dim=1)


def require_radius(radius: float) -> None:
    """Raise :class:`GeometryError` unless the radius is a positive number."""
    if not 0 < radius < float("inf"):
        raise GeometryError(f"radius = {radius}: it must be greater than 0, and finite")


def _pairs(batch: Tensor) -> Iterator[Tensor]:
    """All (sender, receiver) of the same cloud, ordered by receiver within a cloud, in blocks."""
    points = torch.argsort(batch, stable=True)
    sizes = torch.bincount(batch)[batch[points]]  # of each point's cloud
    starts = torch.searchsorted(batch[points], batch[points])
    ends = sizes.cumsum(0)
    at = 0
    while True:
        # Receivers at..to, at least one, that have no more pairs than may be in memory.
        done = int(ends[at - 1]) if at else 0
        to = max(at + 1, int(torch.searchsorted(ends, done + PAIRS_AT_ONCE, right=True)))
        counts = sizes[at:to]
        within = torch.arange(int(counts.sum()), device=batch.device)
        within -= (counts.cumsum(0) - counts).repeat_interleave(counts)
        senders = points[starts[at:to].repeat_interleave(counts) + within]
        yield torch.stack([senders, points[at:to].repeat_interleave(counts)])
        at = to
        if at >= len(points):
            return


def _check(cloud: PointCloud) -> None:
    n = len(cloud.pos)
    if cloud.pos.ndim != 2 or not cloud.pos.shape[1] or not cloud.pos.is_floating_point():
        raise GeometryError(
            f"pos is {cloud.pos.dtype} {list(cloud.pos.shape)}; it must be floating-point numbers "
            f"[points, dimension]"
        )
    if cloud.scalars.ndim != 2 or len(cloud.scalars) != n:
        raise GeometryError(f"scalars are {list(cloud.scalars.shape)}, not [{n}, channels]")
    named = {"pos": cloud.pos, "scalars": cloud.scalars}
    if cloud.vectors is not None:
        shape, wanted = cloud.vectors.shape, (n, cloud.dimension)
        if cloud.vectors.ndim != 3 or (shape[0], shape[2]) != wanted:
            raise GeometryError(f"vectors are {list(shape)}, not [{n}, channels, {wanted[1]}]")
        named["vectors"] = cloud.vectors
    for name, values in named.items():
        if values.dtype != cloud.pos.dtype:
            raise GeometryError(f"{name} are {values.dtype}, but the positions {cloud.pos.dtype}")
        if not torch.isfinite(values).all():
            row = int((~torch.isfinite(values.flatten(1))).any(dim=1).nonzero()[0])
            raise GeometryError(f"{name} of point {row} are not finite: {values[row].tolist()}")
    batch = cloud.batch
    if batch.shape != (n,) or batch.dtype != torch.int64 or (n and int(batch.min()) < 0):
        raise GeometryError(
            f"batch is {batch.dtype} {list(batch.shape)}; it must be the cloud of each of the {n} "
            f"points, int64 from 0"
        )
    if cloud.edges is not None:
        _check_edges(cloud.edges, batch)


def _check_edges(edges: Tensor, batch: Tensor) -> None:
    if edges.ndim != 2 or len(edges) != 2 or edges.dtype != torch.int64:
        raise GeometryError(
            f"edges are {edges.dtype} {list(edges.shape)}; they must be senders and receivers, "
            f"int64 [2, edges]"
        )
    if not edges.numel():
        return
    if int(edges.min()) < 0 or int(edges.max()) >= len(batch):
        wrong = int(((edges < 0) | (edges >= len(batch))).any(dim=0).nonzero()[0])
        raise GeometryError(
            f"edge {wrong} is {edges[:, wrong].tolist()}; points are 0 to {len(batch) - 1}"
        )
    across = batch[edges[0]] != batch[edges[1]]
    if across.any():
        wrong = int(across.nonzero()[0])
        sender, receiver = edges[:, wrong].tolist()
        raise GeometryError(
            f"edge {wrong} leads from point {sender} of cloud {int(batch[sender])} to point "
            f"{receiver} of cloud {int(batch[receiver])}; clouds do not see each other"
        )
