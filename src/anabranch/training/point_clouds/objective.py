"""Regression on point clouds, for the shared trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.models.geometry.point_cloud import PointCloud, collate, turn
from anabranch.models.geometry.rotations import random_rotations
from anabranch.training.errors import DataError
from anabranch.training.objective import LossOutput, Objective, Prepared


@dataclass(frozen=True)
class Sample:
    """A cloud and the right answer.

    ``target`` is what the model's output is compared with: vectors [points, V, D], or scalars
    [points or clouds, C].
    """

    cloud: PointCloud
    target: Tensor


def batched(samples: Sequence[Sample]) -> Sample:
    """Samples as one."""
    cloud = collate([sample.cloud for sample in samples])
    return Sample(cloud, torch.cat([sample.target for sample in samples]))


class PointCloudRegression(Objective[Sample, Sample]):
    """Mean squared error over all numbers of a step's targets.

    ``model(cloud)`` returns ``scalars`` and ``vectors``; ``target`` says which are trained. With
    ``turn`` every cloud of a training step is turned by a random rotation, its target with it.
    ``points`` bounds a forward pass.
    """

    unit = "points"

    def __init__(
        self,
        target: Literal["vectors", "scalars"] = "vectors",
        *,
        turn: bool = True,
        points: int = 2048,
    ) -> None:
        self.target = target
        self.turn = turn
        self.points = points

    def prepare(self, items: Sequence[Sample]) -> Prepared[Sample]:
        """Refuse targets of another shape than their cloud, or that are not finite."""
        for number, item in enumerate(items):
            shape, dimension = item.target.shape, item.cloud.dimension
            if self.target == "vectors":
                fits = item.target.ndim == 3 and (shape[0], shape[2]) == (
                    len(item.cloud.pos),
                    dimension,
                )
                wanted = f"[{len(item.cloud.pos)}, channels, {dimension}]"
            else:
                fits = item.target.ndim == 2 and shape[0] in (
                    len(item.cloud.pos),
                    item.cloud.num_clouds,
                )
                wanted = (
                    f"[{len(item.cloud.pos)} points or {item.cloud.num_clouds} clouds, channels]"
                )
            if not fits:
                raise DataError(f"the target of sample {number} is {list(shape)}, not {wanted}")
            if not torch.isfinite(item.target).all():
                raise DataError(f"the target of sample {number} is not finite")
        return Prepared(items)

    def settings(self) -> dict[str, Any]:
        """Target and augmentation; the size of a forward pass does not matter."""
        return {**super().settings(), "target": self.target, "turn": self.turn}

    def fingerprint(self, items: Sequence[Sample]) -> str:
        """Hash of all positions and targets."""
        digest = hashlib.sha256()
        for item in items:
            for values in (item.cloud.pos, item.cloud.scalars, item.target):
                digest.update(values.detach().cpu().contiguous().numpy().tobytes())
        return f"{len(items)} items, {digest.hexdigest()[:12]}"

    def plan(self, items: Sequence[Sample]) -> list[Sample]:
        """Whole clouds in order, as many as fit into ``points``; a larger one alone."""
        groups: list[list[Sample]] = []
        filled = self.points
        for item in items:
            if filled + item.cloud.num_points > self.points:
                groups.append([])
                filled = 0
            groups[-1].append(item)
            filled += item.cloud.num_points
        return [batched(group) for group in groups]

    def denominators(self, items: Sequence[Sample]) -> Mapping[str, float]:
        """Numbers to predict."""
        return {"numbers": float(sum(item.target.numel() for item in items))}

    def loss(
        self, model: nn.Module, micro_batch: Sample, denominators: Mapping[str, float]
    ) -> LossOutput:
        """Squared errors over the step's numbers."""
        sample = self._turned(micro_batch) if self.turn and model.training else micro_batch
        found = getattr(model(sample.cloud), self.target)
        if found.shape != sample.target.shape:
            raise DataError(
                f"the model gives {self.target} {list(found.shape)}, the targets are "
                f"{list(sample.target.shape)}"
            )
        squares = (found - sample.target).square().sum()
        numbers = float(sample.target.numel())
        sums = {"squares": float(squares.detach()), "numbers": numbers}
        return LossOutput(squares / denominators["numbers"], sums)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The mean squared error."""
        return {"mse": sums["squares"] / sums["numbers"]}

    def tokens(self, items: Sequence[Sample]) -> int:
        """Points."""
        return sum(item.cloud.num_points for item in items)

    def _turned(self, sample: Sample) -> Sample:
        cloud = sample.cloud
        # Of torch's own generator, whose state is in every checkpoint.
        rotations = random_rotations(cloud.num_clouds, cloud.dimension, dtype=cloud.pos.dtype)
        rotations = rotations.to(cloud.pos.device)
        target = sample.target
        if self.target == "vectors":
            target = turn(target, rotations, cloud.batch)
        return Sample(cloud.turned(rotations), target)
