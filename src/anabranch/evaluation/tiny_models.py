"""Small language models with random weights, for experiments that train from scratch."""

from __future__ import annotations

from typing import Any

BYTES = 256


def tiny_llama(
    layers: int = 2,
    width: int = 96,
    heads: int = 4,
    vocabulary: int = BYTES,
    context: int = 256,
    seed: int = 0,
) -> Any:
    """A Llama in float32 that takes gradients; the same weights for the same arguments.

    The feed-forward width is 8/3 of ``width``, in multiples of 8. The generator of the caller is
    left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * round(width / 3),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
