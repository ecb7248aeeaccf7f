"""S01, PONITA: a grid of directions is worth its price on charged particles.

PONITA and EGNN train for the same processor seconds on the same systems, and are compared with each
other and with straight lines. How far PONITA is from equivariance is reported beside its error.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class PositionOrientation(Claim):
    """PONITA against EGNN and fitted linear motion, at equal processor time."""

    id = "S01"
    name = "ponita"
    system = "PONITA (weight sharing in position-orientation space)"
    paper = "N-body mean squared error: PONITA 0.0043, SEGNN 0.0043, EGNN 0.0070"
    baseline = "EGNN (width 64, 4 layers) for as many processor seconds; x + tau v with fitted tau"
    method = "PONITA: width 32, basis 32, 12 directions (Fibonacci), 3 layers, layer scale 0.1"
    threshold = (
        "test error <= 0.8x EGNN's and <= 0.15x linear motion's, mean of two seeds; generator: tau "
        "0.70 to 0.77, error 0.07 to 0.10; modes 0 and -1, grid turned along, and the grid's own "
        "symmetries exact to 1e-4 in float32 and 1e-10 in float64"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Generator, both trainings for each seed, then equivariance."""
        from anabranch.claims.geometry_experiments.ponita import measure

        return measure(seed, progress)
