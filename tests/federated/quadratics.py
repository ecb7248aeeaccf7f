"""Sites whose losses are quadratics with exact gradients, and what to compare methods with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from anabranch.federated import Site
from anabranch.federated.local import LocalTraining
from anabranch.federated.scheduling import Sampler
from anabranch.training.objective import LossOutput, Objective
from anabranch.training.options import TrainOptions


@dataclass(frozen=True)
class Bowl:
    """``(w - target) H (w - target) / 2`` in float64."""

    hessian: np.ndarray
    target: np.ndarray

    def gradient(self, w):
        return self.hessian @ (w - self.target)


class Point(nn.Module):
    """A vector to move, cut in two so that methods see several tensors."""

    def __init__(self, size):
        super().__init__()
        self.head = nn.Parameter(torch.zeros(2))
        self.tail = nn.Parameter(torch.zeros(size - 2))


class Quadratic(Objective):
    def plan(self, items):
        return [items]

    def denominators(self, items):
        return {"bowls": len(items)}

    def loss(self, model, micro_batch, denominators):
        w = torch.cat([model.head, model.tail])
        total = torch.zeros(())
        for bowl in micro_batch:
            away = w - torch.from_numpy(bowl.target).float()
            total = total + away @ torch.from_numpy(bowl.hessian).float() @ away / 2
        return LossOutput(total / denominators["bowls"])


def bowls(count, size=5, spread=2.0, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        axes, _ = np.linalg.qr(rng.standard_normal((size, size)))
        hessian = axes @ np.diag(10 ** np.linspace(-1, 0, size)) @ axes.T
        made.append(Bowl(hessian, spread * rng.standard_normal(size)))
    return made


def places(made):
    return [Site(f"c{index}", [bowl]) for index, bowl in enumerate(made)]


def local(lr=0.1, steps=4, **options):
    settled = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "clip": None}
    values = {**settled, "lr": lr, "steps": steps, "batch": 1, "precision": "fp32", **options}
    return LocalTraining(Quadratic(), TrainOptions.model_validate(values))


def position(tensors):
    return np.concatenate([tensors["head"].double().numpy(), tensors["tail"].double().numpy()])


def gradient(made, w):
    return np.mean([bowl.gradient(w) for bowl in made], axis=0)


class InTurn(Sampler):
    """A window of clients that moves by one each round."""

    def __init__(self, count):
        self.count = count
        self.rounds = []

    def needs(self, clients):
        return self.count

    def pick(self, clients, rng):
        first = len(self.rounds)
        chosen = sorted({clients[(first + i) % len(clients)] for i in range(self.count)})
        self.rounds.append([clients.index(name) for name in chosen])
        return chosen
