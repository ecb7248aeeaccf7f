"""A tiny random model to be examined, and data sets in a folder of a test's own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from anabranch.evaluation.benchmarks import Subject
from anabranch.training.template import Template
from tests.training.tiny_base import BYTES, END, PAD, tokenizer


@cache
def network():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=BYTES + 3,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        return LlamaForCausalLM(config).eval()


def subject(**changes):
    made = Template("chat", tokenizer(), [])
    return Subject(network(), tokenizer(), made, **{"context": 512, **changes})


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
