"""Cross entropy of answer tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from anabranch.errors import ConfigurationError
from anabranch.training.example import Item
from anabranch.training.losses.base import Loss, TokenScores
from anabranch.training.objective import LossOutput


class Causal(Loss):
    """Next-token cross entropy, averaged over the trained tokens of the whole step.

    ``normalise="token"`` counts every token the same; ``"sample"`` averages within each example
    first, so that long answers weigh no more than short ones.

    Example: ``LanguageObjective(Causal())``, in a recipe ``loss: {name: causal}``.
    """

    name = "causal"

    def __init__(self, normalise: Literal["token", "sample"] = "token") -> None:
        if normalise not in ("token", "sample"):
            raise ConfigurationError(f"normalise must be token or sample, not {normalise!r}")
        self.normalise = normalise

    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        """``tokens``: trained tokens; ``samples``: examples."""
        examples = [example for item in items for example in item]
        return {"tokens": sum(e.targets for e in examples), "samples": len(examples)}

    def __call__(self, scores: TokenScores, denominators: Mapping[str, float]) -> LossOutput:
        """Sum of the losses over the step's count."""
        total = scores.nll.sum()
        sums = {"nll": float(total.detach()), "tokens": float(len(scores.nll))}
        if self.normalise == "token":
            return LossOutput(total / denominators["tokens"], sums)
        lengths = [example.targets for item in scores.items for example in item]
        # Scores come in order of item and example, so that each length repeats for its own tokens.
        counts = torch.tensor(lengths, device=scores.nll.device)
        weights = (1 / counts).repeat_interleave(counts)
        return LossOutput((scores.nll * weights).sum() / denominators["samples"], sums)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """``nll`` per token and its ``perplexity``."""
        if not sums.get("tokens"):
            return {}
        nll = sums["nll"] / sums["tokens"]
        return {"nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf}
