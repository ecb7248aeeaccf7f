"""Recommenders that learn vectors by gradient: one training loop for all of them."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from torch import Tensor

from anabranch.graphs.recommend import hashing
from anabranch.graphs.recommend.base import (
    FactorRecommender,
    Side,
    plain_parameters,
    same_ids,
)
from anabranch.graphs.recommend.errors import RecommendError
from anabranch.graphs.recommend.hashing.embedding import MappedEmbedding
from anabranch.graphs.recommend.hashing.mappers import IdMapper
from anabranch.graphs.recommend.hashing.rows import RowAssignment
from anabranch.graphs.recommend.interactions import (
    Interactions,
    as_interactions,
    require_disjoint,
)
from anabranch.graphs.recommend.model import FactorModel, Table, new_table
from anabranch.graphs.recommend.objective import PairObjective, RankingTrainer, Validated
from anabranch.graphs.recommend.sampler import NegativeSampler
from anabranch.models.progress import Progress, silent
from anabranch.training.errors import Diverged
from anabranch.training.options import TrainOptions, parse_options

SELECTED_AT = 20
"""Validation recall at this many items selects the epoch, as in the papers."""


@dataclass(kw_only=True, eq=False, repr=False)
class TrainedRecommender(FactorRecommender):
    """User and item vectors trained with Adam at a constant rate, on the shared trainer.

    ``epochs`` is the most; with validation interactions, recall@20 is measured every
    ``evaluate_every`` epochs, training stops after ``patience`` measurements without a new best,
    and the best epoch's vectors are kept. ``batch`` is positive pairs a step. Vectors start normal
    with deviation ``init``. ``mapper`` lets ids share vectors (:mod:`.hashing`); None gives each
    its own. ``seed`` fixes everything that is drawn, and no other random state is touched.

    Fitted: those of :class:`FactorRecommender`; ``history_``, a :class:`Validated` for each
    validation; ``best_epoch_``, whose vectors these are; ``epochs_`` that were trained and the
    ``processor_seconds_`` of their steps; ``mapper_``, the fitted mapper.
    """

    dim: int = 64
    lr: float = 5e-3
    batch: int = 1024
    epochs: int = 100
    evaluate_every: int = 1
    patience: int | None = 10
    init: float = 1e-2
    mapper: IdMapper | None = None
    seed: int = 0

    def fit(
        self,
        train: Any,
        *,
        validation: Interactions | None = None,
        progress: Progress = silent,
        output: Path | None = None,
        callback: Callable[[Validated], None] | None = None,
    ) -> Self:
        """Train on ``train``: :class:`Interactions`, or a matrix [users, items].

        With ``output`` every epoch is checkpointed in that folder, where the same call goes on
        after an interruption. ``callback`` sees each validation. Users and items that have
        interactions in ``validation`` only are trained on nothing: a warning counts those.

        Raises :class:`Diverged` once losses are not finite; the recommender then has the vectors
        of the best, or without validation of the last good, epoch, if there was one.
        """
        self._check()
        train = _checked(train, validation)
        generator = torch.Generator().manual_seed(self.seed)
        mapper = None if self.mapper is None else clone(self.mapper).fit(train)
        model = self._model(
            train,
            self._table(train.num_users, mapper and mapper.users_, generator),
            self._table(train.num_items, mapper and mapper.items_, generator),
        )
        settings = {
            "recommender": type(self).__name__,
            **plain_parameters(self),
            "validated on": "nothing" if validation is None else validation.fingerprint(),
        }
        sampler = self._sampler(train, generator)
        trainer = RankingTrainer(
            model,
            PairObjective(train, sampler, self._width(train), settings),
            self._options(len(train), validation is not None),
            train,
            validation,
            k=SELECTED_AT,
            callback=callback,
            output=output,
            progress=progress,
        )
        failed = trainer.run()

        self.mapper_ = mapper
        self.history_ = trainer.history
        self.epochs_ = trainer.epoch + 1
        self.processor_seconds_ = trainer.clock.seconds
        if (best := trainer.tracker.best) is not None:
            self.best_epoch_ = best.step // math.ceil(len(train) / self.batch)
        else:
            self.best_epoch_ = trainer.good.epoch if failed else self.epochs_
        seen = train if validation is None else train.joined(validation)
        self._keep(*_stored(model, mapper), seen.csr(), same_ids(train))
        if failed:
            raise Diverged(
                f"{failed}; the recommender keeps its vectors of epoch {self.best_epoch_}"
            )
        return self

    @abstractmethod
    def _model(self, train: Interactions, users: Table, items: Table) -> FactorModel:
        """The module to train."""

    def _check(self) -> None:
        """Refuse parameters that cannot work, before any work."""
        for name in ("dim", "batch", "epochs", "evaluate_every"):
            if getattr(self, name) < 1:
                raise RecommendError(f"{name} = {getattr(self, name)}: at least 1 is needed")
        if self.patience is not None and self.patience < 1:
            raise RecommendError(f"patience = {self.patience}: at least 1, or None to never stop")
        for name in ("lr", "init"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise RecommendError(f"{name} = {value}: a positive number is needed")

    def _sampler(self, train: Interactions, generator: torch.Generator) -> NegativeSampler:
        """Where negatives come from: any item, once for each positive."""
        return NegativeSampler(train, 1, False, generator)

    def _width(self, train: Interactions) -> int:
        """Numbers that the loss of one pair holds, about."""
        return 3 * self.dim

    def _table(
        self, count: int, assignment: RowAssignment | None, generator: torch.Generator
    ) -> Table:
        if assignment is None:
            return new_table(count, self.dim, self.init, generator)
        table = new_table(assignment.num_rows, self.dim, self.init, generator)
        return MappedEmbedding(assignment, self.dim, table)

    def _options(self, pairs: int, validated: bool) -> TrainOptions:
        steps_per_epoch = math.ceil(pairs / self.batch)
        values: dict[str, Any] = {
            "epochs": self.epochs,
            "batch": self.batch,
            "lr": self.lr,
            "schedule": "constant",
            "warmup": 0.0,
            "clip": None,
            "precision": "fp32",
            "evaluate_every": self.evaluate_every * steps_per_epoch,
            "checkpoint": {"every": steps_per_epoch},
            "seed": self.seed,
        }
        if validated:
            values["early_stopping"] = {
                "metric": f"recall@{SELECTED_AT}",
                # Without patience the best epoch is kept all the same.
                "patience": self.patience or self.epochs,
                "higher_is_better": True,
            }
        return parse_options(TrainOptions, values)

    def _facts(self) -> dict[str, Any]:
        return {
            "best_epoch_": self.best_epoch_,
            "epochs_": self.epochs_,
            "processor_seconds_": self.processor_seconds_,
        }

    @classmethod
    def _from_plain(cls, parameters: Any) -> dict[str, Any]:
        found = dict(parameters)
        if found["mapper"] is not None:
            mapper = getattr(hashing, found["mapper"]["class"])
            found["mapper"] = mapper(**found["mapper"]["parameters"])
        return found


def at_least_zero(recommender: TrainedRecommender, *names: str) -> None:
    """Refuse parameters that are negative or no numbers."""
    for name in names:
        value = getattr(recommender, name)
        if not (math.isfinite(value) and value >= 0):
            raise RecommendError(f"{name} = {value}: a finite number of at least 0 is needed")


def _checked(source: Any, validation: Interactions | None) -> Interactions:
    """The interactions to train on; warns of ids that have none."""
    train = as_interactions(source)
    if not len(train):
        raise RecommendError("no interactions: there is nothing to train on")
    if validation is not None:
        require_disjoint(train, validation)
        if not len(validation):
            raise RecommendError("validation has no interactions: pass None to do without")
    users = int((train.user_degree == 0).sum())
    items = int((train.popularity() == 0).sum())
    if users or items:
        warnings.warn(
            f"{users} users and {items} items have no interaction to train on: "
            f"their vectors stay random or are only pushed away",
            stacklevel=3,
        )
    return train


def _stored(
    model: FactorModel, mapper: IdMapper | None
) -> tuple[dict[Side, NDArray[np.float32]], dict[Side, NDArray[np.int64] | None]]:
    """What to keep of a trained model: tables and rows where they are shared, else factors."""
    rows: dict[Side, NDArray[np.int64] | None] = {"user": None, "item": None}
    if mapper is not None and model.stores_tables:
        users, items = model.users.weight, model.items.weight
        rows = {"user": mapper.users_.rows, "item": mapper.items_.rows}
    else:
        users, items = model.factors()
    return {"user": _array(users), "item": _array(items)}, rows


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().numpy().copy()
