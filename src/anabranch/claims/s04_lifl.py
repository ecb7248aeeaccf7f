"""S04, LIFL: updates that stay in shared memory, and aggregators that exist while they arrive.

Real processes on this machine; the updates are random numbers, the means are checked.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class Lifl(Claim):
    """Key passing, eager and warm aggregators and placement against what they replace."""

    id = "S04"
    name = "lifl"
    system = "LIFL (event-driven hierarchical aggregation)"
    paper = "1.6x sooner to 70 % than a serverful system and 2.7x than serverless, 5x less CPU"
    baseline = (
        "pickle over pipes; lazy, cold aggregators; WorstFit; a process per client on sockets"
    )
    method = "keys into shared memory, eager aggregators from a warm pool, BestFit"
    threshold = (
        "45 MB updates >= 1.5x faster than by pipe; eager <= 0.8x lazy; second round <= 0.3x "
        "first; 1, 3, 5 nodes against 5, 5, 5; 64 clients >= 2x faster with <= half the CPU seconds"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Run each side in turn, in processes of their own."""
        from anabranch.claims.federated_experiments.lifl import measure

        return measure(seed, progress)
