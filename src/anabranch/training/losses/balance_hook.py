"""Feeds a balancer with validation losses while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anabranch.errors import ConfigurationError
from anabranch.training.errors import CheckpointError, DataError
from anabranch.training.example import Item
from anabranch.training.hooks import Hook
from anabranch.training.losses.balance import Balancer

if TYPE_CHECKING:
    from anabranch.training.result import StepReport
    from anabranch.training.trainer import Trainer


class BalanceHook(Hook):
    """Evaluates after every ``interval`` steps and tells the balancer.

    The first time, before any step, on all validation items; then on ``batches`` times ``batch``
    items, drawn in order from the validation items and from the start again at their end. The
    trainer's metrics must have ``loss/<task>`` for every task among the items.
    """

    def __init__(
        self,
        balancer: Balancer,
        validation: Sequence[Item],
        interval: int = 1,
        batch: int = 8,
        batches: int = 1,
    ) -> None:
        if interval < 1 or batch < 1 or batches < 1:
            raise ConfigurationError(
                f"a balancer's interval, batch and batches are at least 1, "
                f"not {interval}, {batch} and {batches}"
            )
        held = {example.task for item in validation for example in item if example.targets}
        if lacking := sorted(set(balancer.tasks) - held):
            raise DataError(
                f"balancer {balancer.name!r} follows validation losses, but there are no "
                f"validation rows of: {', '.join(map(repr, lacking))}; "
                f"have {', '.join(map(repr, sorted(held))) or 'none'}"
            )
        self._balancer = balancer
        self._validation = validation
        self._interval = interval
        self._draw = batch * batches
        self._position = 0
        self._started = False

    def before_step(self, trainer: Trainer) -> None:
        """Before the first step of the run: the losses that it starts from."""
        if not self._started:
            self._observe(trainer, 0, self._validation)
            self._started = True

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Every ``interval`` steps: the losses on the next validation items."""
        if report.step % self._interval == 0:
            self._observe(trainer, report.step, self._next())

    def state_dict(self) -> dict[str, Any]:
        """The position among the validation items and the balancer's state."""
        return {
            "position": self._position,
            "started": self._started,
            "balancer": self._balancer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        if "balancer" not in state:
            raise CheckpointError("the checkpoint has no balancer's state: its run had none")
        self._position = int(state["position"]) % len(self._validation)
        self._started = bool(state["started"])
        self._balancer.load_state_dict(state["balancer"])

    def _next(self) -> list[Item]:
        size = len(self._validation)
        drawn = [self._validation[(self._position + i) % size] for i in range(self._draw)]
        self._position = (self._position + self._draw) % size
        return drawn

    def _observe(self, trainer: Trainer, step: int, items: Sequence[Item]) -> None:
        metrics = trainer.evaluate(items)
        prefix = "loss/"
        losses = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
        self._balancer.observe(step, losses)
