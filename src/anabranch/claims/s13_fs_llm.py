"""S13, FederatedScope-LLM: federated beats local tuning, and offsite tuning works when plugged in.

Four clients with an operation each tune TinyOps transformers: LoRA on one of two layers, and the
outer layers around an emulator of one of eight. SmolLM2-135M is asked real tasks before and after.
"""

from __future__ import annotations

from anabranch.claims.base import Claim, Measurement
from anabranch.models.progress import Progress


class Package(Claim):
    """Modes of one set-up, tuning without the full model, and real tasks."""

    id = "S13"
    name = "fs-llm"
    system = "FederatedScope-LLM"
    paper = (
        "federated beats local tuning; LoRA is tens of MB against 13-28 GB; offsite tuning works"
    )
    baseline = "each client alone; the base; full fine-tuning of all layers"
    method = (
        "compare() with LoRA r = 8, 20 rounds of 10 steps; offsite with layers 2 to 5 of 8 as an "
        "emulator of half of them, 8 rounds of 8 steps, without and with 150 steps of alignment"
    )
    threshold = (
        "over 3 seeds each: federated loss at most 0.3 of the mean client's; a LoRA message at "
        "most 20 % of the model; plugged in: at most 0.5 of the loss before, alignment lowers it "
        "by at least 10 %, full fine-tuning is not worse"
    )

    def measure(self, seed: int, progress: Progress) -> Measurement:
        """The modes over three seeds, offsite tuning, and real tasks."""
        from anabranch.claims.federated_experiments.fs_llm import measure

        return measure(seed, progress)
