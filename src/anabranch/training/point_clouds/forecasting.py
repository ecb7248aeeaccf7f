"""Train a network on charged particles and measure it; the command, the claim and the benchmark.

The loop is the shared trainer's. What is here: which options fit, the budget, and a curve.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from anabranch.models.geometry.ponita import Ponita
from anabranch.models.progress import Progress, silent
from anabranch.training.errors import TrainingError
from anabranch.training.hooks import Hook
from anabranch.training.options import TrainOptions
from anabranch.training.point_clouds.budget import ProcessorBudget
from anabranch.training.point_clouds.objective import PointCloudRegression, Sample, batched
from anabranch.training.randomness import seed_all
from anabranch.training.result import StepReport
from anabranch.training.trainer import Trainer

MANY = 10**9
"""Steps of a run that ends with its budget."""


@dataclass
class Forecast:
    """How a training went. ``curve`` holds (processor seconds, mean squared error).

    ``seconds`` of processor time are those of all steps under a budget, resumed parts included,
    and else those of this call.
    """

    seconds: float
    steps: int
    curve: list[tuple[float, float]] = field(default_factory=list)


def forecast_options(
    *, steps: int | None = None, batch: int = 100, lr: float = 2e-3, seed: int = 0, **more: Any
) -> TrainOptions:
    """Cosine to zero, clipped at 0.5; ``steps`` None for a run that a budget ends."""
    warmup = 20 if steps is None else min(20, steps // 10)
    settings: dict[str, Any] = {
        "steps": steps or MANY,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "warmup": warmup,
        "weight_decay": 1e-10,
        "clip": 0.5,
        "precision": "fp32",
    }
    return TrainOptions(**settings | more)


def train(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    options: TrainOptions,
    *,
    seconds: float | None = None,
    held_out: Sequence[Sample] = (),
    points_of_curve: int = 0,
    output: Path | None = None,
    progress: Progress = silent,
) -> Forecast:
    """Train for the options' steps, or for ``seconds`` of processor time.

    A :class:`Ponita` is calibrated on the first batch before. ``points_of_curve`` evaluations on
    ``held_out`` are spread evenly over the budget and cost nothing of it. With ``output`` the run
    can be killed and called again.
    """
    if points_of_curve and (seconds is None or not held_out):
        raise TrainingError("a curve needs a budget in seconds and held-out samples")
    if not samples:
        raise TrainingError("there are no samples to train on")
    seed_all(options.seed)
    if isinstance(model, Ponita):
        model.calibrate(batched(samples[: options.batch]).cloud)
    trainer = Trainer(
        model, PointCloudRegression(), options, samples, output=output, progress=progress
    )
    budget = None if seconds is None else ProcessorBudget(trainer, seconds)
    curve = None
    if budget is not None and points_of_curve:
        curve = _Curve(budget, held_out, points_of_curve)
        trainer.hooks.append(curve)
    began = time.process_time()
    result = trainer.fit()
    spent = time.process_time() - began if budget is None else budget.spent
    return Forecast(spent, result.steps, [] if curve is None else curve.points)


@torch.no_grad()
def predict(model: PreTrainedModel, samples: Sequence[Sample], at_once: int = 200) -> torch.Tensor:
    """Displacements [all points, 1, 3], ``at_once`` clouds in a pass."""
    was_training = model.training
    model.eval()
    groups = (samples[i : i + at_once] for i in range(0, len(samples), at_once))
    found = [model(batched(group).cloud).vectors for group in groups]
    model.train(was_training)
    return torch.cat(found)


def mean_squared_error(model: PreTrainedModel, samples: Sequence[Sample]) -> float:
    """Over all coordinates."""
    return float((predict(model, samples) - batched(samples).target).square().mean())


class _Curve(Hook):
    """Evaluates whenever the next part of the budget is spent."""

    def __init__(self, budget: ProcessorBudget, samples: Sequence[Sample], count: int) -> None:
        self.points: list[tuple[float, float]] = []
        self._budget = budget
        self._samples = samples
        self._count = count

    def after_step(self, trainer: Trainer[Any], report: StepReport) -> None:
        due = self._budget.seconds * (len(self.points) + 1) / self._count
        if self._budget.spent >= due:
            error = mean_squared_error(trainer.model, self._samples)  # type: ignore[arg-type]
            self.points.append((round(self._budget.spent, 1), error))

    def state_dict(self) -> dict[str, Any]:
        return {"points": [list(point) for point in self.points]}

    def load_state_dict(self, state: Any) -> None:
        self.points = [(seconds, error) for seconds, error in state["points"]]
