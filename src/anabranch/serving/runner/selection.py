"""Which runner serves a model on this machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from anabranch import models
from anabranch.errors import ConfigurationError, ModelUnsupported
from anabranch.models.progress import Progress, silent
from anabranch.serving import kernels
from anabranch.serving.options import EngineOptions
from anabranch.serving.runner import ModelRunner
from anabranch.serving.runner.fused import FusedRunner, unsuitable
from anabranch.serving.runner.transformers import TransformersRunner
from anabranch.serving.speculation.errors import VocabularyMismatch

if TYPE_CHECKING:
    from anabranch.models import LoadedModel

logger = logging.getLogger(__name__)


def make_runner(
    loaded: LoadedModel, options: EngineOptions, progress: Progress = silent
) -> ModelRunner:
    """The runner that the options ask for; ``auto`` takes the fused one where it is exact.

    Raises :class:`ConfigurationError` if the options ask for what the model cannot have.
    """
    network, context = loaded.network, loaded.card.context_length
    if options.runner == "transformers":
        if options.weights != "bf16":
            raise ConfigurationError(f"weights={options.weights} needs runner=fused (or auto)")
        if options.kv_cache != "auto":
            raise ConfigurationError(f"kv_cache={options.kv_cache} needs runner=fused (or auto)")
        return TransformersRunner(network, context, options.page_size)

    reason = unsuitable(network, options.page_size, options.weights)
    if reason is None and options.runner == "auto" and options.weights == "bf16":
        reason = _not_worth_it(loaded)
    if reason is None:
        progress("preparing the kernels", None)
        if options.runner == "auto" and options.weights == "bf16" and not kernels.load().compiled:
            reason = "its kernels need a C++ compiler"
    if reason is None:
        try:
            return FusedRunner(
                network, context, options.page_size, options.weights, options.kv_cache
            )
        except ModelUnsupported as error:
            reason = str(error)
    if options.runner == "fused" or options.weights != "bf16" or options.kv_cache != "auto":
        raise ConfigurationError(
            f"{loaded.name} cannot run with runner={options.runner}, weights={options.weights}, "
            f"kv_cache={options.kv_cache}: {reason}"
        )
    logger.info("using the transformers runner: %s", reason)
    return TransformersRunner(network, context, options.page_size)


def make_draft_runner(
    name: str, target: LoadedModel, options: EngineOptions, progress: Progress = silent
) -> ModelRunner:
    """Load a smaller model that speaks in the target's tokens, and the runner for it.

    Raises :class:`VocabularyMismatch` if it does not.
    """
    draft = models.load(
        name, dtype=target.network.dtype, device=target.network.device, progress=progress
    )
    if draft.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise VocabularyMismatch(
            f"{name} has other tokens than {target.name}; a drafter must share its tokenizer"
        )
    return make_runner(draft, options, progress)


def _not_worth_it(loaded: LoadedModel) -> str | None:
    if loaded.card.dtype != "bfloat16":
        return f"its {loaded.card.dtype} weights would be rounded to bfloat16"
    if loaded.network.dtype == torch.float16:
        return "float16 was asked for"
    return None
