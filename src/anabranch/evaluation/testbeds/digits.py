"""Digits: 1,797 images of 8 x 8 pixels, and a perceptron of 4,810 parameters.

1,437 images to train on and 360 to test, pixels scaled to [0, 1]. Needs scikit-learn, which brings
the images along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import MissingExtra
from anabranch.federated import DeviceProfile, Site
from anabranch.federated.coordinator import Coordinator
from anabranch.federated.local import LocalTraining
from anabranch.federated.shared import lent
from anabranch.training.objective import LossOutput, Objective
from anabranch.training.options import TrainOptions

TRAIN, TEST = 1437, 360


@dataclass(frozen=True)
class Images:
    """``pixels`` [n, 64] float32, ``labels`` [n] int64."""

    pixels: Tensor
    labels: Tensor


class Digits(Objective[int, Tensor]):
    """Cross entropy of a classifier; an item is the number of a training image."""

    batchable = True

    def plan(self, items: Sequence[int]) -> list[Tensor]:
        """All at once."""
        return [torch.tensor(items)]

    def denominators(self, items: Sequence[int]) -> Mapping[str, float]:
        """How many images a step has."""
        return {"images": len(items)}

    def loss(
        self, model: nn.Module, micro_batch: Tensor, denominators: Mapping[str, float]
    ) -> LossOutput:
        """The mean over the step."""
        train, _ = images()
        scores = model(train.pixels[micro_batch])
        total = F.cross_entropy(scores, train.labels[micro_batch], reduction="sum")
        return LossOutput(total / denominators["images"])


@cache
def images() -> tuple[Images, Images]:
    """Training and test images, always the same."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "train") from None
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = torch.from_numpy(pixels[order] / 16).to(torch.float32)
    labels = torch.from_numpy(labels[order]).to(torch.int64)
    return (
        Images(pixels[:TRAIN], labels[:TRAIN]),
        Images(pixels[TRAIN:], labels[TRAIN:]),
    )


def perceptron(seed: int = 0) -> nn.Module:
    """64-64-10 with ReLU; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def sites(
    split: Sequence[np.ndarray], profiles: Sequence[DeviceProfile] | None = None
) -> list[Site]:
    """One site for each part of the training images."""
    profiles = profiles or [DeviceProfile()] * len(split)
    width = len(str(len(split) - 1))
    return [
        Site(f"client-{index:0{width}d}", part.tolist(), profile)
        for index, (part, profile) in enumerate(zip(split, profiles, strict=True))
    ]


def local(
    lr: float = 0.1, batch: int = 16, steps: int | None = 10, **options: object
) -> LocalTraining:
    """Plain SGD with a constant rate and no clipping, unless the options say otherwise."""
    settled = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "clip": None}
    values = {**settled, "lr": lr, "batch": batch, "steps": steps, "precision": "fp32", **options}
    return LocalTraining(Digits(), TrainOptions.model_validate(values))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images that are classified right."""
    _, test = images()
    return float((model(test.pixels).argmax(1) == test.labels).double().mean())


def watch(model: nn.Module) -> Callable[[Coordinator], Mapping[str, float]]:
    """For :class:`Federation`: the accuracy of every version."""

    def measure(coordinator: Coordinator) -> Mapping[str, float]:
        with lent(model, coordinator.server.tensors):  # type: ignore[attr-defined]
            return {"accuracy": accuracy(model)}

    return measure
