"""Every model family is either served exactly or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from anabranch.errors import ModelUnsupported
from anabranch.serving import Engine, EngineOptions
from anabranch.serving.runner.transformers import TransformersRunner
from tests import tiny

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GPT = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 256}
WINDOW = {"sliding_window": 8, "head_dim": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}

SERVED: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {}),
    ("Qwen2Config", {}),
    ("Qwen3Config", {"head_dim": 16}),
    ("MistralConfig", WINDOW),
    ("MixtralConfig", {"num_local_experts": 4}),
    ("GemmaConfig", {"head_dim": 16}),
    ("Gemma2Config", WINDOW | MIXED | {"attn_logit_softcapping": 5.0}),
    ("Gemma3TextConfig", WINDOW | MIXED),
    ("PhiConfig", {}),
    ("Phi3Config", {}),
    ("GPT2Config", GPT),
    ("GPTNeoXConfig", {}),
    ("OPTConfig", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    ("OlmoConfig", {}),
    ("GraniteConfig", {}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("FalconConfig", {"alibi": False}),
    ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    ("MptConfig", {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    ("StableLmConfig", {"hidden_size": 64}),
    ("MambaConfig", {"state_size": 4}),
]


def build(name: str, extra: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(3)
    config = getattr(transformers, name)(**(COMMON | extra))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(("name", "extra"), SERVED, ids=lambda value: str(value)[:24])
def test_served_families_equal_generate(name: str, extra: dict[str, Any]) -> None:
    model = build(name, extra)
    runner = TransformersRunner(copy.deepcopy(model), 256, page_size=8)
    options = EngineOptions(token_budget=11, kv_memory=40 * runner.page_bytes, page_size=8)
    engine = Engine(runner, options=options)
    prompts = {str(n): [(n * i + 5) % 90 + 3 for i in range(n)] for n in (1, 9, 40)}
    requests = [tiny.greedy(prompt, 8, key, ignore_eos=True) for key, prompt in prompts.items()]
    tokens = engine.generate(requests)
    model.generation_config.eos_token_id = None
    for key, prompt in prompts.items():
        assert tokens[key] == [tiny.reference(model, prompt, 8)]
    assert engine.cache.usage == 0


@pytest.mark.parametrize(("name", "extra"), REFUSED, ids=lambda value: str(value)[:24])
def test_others_are_refused_by_name(name: str, extra: dict[str, Any]) -> None:
    model = build(name, extra)
    with pytest.raises(ModelUnsupported, match=f"{type(model).__name__} cannot be served"):
        TransformersRunner(model, 256)


def test_a_model_that_lies_about_its_attention_is_refused() -> None:
    """It calls the interface in every layer, but adds something of its own afterwards."""
    model = build("LlamaConfig", {})
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def with_memory(*args: Any, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        return output + output.cumsum(dim=1), weights

    attention.forward = with_memory
    with pytest.raises(ModelUnsupported, match="differ by"):
        TransformersRunner(model, 256)
