"""S14, FedKSeed: under 18 kilobytes a round and client, and as good as directions without end.

Every weight of the TinyOps transformer is trained by four clients with an operation each.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class KSeeds(Claim):
    """A pool of 1,024 directions against one of 65,536, and what is sent."""

    id = "S14"
    name = "fedkseed"
    system = "FedKSeed and FedKSeed-Pro"
    paper = "under 18 kB a round; about 1,000 times less than federated LoRA; no loss of quality"
    baseline = (
        "the same zeroth-order steps with a pool so large that hardly a direction comes twice"
    )
    method = "FedKSeed, k = 1,024, 15 rounds of 20 steps, rate 1e-3, difference 1e-3"
    threshold = (
        "held-out loss falls by at least 3.0 nats, and ends within 10 % of the large pool's; "
        "FedKSeed-Pro at most 10 % above FedKSeed; a client and round cost at most 8 bytes a step "
        "and 4 a direction and 64, the same for a model twice as wide; with k = 4,096 and 200 "
        "steps below 18,000 bytes on SmolLM2-135M"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Learning on TinyOps, then one short round of SmolLM2-135M."""
        from anabranch.claims.federated_experiments.fedkseed import measure

        return measure(seed, progress)
