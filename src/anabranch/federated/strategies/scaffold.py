"""SCAFFOLD, and SCAFFOLD-M with everyone's last direction in every local step."""

from __future__ import annotations

from anabranch.federated.strategies.controlled import Controlled, fraction


class Scaffold(Controlled):
    """Corrects each local step by what the client's data differ from everyone's (Karimireddy 2020).

    Use it where clients' data differ much and clients come back: each keeps a control variate, the
    mean gradient of its last task (algorithm 1, option II). Steps go along ``gradient - own control
    + mean control``. Only one vector is sent back, what to add to the own control; the server finds
    the model's change from it, with the same iterates as the original's two (Huang et al. 2024,
    section 3).

    ``server_lr`` multiplies the step. With a local optimiser other than plain SGD, controls are
    means of the losses' gradients, and the server steps along those; ``server_lr`` then needs
    tuning. A lossy codec of the federation lets controls and their mean part ways: use ``scallion``
    or ``scafcom`` to send less.
    """

    name = "scaffold"


class ScaffoldM(Controlled):
    """SCAFFOLD with everyone's last direction in local steps (Cheng et al. 2024, section 4).

    Use it as SCAFFOLD, where few clients take part in a round or gradients are noisy. Steps go
    along ``beta (gradient - own control + mean control) + (1 - beta) g``; ``beta`` 1 is SCAFFOLD.

    ``variance_reduced``, ``server_lr`` and the cost are those of ``fedavg_m``; variance reduced, a
    client also sends two vectors. Local training must be plain SGD.
    """

    name = "scaffold_m"

    def __init__(
        self, beta: float = 0.1, variance_reduced: bool = False, server_lr: float = 1.0
    ) -> None:
        super().__init__(server_lr)
        self.beta = fraction("beta", beta)
        self.variance_reduced = variance_reduced
