"""S85, FedCompass: work by speed, so that nobody waits and little is stale."""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class ComputingPowerAwareScheduling(Claim):
    """FedCompass against synchronous and asynchronous averaging, in virtual time."""

    id = "S85"
    name = "fedcompass"
    system = "FedCompass (computing power aware scheduler)"
    paper = "faster than FedAvg on unequal clients, more accurate than FedAsync and FedBuff"
    baseline = "FedAvg, FedAsync and FedBuff (3) with 50 steps a task, on the same devices"
    method = "FedCompass, 10 to 50 steps, latest factor 1.2"
    threshold = (
        "digits, 10 log-uniform devices: fewer virtual seconds to 90 % than FedAvg and FedAsync, "
        "mean of 3 seeds"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Four methods for 30 virtual seconds."""
        from anabranch.claims.federated_experiments.asynchronous import fedcompass

        return fedcompass(seed, progress)
