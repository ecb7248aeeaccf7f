"""What the claims on adapters share: TinyOps with LoRA, four clients with an operation each."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from anabranch import adapters
from anabranch.claims.federated_experiments import seeded
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated import Site
from anabranch.federated.shared import lent
from anabranch.federated.strategies.fedit import FedIT

NAMES = [tinyops.OPERATIONS[operation][0] for operation in tinyops.NEW]
"""Of the operations that are to be learned; client i has the i-th only."""


def lora(seed: int, r: int = 8) -> Any:
    """TinyOps with LoRA of scale 2 on every linear module; A is drawn by the seed, B is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return adapters.build(
            "lora",
            tinyops.pretrained(),
            r=r,
            lora_alpha=2 * r,
            lora_dropout=0.0,
            target_modules="all-linear",
        )


def scores(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Held-out loss by operation."""
    with lent(model, tensors):
        figures = tinyops.score(model)
    return {name: figures[f"loss/{name}"] for name in NAMES}


def alone(seed: int, rounds: int, steps: int = 10) -> list[dict[str, float]]:
    """Each client's own adapter after as many steps as in the federation, by operation."""
    model = lora(seed)
    found = []
    for site in seeded.sites(seed):
        outcome = seeded.run(FedIT(), seed, rounds, model=model, places=[site], steps=steps)
        found.append(scores(model, outcome.federation.server.tensors))  # type: ignore[attr-defined]
    return found


def pooled(seed: int, rounds: int, steps: int = 10) -> dict[str, float]:
    """One adapter on everyone's examples, after as many steps as all clients take together."""
    model = lora(seed)
    places = seeded.sites(seed)
    everything = Site("everyone", [item for site in places for item in site.data])
    outcome = seeded.run(
        FedIT(), seed, rounds, model=model, places=[everything], steps=steps * len(places)
    )
    return scores(model, outcome.federation.server.tensors)  # type: ignore[attr-defined]


def mean(losses: Mapping[str, float]) -> float:
    """Over the operations."""
    return fmean(losses.values())


def unseen(losses: Mapping[str, float], client: int) -> float:
    """Over the operations that a client does not have."""
    return fmean(loss for name, loss in losses.items() if name != NAMES[client])
