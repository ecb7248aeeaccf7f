"""The one training step, and the run around it.

Knows nothing of language models: an :class:`Objective` says how items become a loss. The command
line trains with :meth:`Trainer.fit`; a federated client or a co-served job calls
:meth:`Trainer.step`, which is the same step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from anabranch.models.progress import Progress, silent
from anabranch.training import ranks
from anabranch.training.ema import EMA, copy_weights
from anabranch.training.errors import CheckpointError, DataError, Diverged, TrainingError
from anabranch.training.hooks import Hook
from anabranch.training.objective import Item, Objective
from anabranch.training.optimizers import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_lr_factor,
)
from anabranch.training.options import TrainOptions
from anabranch.training.precision import MixedPrecision
from anabranch.training.randomness import (
    random_state,
    restore_random_state,
    separate_randomness,
)
from anabranch.training.result import RunResult, StepReport, StoppedBecause
from anabranch.training.run import Resume, Run
from anabranch.training.sampler import Order, Sampler, in_order, shuffled
from anabranch.training.schedules import lr_factor
from anabranch.training.state import map_tensors
from anabranch.training.tracking import Tracker

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 5
PLANNED = 64
"""Items that an evaluation plans together: enough to fill micro-batches."""


@dataclass(frozen=True)
class BegunStep(Generic[Item]):
    """A step of which the gradients are still to be computed."""

    items: Sequence[Item]
    lr: float
    began: float
    """Reading of ``time.perf_counter``."""


class Trainer(Generic[Item]):
    """Trains the parameters of ``model`` that require gradients.

    ``order(epoch)`` gives the indices of an epoch's items (default: shuffled by the seed).
    ``output`` is the folder of ``checkpoints/`` and ``metrics.jsonl``; without it nothing is
    written. ``make_optimizer`` replaces the optimiser of the options. With an initialised
    ``torch.distributed`` process group every rank takes its share of each step's items.

    Example::

        objective = LanguageObjective.from_options(Causal(), options)
        result = Trainer(model, objective, options, items, output=Path("run")).fit()

    Raises :class:`DataError` and :class:`TrainingError` before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective[Item, Any],
        options: TrainOptions,
        items: Sequence[Item],
        validation: Sequence[Item] | None = None,
        output: Path | None = None,
        progress: Progress = silent,
        hooks: Sequence[Hook] = (),
        order: Order | None = None,
        make_optimizer: Callable[[Mapping[str, nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.options = options
        self.output = output
        self.progress = progress
        self.hooks = list(hooks)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        """Everything that may be trained. A hook may freeze some of it for a while."""
        self.device = _device(self.trainable)
        self.precision = MixedPrecision(options.precision, self.device)
        for name, parameter in self.trainable.items():
            self.precision.require_trainable(name, parameter)
        prepared = objective.prepare(items)
        self.items = prepared.items
        self.dropped = dict(prepared.dropped)
        if not self.items:
            left_out = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items())
            raise DataError(f"there are no items to train on ({left_out or 'none were given'})")
        checked = objective.prepare(validation or [])
        self.validation = checked.items
        self.dropped.update({f"validation: {r}": n for r, n in checked.dropped.items()})
        if options.early_stopping and not self.validation:
            raise TrainingError("early_stopping needs validation items; none were given")
        objective.check(model)

        count = len(self.items)
        default = shuffled(count, options.seed) if options.shuffle else in_order(count)
        self.sampler = Sampler(order or default, options.batch)
        self.total_steps = options.total_steps(self.sampler.steps_per_epoch)
        self.optimizer = (
            make_optimizer(self.trainable)
            if make_optimizer
            else build_optimizer(options, self.trainable)
        )
        self.ema = EMA(self.trainable, options.ema) if options.ema is not None else None
        self.step_items: Sequence[Item] = ()
        """The items of the step under way, for hooks."""
        self.steps_done = 0
        self.tokens_done = 0
        self.seconds = 0.0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.tracker = Tracker(options.early_stopping)
        self.stop_requested: StoppedBecause | None = None
        if options.gradient_checkpointing:
            _checkpoint_gradients(model)

    @property
    def epoch(self) -> int:
        """Epoch of the items drawn last; the first is 0."""
        return self.sampler.epoch

    def fit(self, resume: Resume = "auto") -> RunResult:
        """Train to the end of the run, or from the newest checkpoint in ``output`` to the end.

        Afterwards the model has the averaged weights if ``ema`` is on, or the best ones after
        early stopping with ``restore_best``.

        A checkpoint of a run with other options, data or weights is refused with the differences;
        ``resume="force"`` goes on with it nevertheless, and ``"never"`` refuses any checkpoint.
        Raises :class:`Diverged` after five steps in a row that were not finite.
        """
        return Run(self, resume).execute()

    def step(self, items: Sequence[Item]) -> StepReport:
        """One optimiser step from exactly these items.

        The gradient is that of all items as one batch, however they are cut into micro-batches.
        A step whose loss or gradient is not finite leaves the weights alone and says so.
        """
        step = self.begin_step(items)
        loss, metrics = self._accumulate_gradients(items)
        return self.finish_step(step, loss, metrics)

    def begin_step(self, items: Sequence[Item]) -> BegunStep[Item]:
        """The first part of :meth:`step`, for a caller that computes the gradients itself.

        Afterwards every ``parameter.grad`` is None and the learning rate is that of the step.
        """
        if not items:
            raise DataError("a step needs at least one item")
        began = time.perf_counter()
        self.step_items = items
        if not all(module.training for module in self.model.modules()):
            self.model.train()
        for hook in self.hooks:
            hook.before_step(self)
        lr = set_lr_factor(self.optimizer, self._lr_factor(self.steps_done))
        for parameter in self.trainable.values():
            parameter.grad = None
        return BegunStep(items, lr, began)

    def finish_step(
        self,
        step: BegunStep[Item],
        loss: float,
        metrics: Mapping[str, float],
        seconds: float | None = None,
    ) -> StepReport:
        """The last part of :meth:`step`: clip what is in ``parameter.grad``, update, report.

        ``seconds`` is what the step's computation took, if that is not the time since it began.
        """
        for hook in self.hooks:
            hook.after_gradients(self)
        norm = self._clip()
        skipped = self._apply(loss, norm)

        self.steps_done += 1
        if self.ema and not skipped:
            self.ema.update(self.steps_done)
        tokens = self.objective.tokens(step.items)
        if seconds is None:
            seconds = time.perf_counter() - step.began
        self.tokens_done += tokens
        self.seconds += seconds
        report = StepReport(
            self.steps_done, self.epoch, loss, step.lr, norm, tokens, seconds, metrics, skipped
        )
        for hook in self.hooks:
            hook.after_step(self, report)
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"{MOST_SKIPPED_IN_A_ROW} steps in a row up to step {report.step} were not finite: "
                f"{skipped}; lower lr ({self.options.lr:g}), clip harder, or look for damaged rows"
            )
        return report

    def gradients_at(
        self, weights: Mapping[str, Tensor], items: Sequence[Item]
    ) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of a step from these items at other weights; zero where unused.

        Weights and ``parameter.grad`` are afterwards as before, so that a hook may call it.
        """
        parameters = self.trainable.values()
        kept = [(p, p.detach().clone(), p.grad) for p in parameters]
        copy_weights(self.trainable, weights)
        try:
            self.optimizer.zero_grad(set_to_none=True)
            loss, _ = self._accumulate_gradients(items)
            return loss, {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in self.trainable.items()
            }
        finally:
            with torch.no_grad():
                for parameter, value, gradient in kept:
                    parameter.copy_(value)
                    parameter.grad = gradient

    def next_items(self) -> list[Item]:
        """The items of the next step, in the run's order."""
        return [self.items[index] for index in self.sampler.next_batch()]

    @torch.no_grad()
    def evaluate(self, items: Sequence[Item]) -> dict[str, float]:
        """``loss`` and the objective's metrics over these items, with the averaged weights if any.

        Without gradient and dropout; what the objective draws at random is the same every time, and
        training goes on as if nothing had been drawn.
        """
        if not items:
            raise DataError("an evaluation needs at least one item")
        was_training = self.model.training
        self.model.eval()
        try:
            with separate_randomness(self.options.seed), self._averaged():
                share = ranks.own_share(items)
                chunks = (share[i : i + PLANNED] for i in range(0, len(share), PLANNED))
                micro_batches = [batch for chunk in chunks for batch in self.objective.plan(chunk)]
                denominators = self._denominators(share, micro_batches)
                sums: dict[str, float] = {}
                for micro_batch in micro_batches:
                    with self.precision.autocast():
                        output = self.objective.loss(self.model, micro_batch, denominators)
                    _add(sums, {**output.sums, _LOSS: float(output.loss)})
        finally:
            self.model.train(was_training)
        sums = ranks.summed(sums)
        loss = sums.pop(_LOSS)
        return {"loss": loss, **self.objective.metrics(sums)}

    def stop(self) -> None:
        """Ask :meth:`fit` to checkpoint at the next step boundary and return. Thread-safe."""
        self.stop_requested = "stopped"

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a bit-exact continuation needs: tensors and JSON values."""
        return map_tensors(self.live_state(), lambda t: t.detach().clone())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken."""
        self._require_same_weights(state["weights"])
        copy_weights(self.trainable, state["weights"])
        copy_weights(_buffers(self.model), state["buffers"])
        load_optimizer_state(self.optimizer, self.trainable, state["optimizer"])
        self.precision.load_state_dict(state["precision"])
        if self.ema:
            copy_weights(self.ema.average, state["ema"] or state["weights"])
        self.sampler.load_state_dict(state["sampler"])
        self.objective.load_state_dict(state["objective"])
        for hook in self.hooks:
            hook.load_state_dict(state["hooks"].get(type(hook).__name__, {}))
        self.tracker.load_state_dict(state["tracker"])
        counters = state["counters"]
        self.steps_done, self.tokens_done = counters["steps"], counters["tokens"]
        self.seconds, self.skipped = counters["seconds"], counters["skipped"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        restore_random_state(state["random"])

    def live_state(self) -> dict[str, Any]:
        """:meth:`state_dict` without the copy: it changes with the next step."""
        return {
            "counters": {
                "steps": self.steps_done,
                "tokens": self.tokens_done,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
            },
            "weights": dict(self.trainable),
            "buffers": _buffers(self.model),
            "optimizer": optimizer_state(self.optimizer, self.trainable),
            "precision": self.precision.state_dict(),
            "ema": self.ema.average if self.ema else {},
            "sampler": self.sampler.state_dict(),
            "objective": self.objective.state_dict(),
            "hooks": {type(hook).__name__: hook.state_dict() for hook in self.hooks},
            "tracker": self.tracker.state_dict(),
            "random": random_state(),
        }

    def _accumulate_gradients(self, items: Sequence[Item]) -> tuple[float, dict[str, float]]:
        """Gradients of the step's loss in ``parameter.grad``; the loss, and the metrics to log."""
        share = ranks.own_share(items)
        micro_batches = self.objective.plan(share)
        denominators = self._denominators(share, micro_batches)
        sums: dict[str, float] = {}
        for micro_batch in micro_batches:
            with self.precision.autocast():
                output = self.objective.loss(self.model, micro_batch, denominators)
            self.precision.backward(output.loss)
            _add(sums, {**output.sums, _LOSS: float(output.loss.detach())})
        ranks.sum_gradients(self.trainable.values())
        sums = ranks.summed(sums)
        return sums.pop(_LOSS), self.objective.metrics(sums)

    def _denominators(
        self, share: Sequence[Item], micro_batches: Sequence[Any]
    ) -> Mapping[str, float]:
        """Counts over the whole step, and what the objective finds out in a pass of its own."""
        totals = dict(self.objective.denominators(share))
        if self.objective.two_pass:
            # The generators are set back, so that both passes draw the same dropout.
            with torch.no_grad(), separate_randomness():
                for micro_batch in micro_batches:
                    with self.precision.autocast():
                        _add(totals, self.objective.first_pass(self.model, micro_batch))
        return ranks.summed(totals)

    def _clip(self) -> float:
        """Scale the gradients down to norm ``clip``; their norm before."""
        self.precision.unscale(self.optimizer)
        trained = [p for p in self.trainable.values() if p.grad is not None]
        if not trained:
            return 0.0
        gradients = [p.grad for p in trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.options.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.options.clip, norm)
        return float(norm)

    def _apply(self, loss: float, norm: float) -> str:
        """Update the weights; if loss or gradient are not finite, say so and leave them."""
        scale_too_large = self.precision.finish() and math.isfinite(loss)
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
            return ""
        self.skipped += 1
        if scale_too_large:
            return "scaled gradients overflowed float16; the loss scale was lowered"
        self.skipped_in_a_row += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        logger.warning("step %d skipped: %s", self.steps_done + 1, what)
        return what

    def _lr_factor(self, step: int) -> float:
        o = self.options
        return lr_factor(
            step, self.total_steps, o.warmup_steps(self.total_steps), o.schedule, o.min_lr
        )

    def _require_same_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trainable.items():
            if name not in weights:
                raise CheckpointError(f"the state has no {name}, which is trained here")
            if weights[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{name} is {list(weights[name].shape)} in the state, "
                    f"{list(parameter.shape)} in the model"
                )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        with self.ema.applied():
            yield


_LOSS = "\0loss"
"""Name of the loss among an objective's sums, which may be called anything else."""


def _add(totals: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def _device(trainable: Mapping[str, nn.Parameter]) -> torch.device:
    if not trainable:
        raise TrainingError(
            "nothing to train: no parameter of the model requires gradients; attach an adapter, or "
            "call requires_grad_(True) to train all weights"
        )
    return next(iter(trainable.values())).device


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state, for example running means."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    return {n: v for n, v in state.items() if n not in parameters and isinstance(v, Tensor)}


def _checkpoint_gradients(model: nn.Module) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if not callable(enable):
        raise TrainingError(
            f"gradient_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable()"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
