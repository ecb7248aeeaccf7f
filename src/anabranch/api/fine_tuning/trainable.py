"""What fine-tuning asks of a model, beyond answering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from anabranch.models.card import ModelCard
from anabranch.models.protocol import Model

if TYPE_CHECKING:
    from anabranch.serving.coserving.job import FinetuneJob, JobHandle, Listener


class Trainable(Protocol):
    """A model that trains adapters while it serves; the engine's models are."""

    name: str
    card: ModelCard

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, with the chat template."""

    @property
    def end_tokens(self) -> Sequence[int]:
        """Ids at which an answer ends."""

    @property
    def max_finetune_tokens(self) -> int:
        """Tokens that a row may have to be trained on."""

    def submit_finetune(self, job: FinetuneJob, listener: Listener | None = None) -> JobHandle:
        """Begin or go on with a job; see :mod:`anabranch.serving.coserving.job`."""

    async def add_adapter(self, name: str, folder: Path) -> Model:
        """Serve an adapter from its folder."""

    def variants(self) -> list[Model]:
        """What is served on this base."""


def is_trainable(model: Any) -> TypeGuard[Trainable]:
    """Whether a model can be fine-tuned."""
    return hasattr(model, "submit_finetune")
