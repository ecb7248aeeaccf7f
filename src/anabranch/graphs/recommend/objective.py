"""A recommender on the shared trainer: positive pairs as items, full ranking as validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.evaluation.ranking import Ranking, rank
from anabranch.graphs.recommend.interactions import Interactions
from anabranch.graphs.recommend.model import FactorModel
from anabranch.graphs.recommend.sampler import NegativeSampler
from anabranch.models.progress import Progress
from anabranch.training.ema import copy_weights
from anabranch.training.errors import Diverged, TrainingError
from anabranch.training.hooks import Hook
from anabranch.training.objective import LossOutput, Objective
from anabranch.training.options import TrainOptions
from anabranch.training.randomness import separate_randomness
from anabranch.training.result import StepReport
from anabranch.training.trainer import Trainer

Pairs = Sequence[int]
"""Positions of positive pairs among the training interactions."""
MOST_SCORES = 2**26
"""Entries of a micro-batch's largest array: 256 MiB in float32."""


class PairObjective(Objective[int, Pairs]):
    """Positive pairs against negatives that are drawn anew for every step.

    ``width`` is how many scores a pair needs; it bounds the pairs of a micro-batch.
    """

    unit = "pairs"

    def __init__(
        self,
        train: Interactions,
        sampler: NegativeSampler,
        width: int,
        settings: Mapping[str, Any],
    ) -> None:
        self._users = torch.from_numpy(train.user.astype(np.int64))
        self._items = torch.from_numpy(train.item.astype(np.int64))
        self._sampler = sampler
        self._most = max(1, MOST_SCORES // width)
        self._settings = dict(settings)
        self._fingerprint = train.fingerprint()

    def settings(self) -> dict[str, Any]:
        """The recommender's class and parameters."""
        return self._settings

    def fingerprint(self, items: Pairs) -> str:
        """The digest of the training interactions."""
        return self._fingerprint

    def plan(self, items: Pairs) -> list[Pairs]:
        """Parts whose scores fit in memory."""
        return [items[i : i + self._most] for i in range(0, len(items), self._most)]

    def denominators(self, items: Pairs) -> dict[str, float]:
        """The pairs of the step."""
        return {"pairs": float(len(items))}

    def loss(
        self, model: nn.Module, micro_batch: Pairs, denominators: Mapping[str, float]
    ) -> LossOutput:
        """The model's own loss of these pairs and fresh negatives."""
        assert isinstance(model, FactorModel)
        at = torch.tensor(micro_batch)
        users, items = self._users[at], self._items[at]
        negatives = self._sampler.draw(users)
        return LossOutput(model.pair_loss(users, items, negatives, int(denominators["pairs"])))

    def state_dict(self) -> dict[str, Any]:
        """The generator of the negatives."""
        return {"negatives": self._sampler.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._sampler.generator.set_state(state["negatives"])


@dataclass(frozen=True)
class Validated:
    """A validation: after how many epochs and what it found.

    ``processor_seconds`` are those of the training steps so far, without validations.
    """

    epoch: int
    processor_seconds: float
    ranking: Ranking


class ProcessorClock(Hook):
    """Adds up the processor seconds of the steps, over resumed runs as well."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def before_step(self, trainer: Trainer[Any]) -> None:
        """A step begins."""
        self._began = time.process_time()

    def after_step(self, trainer: Trainer[Any], report: StepReport) -> None:
        """It has ended."""
        self.seconds += time.process_time() - self._began

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.seconds = state["seconds"]


@dataclass
class LastGoodEpoch(Hook):
    """Holds a copy of the weights at the end of the last epoch in which every step was finite."""

    epoch: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    _finite: bool = True

    def after_step(self, trainer: Trainer[Any], report: StepReport) -> None:
        """Copy at the end of an epoch."""
        self._finite = self._finite and not report.skipped
        if not trainer.sampler.at_epoch_end:
            return
        if self._finite:
            self.epoch = report.epoch + 1
            self.weights = {n: p.detach().clone() for n, p in trainer.trainable.items()}
        self._finite = True


class RankingTrainer(Trainer[int]):
    """The shared trainer with full-ranking figures in the place of a validation loss.

    ``history`` and ``callback`` get each validation; recall at ``k`` items selects the epoch.
    """

    def __init__(
        self,
        model: FactorModel,
        objective: PairObjective,
        options: TrainOptions,
        train: Interactions,
        validation: Interactions | None,
        *,
        k: int,
        callback: Callable[[Validated], None] | None,
        output: Path | None,
        progress: Progress,
    ) -> None:
        self.history: list[Validated] = []
        self.clock, self.good = ProcessorClock(), LastGoodEpoch()
        self._k, self._callback = k, callback
        self._seen = train.csr()
        self._relevant = None if validation is None else validation.csr()
        super().__init__(
            model,
            objective,
            options,
            range(len(train)),
            None if validation is None else range(len(validation)),
            output=output,
            progress=progress,
            hooks=[self.good, self.clock],
        )

    def run(self) -> Diverged | None:
        """Train, and leave the best weights in the model; without validation, the last.

        After a divergence these are the best or those of the last good epoch, and the error is
        returned; it is raised if there are none. No random state outside is touched.
        """
        failed = None
        with separate_randomness():
            try:
                result = self.fit()
            except Diverged as error:
                failed = error
        if not failed and result.stopped_because == "terminated":
            raise TrainingError(
                f"terminated in epoch {self.epoch + 1}; a call with the same output goes on there"
            )
        if self.tracker.best is not None:
            copy_weights(self.trainable, self.tracker.best_weights)
        elif failed:
            if not self.good.weights:
                raise failed
            copy_weights(self.trainable, self.good.weights)
        return failed

    @torch.no_grad()
    def evaluate(self, items: Pairs) -> dict[str, float]:
        """``recall@k`` and ``ndcg@k`` of the present weights on all of the validation."""
        assert isinstance(self.model, FactorModel)
        self.model.eval()
        users, vectors = (factors.numpy() for factors in self.model.factors())
        score = lambda block: users[block] @ vectors.T  # noqa: E731
        found = rank(score, self._relevant, self._seen, k=self._k)
        validated = Validated(self.epoch + 1, self.clock.seconds, found)
        self.history.append(validated)
        if self._callback is not None:
            self._callback(validated)
        return {f"recall@{found.k}": found.recall, f"ndcg@{found.k}": found.ndcg}
