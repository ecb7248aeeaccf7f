"""S43, FedIT: a federation learns what no client has, and far more than each client alone.

Four clients tune LoRA on the TinyOps transformer, each with one operation; then four clients with a
kind of task each tune SmolLM2-135M.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class FederatedInstructions(Claim):
    """Averaged LoRA against everyone's own, and against one adapter on all examples."""

    id = "S43"
    name = "fedit"
    system = "FedIT (Shepherd)"
    paper = "tuned together a 7B model is rated above each client's own and above the base"
    baseline = "each client alone with as many steps; one adapter on the pooled examples"
    method = "FedIT, LoRA r = 8 on all linear modules, 20 rounds of 10 steps, 4 clients"
    threshold = (
        "held-out loss over all operations at most 0.3 of the mean client's alone, for each of 3 "
        "seeds, and every client gains on the operations that it never saw; SmolLM2-135M with four "
        "kinds of tasks, 2 rounds of 4 steps: mean held-out loss below the base's and not above "
        "the mean of the clients' own"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """TinyOps over three seeds, then SmolLM2-135M once."""
        from anabranch.claims.federated_experiments.fedit import measure

        return measure(seed, progress)
