"""Where a method may take part in the trainer's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.training.result import StepReport
    from anabranch.training.trainer import Trainer


class Hook:
    """Called around every optimiser step, in the order in which hooks were given.

    Half fine-tuning chooses what trains before a step, a federated method corrects gradients, a
    loss balancer evaluates after one. A hook with state has it checkpointed under its class name.
    """

    def before_step(self, trainer: Trainer) -> None:
        """The step's items are drawn, nothing is computed yet."""

    def after_gradients(self, trainer: Trainer) -> None:
        """Gradients of the whole step are in ``parameter.grad``, not yet clipped."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """The weights have been updated (or the step was skipped, see the report)."""

    def after_run(self, trainer: Trainer) -> None:
        """:meth:`Trainer.fit` ends, normally or with an error; leave the model as it came."""

    def state_dict(self) -> dict[str, Any]:
        """State to checkpoint (JSON values or tensors)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
