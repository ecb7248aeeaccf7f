"""S35, Fed-SB: fewer bytes than averaged LoRA, no worse, and hurt less by the noise of privacy.

Four clients tune the TinyOps transformer, each with one operation that it does not know.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class SilverBullet(Claim):
    """R between frozen factors against LoRA's A and B."""

    id = "S35"
    name = "fed-sb"
    system = "Fed-SB"
    paper = "up to 230x less communication at higher accuracy; better at every epsilon"
    baseline = "FedIT with LoRA r = 8 on the same modules"
    method = (
        "Fed-SB, r = 23, factors made by the clients in a first round; then 20 rounds of 10 steps"
    )
    threshold = (
        "over 3 seeds each: held-out loss at most FedIT's, and messages at most 40 % of its bytes; "
        "private (512 examples a client, clip 0.5, 6 rounds of 10 steps, 2 seeds): what noise of 2 "
        "adds to the loss is at most 60 % of what it adds to FedIT's"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Both methods without noise, then with it."""
        from anabranch.claims.federated_experiments.fed_sb import measure

        return measure(seed, progress)
