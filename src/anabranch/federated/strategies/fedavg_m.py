"""FedAvg-M: the direction of everyone's last round in every local step."""

from __future__ import annotations

from anabranch.federated.strategies.controlled import Controlled, fraction


class FedAvgM(Controlled):
    """Local steps along the own gradient and everyone's last direction (Cheng et al. 2024).

    Use it where clients' data differ much and most take part in each round: a client then drifts
    ``beta`` times as far, and needs no memory between rounds. Each client steps along
    ``beta * gradient + (1 - beta) * g``, g being the mean direction of the round before (section
    3). ``beta`` 1 is FedAvg with equal weights. With few clients of many in a round it is FedCM,
    without the paper's guarantee; prefer ``scaffold_m``.

    ``variance_reduced`` replaces the mix by ``gradient + (1 - beta) (g - gradient at the version
    before)``, both of the same examples: twice the work, less noise, and one round in which only g
    is found. It needs much smaller local rates: rate * steps * smoothness below 2 ``beta``.

    ``server_lr`` multiplies the step. Known cost: twice the bytes to clients (three times when
    variance reduced), g being as large as the model. Local training must be plain SGD.
    """

    name = "fedavg_m"
    controls = False

    def __init__(
        self, beta: float = 0.1, variance_reduced: bool = False, server_lr: float = 1.0
    ) -> None:
        super().__init__(server_lr)
        self.beta = fraction("beta", beta)
        self.variance_reduced = variance_reduced
