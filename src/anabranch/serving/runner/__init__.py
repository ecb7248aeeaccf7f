"""Runs a step plan on a model. The engine knows only this interface.

:class:`~anabranch.serving.runner.transformers.TransformersRunner` is the reference that every
other runner is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from anabranch.serving.adapters import AdapterCheckpoint
from anabranch.serving.batch import PageCopy, StepPlan, StepResult

__all__ = ["DifferentiableRunner", "LayeredRunner", "ModelRunner"]


class ModelRunner(Protocol):
    """Owns the weights and the cache tensors."""

    vocabulary: int
    """Rows of the language-model head."""
    context_length: int
    """Longest sequence that the model was made for, in tokens."""
    page_size: int
    """Tokens of one page."""
    page_bytes: int
    """Memory of one page over all layers."""

    def allocate(self, num_pages: int) -> None:
        """Create the cache tensors. Called once, before the first step."""

    def add_adapter(self, checkpoint: AdapterCheckpoint) -> tuple[Any, int]:
        """Make an adapter ready: a handle for ``ServedAdapter`` and the bytes that it takes.

        Raises :class:`AdapterError` if it does not fit, leaving everything as it was.
        """

    def remove_adapter(self, handle: Any) -> None:
        """Drop an adapter that no request runs on."""

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages as they are now: all sources are read before any target is written."""

    def move_slots(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the keys and values of tokens: all sources are read before any target is written.

        A slot is ``page * page_size + offset``.
        """

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's segments: write their keys and values, return the wanted rows."""

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Overwrite pages with zeros, so that bad values cannot reach their next owner."""


@runtime_checkable
class LayeredRunner(ModelRunner, Protocol):
    """A runner that can stop after some of its layers."""

    def first_layers(self, layers: int) -> ModelRunner:
        """The same weights and caches, but the head follows after so many layers.

        Raises :class:`ConfigurationError` if the model does not have more layers than that.
        """


@runtime_checkable
class DifferentiableRunner(ModelRunner, Protocol):
    """A runner on whose weights adapters can be trained while it serves."""

    shared_inputs: Sequence[tuple[str, ...]]
    """Linear layers of a decoder layer to which an adapter's dropout shows the same input."""

    def training_base(self) -> PreTrainedModel:
        """The model's modules around the served weights, which are frozen: a copy for one adapter.

        Raises :class:`AdapterError` with the reason if this model cannot be trained.
        """

    def training_handle(self, model: PeftModel) -> Any:
        """The handle with which segments are computed on an adapter as it is now.

        Raises :class:`AdapterError` if the runner cannot serve such an adapter.
        """

    def read_cache(self, layer: int, pages: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[kv_heads, tokens, head_dim]`` at the beginning of some pages."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """To what keys and values are rounded."""
