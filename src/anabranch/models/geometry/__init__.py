"""Networks of point clouds that turn with them: PONITA, and EGNN to compare with.

What belongs here: clouds and their edges, invariants, grids of directions, the networks, how far
they are from equivariance, and the charged particles that they are measured on. How they are
trained is in :mod:`anabranch.training.point_clouds`.
"""

from anabranch.models.geometry.egnn import EGNN, EGNNConfig
from anabranch.models.geometry.equivariance import Deviation, equivariance_error, error_by_angle
from anabranch.models.geometry.errors import GeometryError
from anabranch.models.geometry.grids import grid_symmetries, orientation_grid
from anabranch.models.geometry.invariants import invariants
from anabranch.models.geometry.nbody import ChargedSystems, charged_nbody, linear_motion
from anabranch.models.geometry.point_cloud import (
    PointCloud,
    collate,
    complete_edges,
    radius_edges,
)
from anabranch.models.geometry.ponita import GeometryOutput, Ponita, PonitaConfig
from anabranch.models.geometry.rotations import random_rotations, rotations_by

__all__ = [
    "EGNN",
    "ChargedSystems",
    "Deviation",
    "EGNNConfig",
    "GeometryError",
    "GeometryOutput",
    "PointCloud",
    "Ponita",
    "PonitaConfig",
    "charged_nbody",
    "collate",
    "complete_edges",
    "equivariance_error",
    "error_by_angle",
    "grid_symmetries",
    "invariants",
    "linear_motion",
    "orientation_grid",
    "radius_edges",
    "random_rotations",
    "rotations_by",
]
