"""Tiny random models and tokenizers that build in milliseconds."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, EngineOptions, Request
from anabranch.serving.runner.transformers import TransformersRunner

CONTEXT = 1024
VOCABULARY = 256


@cache
def _llama() -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,  # sharp enough that rounding never decides between two tokens
    )
    with torch.random.fork_rng():  # whoever comes first draws the same numbers as the others
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def llama() -> PreTrainedModel:
    """A two-layer Llama with grouped heads; always the same weights, always a fresh copy."""
    return copy.deepcopy(_llama())


def runner(page_size: int = 32) -> TransformersRunner:
    return TransformersRunner(llama(), CONTEXT, page_size)


def engine(pages: int = 1000, page_size: int = 32, tokenizer: Any = None, **options: Any) -> Engine:
    """An engine with room for ``pages`` pages."""
    return engine_of(runner(page_size), pages, tokenizer, **options)


def engine_of(
    made: TransformersRunner, pages: int, tokenizer: Any = None, **options: Any
) -> Engine:
    """An engine on a runner that may have served another one before."""
    memory = pages * made.page_bytes
    return Engine(
        made,
        tokenizer=tokenizer,
        options=EngineOptions(kv_memory=memory, page_size=made.page_size, **options),
    )


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: a character may take four, and any byte sequence can be sampled."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def greedy(prompt: list[int], max_tokens: int, id: str = "r", **sampling: Any) -> Request:  # noqa: A002
    return Request(
        id, prompt, SamplingParameters(max_tokens=max_tokens, temperature=0.0, **sampling)
    )


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens by transformers' own ``generate``."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()
