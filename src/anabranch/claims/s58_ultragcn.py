"""S58, UltraGCN: a weighted loss in the place of graph convolutions, as good and trained faster.

Both train on one thread from the same interactions; each keeps the epoch that is best on the same
validation interactions, which decide nothing else.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class UltraSimplifiedConvolution(Claim):
    """UltraGCN against LightGCN and matrix factorisation: quality, and time to it."""

    id = "S58"
    name = "ultragcn"
    system = "UltraGCN (graph convolution as a loss)"
    paper = "higher recall@20 than LightGCN on all six sets, more than 10x less training time"
    baseline = "LightGCN, 3 layers, at the better of two rates; matrix factorisation with BPR"
    method = "UltraGCN, 64 columns, its settings for small data"
    threshold = (
        "mean test recall@20 over two splits at or above LightGCN's; at least 10x less processor "
        "time to the validation recall that LightGCN reaches"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Train all on two random splits."""
        from anabranch.claims.graph_experiments.ultragcn import measure

        return measure(seed, progress)
