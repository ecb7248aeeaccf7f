"""Local training: the shared trainer, for as long as a task says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import ConfigurationError
from anabranch.federated.client import ClientContext
from anabranch.federated.cohort import Trained, trained_together
from anabranch.federated.messages import Work
from anabranch.federated.shared import frozen_statistics, lent, shared_tensors
from anabranch.training.hooks import Hook
from anabranch.training.objective import Objective
from anabranch.training.options import TrainOptions
from anabranch.training.privacy import Privacy, PrivacyAccount
from anabranch.training.private_gradients import private_steps
from anabranch.training.trainer import Trainer


@dataclass(frozen=True)
class LocalResult:
    """What local training led to.

    ``tensors`` are the shared parameters after ``steps`` optimiser steps, ``loss`` the mean loss of
    the steps. Without data nothing happened and ``examples`` is 0.
    """

    tensors: dict[str, Tensor]
    steps: int
    examples: int
    loss: float


@dataclass(frozen=True)
class LocalTraining:
    """How every site trains: what it optimises, and the trainer's options.

    ``options.steps`` or ``options.epochs`` is the work of a task that does not say otherwise. The
    optimiser is new for every task; the order of the data follows from the task's seed. One unit of
    work is one optimiser step. The rate's schedule, warm-up included, runs over each task.

    With ``privacy`` the steps are private, and the account of them is in ``ctx.state["privacy"]``.
    Then no loss is reported, but what was spent, as ``epsilon/<site>``.
    """

    objective: Objective[Any, Any]
    options: TrainOptions
    privacy: Privacy | None = None

    def run(
        self, ctx: ClientContext, start: Mapping[str, Tensor], hooks: Sequence[Hook] = ()
    ) -> LocalResult:
        """Train the site's model from ``start`` on the site's data; the model is as before after.

        Hooks act on every step, for example on its gradients.
        """
        if not len(ctx.data):
            return LocalResult(dict(start), 0, 0, math.nan)
        options = self.for_task(ctx.work, ctx.seed)
        trained = None
        if not hooks and self.privacy is None:
            key = ctx.name, ctx.task
            trained = trained_together(key, ctx.model, self.objective, options, ctx.data, start)
        if trained is None:
            with lent(ctx.model, start):
                trainer: Trainer[Any] = Trainer(
                    ctx.model, self.objective, options, ctx.data, hooks=hooks
                )
                if self.privacy is not None:
                    return self._run_privately(ctx, trainer)
                steps = range(trainer.total_steps)
                losses = [trainer.step(trainer.next_items()).loss for _ in steps]
                trained = Trained(shared_tensors(ctx.model), losses, len(trainer.items))
        steps_done = len(trained.losses)
        ctx.spend(steps_done)
        loss = math.fsum(trained.losses) / steps_done
        ctx.report(loss=loss)
        return LocalResult(trained.tensors, steps_done, trained.examples, loss)

    def gradient(
        self, ctx: ClientContext, at: Mapping[str, Tensor], examples: int | None = None
    ) -> tuple[dict[str, Tensor], int]:
        """The gradient at ``at`` of the loss over the site's data as one batch, and its size.

        ``examples`` drawn without replacement instead of all. It costs as many units as there are
        batches in it. Zero without data.
        """
        if self.privacy is not None:
            raise ConfigurationError("the gradient over a site's data is not private")
        if not len(ctx.data):
            return {name: torch.zeros_like(tensor) for name, tensor in at.items()}, 0
        options = self.for_task(ctx.work, ctx.seed)
        with lent(ctx.model, at), frozen_statistics(ctx.model):
            trainer: Trainer[Any] = Trainer(ctx.model, self.objective, options, ctx.data)
            items = list(trainer.items)
            if examples is not None and examples < len(items):
                chosen = ctx.rng.choice(len(items), examples, replace=False)
                items = [items[index] for index in sorted(chosen.tolist())]
            loss, found = trainer.gradients_at(at, items)
        ctx.spend(math.ceil(len(items) / options.batch))
        ctx.report(loss=loss)
        return found, len(items)

    def account(self, ctx: ClientContext, examples: int) -> PrivacyAccount:
        """The site's, which is stored with its reply."""
        assert self.privacy is not None
        return PrivacyAccount(self.privacy, ctx.state.setdefault("privacy", {}), examples)

    def _run_privately(self, ctx: ClientContext, trainer: Trainer[Any]) -> LocalResult:
        account = self.account(ctx, len(trainer.items))
        spent = private_steps(trainer, account, ctx.name, ctx.task)
        ctx.spend(trainer.total_steps)
        if math.isfinite(spent):
            ctx.report(**{f"epsilon/{ctx.name}": spent})
        tensors = shared_tensors(ctx.model)
        return LocalResult(tensors, trainer.total_steps, len(trainer.items), math.nan)

    def for_task(self, work: Work, seed: int) -> TrainOptions:
        """The options of one task."""
        changes: dict[str, Any] = {"seed": seed, "lr": self.options.lr * work.lr_scale}
        if work.steps is not None:
            changes |= {"steps": work.steps, "epochs": None}
        elif work.epochs is not None:
            changes |= {"steps": None, "epochs": work.epochs}
        if work.batch_size is not None:
            changes["batch"] = work.batch_size
        return self.options.model_copy(update=changes)
