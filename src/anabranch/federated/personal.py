"""What belongs to one client: held-out examples of its own, and a model of its own.

A method that keeps a personal model puts its tensors into ``ctx.state[PERSONAL]``; they never leave
the site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from anabranch.federated.randomness import generator
from anabranch.training.example import Item
from anabranch.training.trainer import Trainer

PERSONAL = "personal model"
OWN_LOSS = "loss/own"


def personal_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The personal model in a site's state; empty if the method keeps none."""
    inner = state.get("inner", state)  # of a method within a secure sum
    return dict(inner.get(PERSONAL, {}))


def hold_out(parts: Mapping[str, np.ndarray], share: float, seed: int) -> dict[str, np.ndarray]:
    """Of each client's examples the indices of a ``share``, drawn by the seed and its name.

    At least one, if it has two or more, and never all.
    """
    found = {}
    for name, part in parts.items():
        count = min(max(1, round(share * len(part))), len(part) - 1) if share else 0
        chosen = generator("held out", seed, name).permutation(len(part))[: max(0, count)]
        found[name] = part[np.sort(chosen)]
    return found


def own_losses(
    trainer: Trainer[Item], own: Mapping[str, Sequence[Item]]
) -> dict[str, Callable[[], dict[str, float]]]:
    """For each client with examples of its own: the loss of the trainer's model on them."""

    def score(items: Sequence[Item]) -> Callable[[], dict[str, float]]:
        return lambda: {OWN_LOSS: trainer.evaluate(items)["loss"]}

    return {name: score(items) for name, items in own.items() if len(items)}
