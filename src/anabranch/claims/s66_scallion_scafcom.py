"""S66, SCALLION and SCAFCOM: a sixteenth of the bytes, and no less accurate.

The same clients, rounds and rate for each method with and without its codec.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class CompressedControlledAveraging(Claim):
    """SCAFCOM and SCALLION against themselves uncompressed."""

    id = "S66"
    name = "scallion-scafcom"
    system = "SCALLION and SCAFCOM"
    paper = "Top-1 % and 2 to 4 bits match full precision on MNIST with two labels a client"
    baseline = "the same methods without a codec; FedAvg with SCAFCOM's codec"
    method = "scafcom with TopK(0.05) and Quantise(8), scallion with Quantise(2)"
    threshold = (
        "scafcom within 0.01 accuracy of itself uncompressed at 16 times fewer uplink bytes or "
        "more, and above FedAvg with the same codec"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Train on three splits of digits by shards."""
        from anabranch.claims.federated_experiments.compressed import measure

        return measure(seed, progress)
