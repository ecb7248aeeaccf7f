"""S86, DFedSAM-MGS: flat minima survive averaging with neighbours."""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class DecentralisedSharpnessAware(Claim):
    """DFedSAM-MGS against DFedAvgM on a ring."""

    id = "S86"
    name = "dfedsam"
    system = "DFedSAM-MGS (decentralised, sharpness-aware, repeated gossip)"
    paper = "more accurate than DFedAvgM, most on sparse graphs, on CIFAR and EMNIST"
    baseline = "DFedAvgM, momentum 0.9, one exchange a round"
    method = "DFedSAM-MGS, rho 0.05, four exchanges a round"
    threshold = (
        "digits, Dirichlet 0.1, ring of 10, 60 rounds: mean accuracy of the peers' own models "
        "higher in at least 4 of 5 seeds"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """Both, and DFedAvgM with as many exchanges."""
        from anabranch.claims.federated_experiments.peers import measure

        return measure(seed, progress)
