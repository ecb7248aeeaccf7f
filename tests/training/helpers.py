"""Small things to train: random token sequences, and a regression that is no language model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from anabranch.training.example import Example, Item
from anabranch.training.objective import LossOutput, Objective
from anabranch.training.options import TrainOptions

Point = tuple[float, float]
VOCABULARY = 256


def example(length: int, generator: random.Random, trained: float = 0.6) -> Example:
    """Random tokens; the last one is always trained."""
    tokens = [generator.randrange(VOCABULARY) for _ in range(length)]
    marks = [generator.random() < trained for _ in range(length)]
    marks[0], marks[-1] = False, True
    return Example(tokens, marks, source=f"made:{length}")


def sequences(count: int, seed: int = 0, shortest: int = 2, longest: int = 40) -> list[Item]:
    generator = random.Random(seed)
    return [(example(generator.randint(shortest, longest), generator),) for _ in range(count)]


def pairs(count: int, seed: int = 0) -> list[Item]:
    generator = random.Random(seed)
    return [
        (example(generator.randint(3, 20), generator), example(generator.randint(3, 20), generator))
        for _ in range(count)
    ]


class Regression(Objective[Point, Sequence[Point]]):
    """Squared error of a line; ``noise`` draws from all three generators, as real data code may."""

    def __init__(self, micro_batch: int = 3, noise: float = 0.0) -> None:
        self.micro_batch = micro_batch
        self.noise = noise
        self.seen = 0

    def plan(self, items: Sequence[Point]) -> list[Sequence[Point]]:
        return [items[i : i + self.micro_batch] for i in range(0, len(items), self.micro_batch)]

    def denominators(self, items: Sequence[Point]) -> Mapping[str, float]:
        return {"points": len(items)}

    def loss(
        self, model: nn.Module, micro_batch: Sequence[Point], denominators: Mapping[str, float]
    ) -> LossOutput:
        x, y = torch.tensor(micro_batch).T
        if self.noise:
            drawn = random.random() + np.random.standard_normal() + float(torch.rand(()))
            y = y + self.noise * drawn
            self.seen += len(micro_batch)
        error = (model(x[:, None])[:, 0] - y).square().sum()
        return LossOutput(
            error / denominators["points"], {"error": float(error.detach()), "points": len(x)}
        )

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"mse": sums["error"] / sums["points"]}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


def points(count: int) -> list[Point]:
    """On the line ``2x + 1``."""
    return [(i / 10, 2 * i / 10 + 1) for i in range(count)]


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def options(**values: Any) -> TrainOptions:
    """Twenty quick steps without warm-up, unless told otherwise."""
    length = {} if "epochs" in values else {"steps": 20}
    defaults = {"batch": 4, "lr": 0.1, "schedule": "constant", "warmup": 0.0, "precision": "fp32"}
    return TrainOptions(**{**length, **defaults, **values})
