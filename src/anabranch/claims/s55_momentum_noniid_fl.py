"""S55, FedAvg-M and SCAFFOLD-M: momentum against clients that differ.

The same clients, rounds and local steps for each method and its momentum form.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class MomentumNonIID(Claim):
    """Momentum forms against their bases on clients of few labels."""

    id = "S55"
    name = "momentum-noniid-fl"
    system = "FedAvg-M, SCAFFOLD-M and variance-reduced forms"
    paper = "momentum forms beat FedAvg and SCAFFOLD on CIFAR-10, most where clients differ much"
    baseline = "FedAvg with equal weights; SCAFFOLD with 5 of 50 clients a round"
    method = "fedavg_m and scaffold_m, beta 0.1 and 0.2; all four at their own best rates"
    threshold = (
        "mean client loss lower than the base's on at least 4 of 5 splits for both, and FedAvg-M's "
        "at most 0.8 of FedAvg's on average"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Train all four on five Dirichlet splits of digits."""
        from anabranch.claims.federated_experiments.momentum import measure

        return measure(seed, progress)
