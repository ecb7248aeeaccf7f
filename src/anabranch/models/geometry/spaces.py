"""Where features live: points, points x grid of directions, or directed edges.

A :class:`Space` is everything that layers need to know of a cloud's geometry, computed once a
forward pass. Features are [nodes, orientations, channels] in all three modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.models.geometry.errors import GeometryError
from anabranch.models.geometry.invariants import invariants
from anabranch.models.geometry.point_cloud import (
    PointCloud,
    with_loops,
    without_loops,
)


@dataclass(frozen=True)
class Space:
    """Nodes, edges between them, and the invariants of both."""

    senders: Tensor
    """[edges] nodes."""
    receivers: Tensor
    distance: Tensor
    """[edges] between positions."""
    spatial: Tensor
    """[edges, orientations, k]; of a full kernel [edges, receiving, sending orientations, k]."""
    own: Tensor | None = None
    """[k] or [receiving, sending orientations, k]: of a node and itself, the same everywhere, so
    that a loop need not be an edge. None if loops are among the edges."""
    fibre: Tensor | None = None
    """[receiving, sending orientations, 1] of a separable kernel on a grid."""
    directions: Tensor | None = None
    """[1 or nodes, orientations, D] unit vectors."""
    base: Tensor | None = None
    """[nodes] the point of each node, where they are not the same."""
    num_points: int = 0
    dimension: int = 3


def point_space(cloud: PointCloud, edges: Tensor) -> Space:
    """Positions only: one node a point, one invariant, the distance."""
    senders, receivers = without_loops(edges)
    spatial = invariants(cloud.pos[senders] - cloud.pos[receivers])
    return Space(
        senders,
        receivers,
        spatial[:, 0],
        spatial.unsqueeze(1),
        spatial.new_zeros(1),
        num_points=cloud.num_points,
        dimension=cloud.dimension,
    )


def grid_space(
    cloud: PointCloud, edges: Tensor, grid: Tensor, separable: bool = True, extra: bool = False
) -> Space:
    """Every point with every direction of ``grid`` [O, D]."""
    senders, receivers = without_loops(edges)
    relative = cloud.pos[senders] - cloud.pos[receivers]
    nowhere = torch.zeros_like(grid[0])
    if separable:
        spatial = invariants(relative[:, None], grid)  # [E, O, 2]
        own = invariants(nowhere, grid[0])
        fibre = (grid @ grid.T).unsqueeze(-1)
    else:
        spatial = invariants(relative[:, None, None], grid[:, None], grid, extra)  # [E, O, O, 3]
        own = invariants(nowhere, grid[:, None], grid, extra)
        fibre = None
    return Space(
        senders,
        receivers,
        invariants(relative)[:, 0],
        spatial,
        own,
        fibre,
        grid.unsqueeze(0),
        num_points=cloud.num_points,
        dimension=cloud.dimension,
    )


def edge_space(cloud: PointCloud, edges: Tensor, extra: bool = False) -> Space:
    """Every edge is a node: at its receiver, with the direction to its sender.

    Two nodes see each other if their points do, or are the same. Exactly equivariant, and larger:
    a point with d neighbours has d nodes, and an edge of points d^2 of nodes.

    Raises :class:`GeometryError` for points without a neighbour, and for neighbours at one place.
    """
    edges = without_loops(edges)
    lonely = torch.bincount(edges[1], minlength=cloud.num_points) == 0
    if lonely.any():
        raise GeometryError(
            f"point {int(lonely.nonzero()[0])} has no neighbour that would give it a direction; "
            f"edge mode (orientations=-1) needs one for each point: widen the radius"
        )
    relative = cloud.pos[edges[0]] - cloud.pos[edges[1]]
    apart = torch.linalg.vector_norm(relative, dim=-1, keepdim=True)
    if (apart == 0).any():
        wrong = int((apart[:, 0] == 0).nonzero()[0])
        sender, receiver = edges[:, wrong].tolist()
        raise GeometryError(
            f"points {sender} and {receiver} are at the same place, so that the direction from one "
            f"to the other is undefined in edge mode (orientations=-1)"
        )
    directions, base = relative / apart, edges[1]
    senders, receivers = _lifted_edges(with_loops(edges, cloud.num_points), base, cloud.num_points)
    between = cloud.pos[base[senders]] - cloud.pos[base[receivers]]
    spatial = invariants(between, directions[receivers], directions[senders], extra)
    return Space(
        senders,
        receivers,
        invariants(between)[:, 0],
        spatial.unsqueeze(1),
        directions=directions.unsqueeze(1),
        base=base,
        num_points=cloud.num_points,
        dimension=cloud.dimension,
    )


def lift(scalars: Tensor, vectors: Tensor | None, space: Space) -> Tensor:
    """Features [nodes, orientations, channels] of points' scalars [N, C] and vectors [N, V, D].

    A scalar is the same in all directions, a vector becomes its component along each.
    """
    if space.base is not None:
        scalars = scalars[space.base]
        vectors = None if vectors is None else vectors[space.base]
    if space.directions is None:
        return scalars.unsqueeze(1)
    orientations = space.directions.shape[1]
    lifted = [scalars.unsqueeze(1).expand(-1, orientations, -1)]
    if vectors is not None:
        lifted.append((space.directions.unsqueeze(-2) * vectors.unsqueeze(1)).sum(-1))
    return torch.cat(lifted, dim=-1)


def read_out(features: Tensor, space: Space, num_scalars: int) -> tuple[Tensor, Tensor]:
    """Scalars [points, C] and vectors [points, V, D] of features [nodes, orientations, C + V].

    A scalar is the mean over a point's directions o, a vector the mean of f(o) o. On a grid that
    is no coarser than the octahedron's lifting a vector and reading it out gives v / D.
    """
    scalars, along = features[..., :num_scalars], features[..., num_scalars:]
    means = scalars.mean(1)
    if space.directions is None:
        return means, features.new_zeros(space.num_points, 0, space.dimension)
    orientations = space.directions.shape[1]
    directions = space.directions.expand(len(features), -1, -1)
    vectors = torch.einsum("nov,nod->nvd", along, directions) / orientations
    if space.base is None:
        return means, vectors
    return _mean_by_point(means, space), _mean_by_point(vectors, space)


def _mean_by_point(values: Tensor, space: Space) -> Tensor:
    assert space.base is not None
    counts = torch.bincount(space.base, minlength=space.num_points).to(values.dtype)
    total = values.new_zeros(space.num_points, *values.shape[1:]).index_add(0, space.base, values)
    return total / counts.view(-1, *[1] * (values.ndim - 1))


def _lifted_edges(edges: Tensor, base: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """Every node at an edge's sender to every node at its receiver."""
    nodes = torch.argsort(base, stable=True)
    counts = torch.bincount(base, minlength=num_points)
    starts = counts.cumsum(0) - counts
    sending, receiving = edges
    many = counts[sending] * counts[receiving]
    edge = torch.arange(len(many), device=base.device).repeat_interleave(many)
    within = torch.arange(len(edge), device=base.device) - (many.cumsum(0) - many)[edge]
    width = counts[sending][edge]
    senders = nodes[starts[sending][edge] + within % width]
    receivers = nodes[starts[receiving][edge] + within // width]
    return senders, receivers
