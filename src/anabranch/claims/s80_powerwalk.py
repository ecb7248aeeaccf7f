"""S80, PowerWalk: few short walks and an exact first step answer personalised PageRank queries.

Error against index size and depth on a social network; time against power iteration stopped as soon
as it is as precise, on a graph of a million edges; a batch against its queries one by one. One
thread, times are processor seconds, so that other work on the machine decides nothing.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class PowerWalk(Claim):
    """Indexed decomposition against power iteration and against single queries."""

    id = "S80"
    name = "powerwalk"
    system = "PowerWalk (personalised PageRank by vertex-centric decomposition)"
    paper = "far fewer walks at equal precision; tens of thousands of queries in a few seconds"
    baseline = "fingerprints alone; power iteration stopped at equal precision; single queries"
    method = "full-path fingerprints, one or two pushes, shared decomposition of a batch"
    threshold = (
        "50 walks: L1 error below end points' and two pushes cut it 10x, precision@100 >= 0.95; "
        "10 walks pushed beat 100 alone; one query >= 10x faster than power iteration at equal "
        "precision@50 on 1M edges, with one push and with two; 1,000 at once >= 3x faster than one "
        "by one on both graphs, equal bit for bit"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Error, then single queries, then a batch of 1,000."""
        from anabranch.claims.graph_experiments.powerwalk import measure

        return measure(seed, progress)
