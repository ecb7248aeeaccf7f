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
    baseline = "FedAvg, FedAsync and FedBuff (3) with 100 steps a task, on the same devices"
    method = "FedCompass, 20 to 100 steps, latest factor 1.2"
    threshold = (
        "digits, 10 devices: virtual seconds to 90 % <= 0.7x FedAvg's where times are exponential "
        "and <= 0.9x where they are normal, 3 seeds; fewer than FedAvg and than FedAsync where "
        "they are log-uniform, 5 seeds"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Four methods to the target, on three kinds of devices."""
        from anabranch.claims.federated_experiments.asynchronous import fedcompass

        return fedcompass(seed, progress)
