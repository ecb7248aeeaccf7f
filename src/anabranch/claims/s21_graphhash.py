"""S21, GraphHash: ids of one cluster share a row, and little is lost.

One recommender, trained the same way on every table of the same size; what differs is which ids
share a row.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class GraphClusteredRows(Claim):
    """Rows shared by clusters against rows shared by hashes, at 75 % fewer rows."""

    id = "S21"
    name = "graphhash"
    system = "GraphHash (embedding rows shared by graph clusters)"
    paper = "on average 101.5 % higher recall than hashing at more than 75 % fewer rows"
    baseline = "modulo, frequency, double, double-frequency and locality-sensitive hashing; full"
    method = "Louvain clusters of Barber's modularity, resolution found from the budget"
    threshold = (
        "at 75 % fewer rows recall@20 above every hashing baseline on every data set: planted "
        "communities, MovieLens-100k, Amazon Electronics; on the planted ones also at 96.7 % "
        "fewer, with at least 0.9 of the full table's recall"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Train matrix factorisation on every table of every data set."""
        from anabranch.claims.graph_experiments.graphhash import measure

        return measure(seed, progress)
