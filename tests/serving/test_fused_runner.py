"""The fused runner against ``generate``, against itself in other batches, and its quality."""

from __future__ import annotations

import copy
import lzma
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from anabranch import models
from anabranch.errors import ConfigurationError, ModelUnsupported
from anabranch.serving import Engine, EngineModel, EngineOptions, kernels
from anabranch.serving.adapters import AdapterCheckpoint, ServedAdapter
from anabranch.serving.batch import StepPlan, StepResult
from anabranch.serving.kernels import reference
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.runner.selection import make_runner
from anabranch.serving.runner.transformers import TransformersRunner
from tests import tiny
from tests.serving.test_architectures import build

SHAPE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "initializer_range": 0.1}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {}),
    ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True}),
    ("Qwen2Config", {}),
    ("Qwen3Config", {}),
    ("MistralConfig", {"sliding_window": 20}),
]


def rounded(name: str, extra: dict[str, Any]) -> PreTrainedModel:
    """A tiny model whose weights bfloat16 holds exactly, computed in single precision."""
    model = build(name, SHAPE | extra)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def engine_on(runner: FusedRunner, **options: Any) -> Engine:
    memory = 60 * runner.page_bytes
    return Engine(
        runner, options=EngineOptions(kv_memory=memory, page_size=runner.page_size, **options)
    )


