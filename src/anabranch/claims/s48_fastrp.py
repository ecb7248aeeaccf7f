"""S48, FastRP: node vectors in a hundredth of DeepWalk's time, and no worse.

Both embed the same graph with the same number of columns on one thread; the same classifier
predicts the labels of the other nodes from a share of them.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class FastRandomProjection(Claim):
    """FastRP against DeepWalk on multi-label node classification."""

    id = "S48"
    name = "fastrp"
    system = "FastRP (very sparse random projection)"
    paper = "over 4,000 times faster than DeepWalk and node2vec at comparable or better quality"
    baseline = "DeepWalk: 10 walks of 40 steps from each node, gensim skip-gram, window 10, 1 epoch"
    method = "FastRP, 128 columns, the authors' weights and beta"
    threshold = (
        "at least 100x faster; micro-F1 and macro-F1 not lower at 10, 30, ..., 90 % labels; first "
        "power alone 0.1 lower in micro-F1; on BlogCatalog published F1 at 512 columns within 0.010"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Embed with both, then classify with 10 to 90 % of the labels known."""
        from anabranch.claims.graph_experiments.fastrp import measure

        return measure(seed, progress)
