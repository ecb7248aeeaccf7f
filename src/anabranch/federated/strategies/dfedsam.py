"""DFedSAM: peers look for flat minima, which averaging with neighbours does not spoil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from anabranch.federated.client import Answer, Client, ClientContext
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import Value
from anabranch.federated.strategies.dfedavgm import DecayingClient, DFedAvgM
from anabranch.training.hooks import Hook
from anabranch.training.sam import SharpnessAware


class DFedSAM(DFedAvgM):
    """DFedAvgM with sharpness-aware local steps (Shi et al., ICML 2023, algorithm 1).

    Use it on sparse graphs with unlike data, where models that fit their own site well are spoilt
    by averaging. ``rho`` is how far each step looks around; 0 is DFedAvgM. A local step costs two
    gradients, and counts as two units of work. The other options are DFedAvgM's.

    It need not bring the models nearer to each other; it makes averaging them harmless.
    """

    name = "dfedsam"

    def __init__(self, rho: float = 0.05, **options: Any) -> None:
        super().__init__(**options)
        SharpnessAware(rho)  # checks it
        self.rho = rho

    def trains(self, local: LocalTraining) -> Client:
        """Sharpness-aware."""
        return _SharpnessAwareClient(local, self.lr_decay, 1 + self.mixing_steps, self.rho)


class DFedSAMMGS(DFedSAM):
    """DFedSAM that averages four times a round (Shi et al., ICML 2023, algorithm 2).

    Use it where DFedSAM's models still differ too much and messages are cheap. ``mixing_steps``
    shrink disagreement by the graph's second eigenvalue each.
    """

    name = "dfedsam-mgs"

    def __init__(self, rho: float = 0.05, mixing_steps: int = 4, **options: Any) -> None:
        super().__init__(rho, mixing_steps=mixing_steps, **options)


class _SharpnessAwareClient(DecayingClient):
    def __init__(self, local: LocalTraining, lr_decay: float, versions: int, rho: float) -> None:
        super().__init__(local, lr_decay, versions)
        self.rho = rho

    def run(self, ctx: ClientContext, kind: str, payload: dict[str, Value]) -> Answer:
        """As without, at twice the work."""
        answer = super().run(ctx, kind, payload)
        if self.rho:
            ctx.spend(ctx.units)
        return answer

    def hooks(self, ctx: ClientContext, start: Mapping[str, Tensor]) -> Sequence[Hook]:
        """Climb before every step."""
        return [SharpnessAware(self.rho)] if self.rho else []