def lora_folder(folder: Path) -> Path:
    """An adapter for the tiny Llama, with random weights."""
    adapted = get_peft_model(
        rounded("LlamaConfig", {}), LoraConfig(r=8, target_modules="all-linear")
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(-0.2, 0.2)
    adapted.save_pretrained(folder)
    return folder


def prompts() -> dict[str, list[int]]:
    rng = random.Random(1)
    return {str(n): [rng.randrange(3, 96) for _ in range(n)] for n in (1, 16, 33, 90)}


@pytest.mark.parametrize(("name", "extra"), FAMILIES, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("budget", [1, 7, 10**9])
def test_greedy_equals_generate(name: str, extra: dict[str, Any], budget: int) -> None:
    model = rounded(name, extra)
    engine = engine_on(FusedRunner(copy.deepcopy(model), 256, page_size=16), token_budget=budget)
    requests = [tiny.greedy(p, 10, key, ignore_eos=True) for key, p in prompts().items()]
    tokens = engine.generate(requests)
    model.generation_config.eos_token_id = None
    for key, prompt in prompts().items():
        assert tokens[key] == [tiny.reference(model, prompt, 10)]
    assert engine.cache.usage == 0


def test_the_fallback_operations_serve_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rounded("LlamaConfig", {})
    requests = [tiny.greedy(p, 6, key, ignore_eos=True) for key, p in prompts().items()]
    fast = engine_on(FusedRunner(copy.deepcopy(model), 256, page_size=16)).generate(requests)
    plain = kernels.Operations.of(reference, compiled=False)
    monkeypatch.setattr("anabranch.serving.kernels.load", lambda: plain)
    slow = engine_on(FusedRunner(copy.deepcopy(model), 256, page_size=16)).generate(requests)
    assert fast == slow


def rows_of(
    runner: FusedRunner, requests: list[Any], **options: Any
) -> dict[tuple[str, int], torch.Tensor]:
    """Logits of every sampled position, by request and length."""
    engine = engine_on(runner, **options)
    engine._adapters |= {r.adapter for r in requests if r.adapter}
    rows = {}
    execute = runner.execute

    def record(plan: StepPlan) -> StepResult:
        result = execute(plan)
        wanting = [s for s in plan.segments if s.num_logits]
        for segment, row in zip(wanting, result.logits, strict=True):
            rows[segment.sequence.request.id, segment.stop] = row.clone()
        return result

    engine.runner = _Recorded(runner, record)  # type: ignore[assignment]
    engine.generate(requests)
    return rows


class _Recorded:
    """A runner with another ``execute``."""

    def __init__(self, runner: FusedRunner, execute: Any) -> None:
        self._runner = runner
        self.execute = execute

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


@pytest.mark.parametrize(
    ("weights", "kv_cache"), [("int8", "auto"), ("bf16", "auto"), ("bf16", "bf16")]
)
def test_logits_do_not_depend_on_chunks_or_batch_mates_bit_for_bit(
    weights: Any, kv_cache: Any, tmp_path: Path
) -> None:
    model = rounded("LlamaConfig", {})
    runner = FusedRunner(model, 512, page_size=16, weights=weights, kv_cache=kv_cache)
    # The longest goes beyond the block of keys that the kernel softens together.
    long = {"long": [random.Random(2).randrange(3, 96) for _ in range(300)]}
    requests = [tiny.greedy(p, 8, key, ignore_eos=True) for key, p in (prompts() | long).items()]
    adapter, memory = runner.add_adapter(AdapterCheckpoint.read(lora_folder(tmp_path)))
    served = ServedAdapter("a", 1, b"a", memory, adapter)
    requests += [replace(r, id=f"{r.id} adapted", adapter=served) for r in requests]
    alone = {}
    for request in requests:
        alone |= rows_of(runner, [request], prefix_reuse=False)
    for options in ({"token_budget": 3}, {"token_budget": 50}, {"policy": "orca"}):
        together = rows_of(runner, requests, prefix_reuse=False, **options)
        assert together.keys() == alone.keys()
        for key, row in together.items():
            assert torch.equal(row, alone[key]), key


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_any_page_size_that_the_kernels_can_load(page_size: int) -> None:
    model = rounded("LlamaConfig", {})
    engine = engine_on(FusedRunner(copy.deepcopy(model), 256, page_size=page_size))
    model.generation_config.eos_token_id = None
    prompt = prompts()["90"]
    tokens = engine.generate([tiny.greedy(prompt, 5, ignore_eos=True, n=2)])["r"]
    assert tokens == [tiny.reference(model, prompt, 5)] * 2


@pytest.mark.parametrize(
    ("name", "extra", "page_size", "reason"),
    [
        ("GemmaConfig", {}, 16, "it runs LlamaForCausalLM"),
        ("LlamaConfig", {"hidden_act": "gelu"}, 16, "gelu, not silu"),
        ("LlamaConfig", {}, 8, "pages of 8"),
        ("LlamaConfig", {"head_dim": 16}, 16, "heads of 16"),
        ("LlamaConfig", {"hidden_size": 120}, 16, "hidden_size 120"),
    ],
)
def test_what_it_cannot_compute_is_refused_with_the_reason(
    name: str, extra: dict[str, Any], page_size: int, reason: str
) -> None:
    model = build(name, SHAPE | extra)
    with pytest.raises(ModelUnsupported, match=reason):
        FusedRunner(model, 256, page_size=page_size)


def test_weights_that_bfloat16_would_change_are_noticed() -> None:
    model = build("LlamaConfig", SHAPE | {"initializer_range": 1.0})
    with pytest.raises(ModelUnsupported, match="standard deviations"):
        FusedRunner(model, 256)


class TestSelection:
    def loaded(self, tmp_path: Path, dtype: torch.dtype, **extra: Any) -> models.LoadedModel:
        build("LlamaConfig", SHAPE | extra).to(dtype).save_pretrained(tmp_path / "m")
        tiny.byte_tokenizer().save_pretrained(tmp_path / "m")
        return models.load(str(tmp_path / "m"), dtype="float32")

    def test_auto_takes_the_fused_runner_only_where_it_is_exact(self, tmp_path: Path) -> None:
        loaded = self.loaded(tmp_path, torch.bfloat16, vocab_size=256)
        assert isinstance(make_runner(loaded, EngineOptions()), FusedRunner)
        full = self.loaded(tmp_path, torch.float32, vocab_size=256)
        assert isinstance(make_runner(full, EngineOptions()), TransformersRunner)

    def test_int8_is_used_only_when_asked_for(self, tmp_path: Path) -> None:
        loaded = self.loaded(tmp_path, torch.float32, vocab_size=256)
        runner = make_runner(loaded, EngineOptions(weights="int8"))
        assert isinstance(runner, FusedRunner)
        assert runner.weights == "int8"
        with pytest.raises(ConfigurationError, match="needs runner=fused"):
            make_runner(loaded, EngineOptions(weights="int8", runner="transformers"))

    def test_a_wish_that_cannot_be_met_says_why(self, tmp_path: Path) -> None:
        loaded = self.loaded(tmp_path, torch.bfloat16, vocab_size=256, hidden_act="gelu")
        with pytest.raises(ConfigurationError, match=r"runner=fused.*gelu, not silu"):
            make_runner(loaded, EngineOptions(runner="fused"))
        with pytest.raises(ConfigurationError, match="did you mean 'fused'"):
            EngineOptions(runner="fussed")


def test_the_default_model_answers_in_both_formats() -> None:
    for weights in ("bf16", "int8"):
        model = EngineModel.load(options=EngineOptions(weights=weights, kv_memory=2**28))
        assert "fused" in model.dtype
        tokenizer = model._tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            tokenize=False,
        )
        request = tiny.greedy(tokenizer(text)["input_ids"], 20)
        model.engine.add(request)
        answer = "".join(output.delta.text for output in model.engine.run())
        assert answer == "The capital of France is Paris."


def test_int8_perplexity_is_within_one_percent(
    smollm2: models.LoadedModel, record_property: Any
) -> None:
    """Perplexity on wikitext2 against the exact weights, and the divergence of the two."""
    folder = Path(os.environ.get("ANABRANCH_DATA", "data")) / "wikitext2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set ANABRANCH_DATA to the folder that has wikitext2")
    with lzma.open(folder / "test.txt.xz", "rt") as file:
        text = file.read(24_000)
    windows = torch.tensor(smollm2.tokenizer(text)["input_ids"])[: 6 * 512].view(6, 512)
    runner = FusedRunner(smollm2.network, 512, weights="int8")
    losses, divergence = torch.zeros(2), 0.0
    with torch.inference_mode():
        for window in windows:
            exact = smollm2.network(window[None]).logits[0, :-1].log_softmax(-1)
            quantised = runner.all_logits(window.tolist())[:-1].log_softmax(-1)
            for side, logprobs in enumerate((exact, quantised)):
                losses[side] -= logprobs.gather(1, window[1:, None]).mean()
            divergence += float((exact.exp() * (exact - quantised)).sum(-1).mean())
    ratio = float(((losses[1] - losses[0]) / len(windows)).exp())
    record_property("perplexity_ratio", ratio)
    record_property("divergence", divergence / len(windows))
    assert ratio <= 1.01
    assert divergence / len(windows) <= 0.02
