"""Tiny networks of three families, and options that fit their widths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from tests import tiny

VOCABULARY = tiny.VOCABULARY


@cache
def _qwen2() -> nn.Module:
    torch.manual_seed(8)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # zero otherwise, which would hide a lost bias
            nn.init.normal_(parameter)
    return network


@cache
def _gpt2() -> nn.Module:
    torch.manual_seed(9)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=128, resid_pdrop=0.0
    )
    config.embd_pdrop = config.attn_pdrop = 0.0
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def qwen2() -> nn.Module:
    return copy.deepcopy(_qwen2())


def gpt2() -> nn.Module:
    return copy.deepcopy(_gpt2())


MODELS: dict[str, Callable[[], Any]] = {"llama": tiny.llama, "qwen2": qwen2, "gpt2": gpt2}

OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2},
    "adamss": {"r": 8, "num_subspaces": 2},
    "bottleneck": {"bottleneck_size": 8},
    "c3a": {"block_size": 16},
    "cartridge": {"num_virtual_tokens": 4},
    "cpt": {
        "cpt_token_ids": [1, 2, 3, 4],
        "cpt_mask": [1, 1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 3, 4],
    },
    "fishmask": {"weights": 900},
    "fourierft": {"n_frequency": 64},
    "gralora": {"r": 4},
    "lora_sb": {"r": 8},
    "lt_sft": {"weights": 900},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 8},
    "osf": {"effective_rank": 4},
    "pafi": {"weights": 900},
    "psoft": {"r": 4, "psoft_alpha": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "supertuning": {"sparsity": 0.9},
    "trainable_tokens": {"token_indices": [1, 2, 3, 4, 5, 6, 7]},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 64},
}
for preset in ("houlsby", "pfeiffer", "series_input", "parallel", "scaled_parallel"):
    OPTIONS[preset] = OPTIONS["bottleneck"]


def batch(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids that contain the trained tokens of ``trainable_tokens``."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    ids[:, ::3] = torch.randint(1, 8, ids[:, ::3].shape, generator=generator)
    return ids
