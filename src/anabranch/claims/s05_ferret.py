"""S05, Ferret: FedAvg's learning with a hundredth of its bytes, and fewer rounds than FedKSeed.

Every weight of the TinyOps transformer is trained by four clients with an operation each.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class FerretClaim(Claim):
    """Inner products against whole updates, and against zeroth-order steps."""

    id = "S05"
    name = "ferret"
    system = "Ferret"
    paper = (
        "close to FedAvg with about 10^6 times less communication; far fewer rounds than FedKSeed"
    )
    baseline = (
        "FedAvg with the same local steps, at its own best local and server rate; FedKSeed with 20 "
        "steps a round"
    )
    method = "Ferret, k = 32 a block (128 beside), 10 local steps, 15 rounds, at its own best rates"
    threshold = (
        "held-out loss at most 15 % above FedAvg's with at most 1/200 of its upload; FedKSeed's "
        "loss after 15 rounds reached in 7; at least 90x fewer upload bytes on SmolLM2-135M"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Learning on TinyOps, then one short round of SmolLM2-135M."""
        from anabranch.claims.federated_experiments.ferret import measure

        return measure(seed, progress)
