"""How an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import psutil
import torch

from anabranch.errors import ConfigurationError, did_you_mean

GIBIBYTE = 2**30
RUNNERS = ("auto", "fused", "transformers")
WeightFormat = Literal["bf16", "int8"]
CacheFormat = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class EngineOptions:
    """Limits and choices of one engine. ``None`` means: choose for this machine.

    ``token_budget`` is the tokens of one step: more is faster in total, fewer keep running
    streams smoother while prompts arrive. ``kv_memory`` is in bytes. ``max_queue`` is how many
    requests may wait before new ones are refused. ``runner`` is ``auto``, ``fused`` or
    ``transformers``; ``weights`` is how the fused one keeps them: ``bf16``, or ``int8``, which is
    faster and nearly as good. ``kv_cache`` is how it keeps keys and values: ``auto`` is what the
    model computes in, or ``bf16`` with ``int8`` weights.

    ``time_between_tokens`` is the latency target of streams in seconds: steps are cut to it, and
    fine-tuning jobs take what they leave of it; None lets jobs slow streams down by a quarter.
    ``finetune_tokens`` is the room in the cache for sequences that are trained on, which is also
    the longest of them.

    ``speculation`` is who drafts tokens that are then verified together, where it pays: ``lookup``
    copies from the context, ``model`` is the smaller ``draft_model``, ``layers`` are the first
    ``draft_layers`` of the model itself, ``off`` is nobody. ``pearl`` is ``draft_model`` drafting
    while the model computes, on cores of its own, ``draft_tokens`` at a time; None is as many as
    fit into one step of the model. ``drafts`` independent ones are drawn from a model for each
    sequence.

    ``constraint_backend`` is what turns schemas and grammars into masks: ``llguidance``,
    ``xgrammar``, or ``auto``, which is the first of them that can honour a constraint.
    """

    token_budget: int | None = None
    max_model_len: int | None = None
    kv_memory: int | None = None
    max_sequences: int = 256
    max_queue: int = 1024
    policy: str = "splitfuse"
    page_size: int = 32
    prefix_reuse: bool = True
    runner: str = "auto"
    weights: WeightFormat = "bf16"
    kv_cache: CacheFormat = "auto"
    time_between_tokens: float | None = None
    finetune_tokens: int = 4096
    speculation: str = "lookup"
    draft_model: str | None = None
    draft_layers: int | None = None
    draft_tokens: int | None = None
    drafts: int = 1
    constraint_backend: str = "auto"

    def __post_init__(self) -> None:
        choices = {
            "runner": RUNNERS,
            "weights": get_args(WeightFormat),
            "kv_cache": get_args(CacheFormat),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigurationError(
                    f"{name} must be one of {', '.join(allowed)}, not {value!r}"
                    f"{did_you_mean(value, allowed)}"
                )
        if self.time_between_tokens is not None and not self.time_between_tokens > 0:
            raise ConfigurationError(
                f"time_between_tokens must be above 0 seconds, not {self.time_between_tokens}"
            )
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise ConfigurationError(f"draft_tokens is {self.draft_tokens}; 1 is the least")
        if self.finetune_tokens < 0:
            raise ConfigurationError(f"finetune_tokens is {self.finetune_tokens}; 0 is the least")

    def resolved_token_budget(self, device: torch.device) -> int:
        """The budget, or the sheet value at which this kind of device is near saturation."""
        if self.token_budget is not None:
            return self.token_budget
        return 256 if device.type == "cpu" else 2048

    def resolved_pages(self, page_bytes: int, context_length: int, device: torch.device) -> int:
        """Pages that fit in the memory given, or in a fifth of what is free, 4 GiB at most."""
        if self.kv_memory is not None:
            memory = self.kv_memory
        elif device.type == "cuda":
            memory = int(torch.cuda.mem_get_info(device)[0] * 0.8)
        else:
            memory = min(psutil.virtual_memory().available // 5, 4 * GIBIBYTE)
        pages = memory // page_bytes
        if pages < 1:
            raise ConfigurationError(
                f"kv_memory of {memory} bytes holds no page; one page of {self.page_size} tokens "
                f"of this model takes {page_bytes} bytes"
            )
        # More than every sequence at full length can never be used.
        return min(pages, self.max_sequences * -(-context_length // self.page_size))
