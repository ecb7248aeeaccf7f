"""What can be wrong with a point cloud, or with what is asked of a model of one."""

from __future__ import annotations

from anabranch.errors import AnabranchError


class GeometryError(AnabranchError, ValueError):
    """A point cloud, a grid or an option cannot be used as given; the message names it."""

    exit_code = 2
    status = 400
    code = "invalid_geometry"
