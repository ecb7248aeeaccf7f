"""Adapters in the engine: equal to PEFT's own forward, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from anabranch import adapters
from anabranch.errors import AdapterError, ConfigurationError, InvalidRequest, ModelNotFound
from anabranch.serving import Engine, EngineOptions, Request, kernels
from anabranch.serving.adapters import (
    AdapterBank,
    AdapterCheckpoint,
    ServedAdapter,
)
from anabranch.serving.kernels import reference
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.runner.transformers import TransformersRunner
from tests import tiny
from tests.serving.test_fused_runner import rounded

CONFIGS: dict[str, Any] = {
    "sb": adapters.lora_sb.LoraSBConfig(r=8, target_modules=["q_proj", "gate_proj", "down_proj"]),
    "all": LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"),
    "attention": LoraConfig(r=20, lora_alpha=40, target_modules=["q_proj", "v_proj"]),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["k_proj", "o_proj", "down_proj"],
        rank_pattern={"k_proj": 7},
        alpha_pattern={"layers.1.self_attn.k_proj": 30},
    ),
}
PROMPTS = {n: [random.Random(n).randrange(3, 96) for _ in range(n)] for n in (1, 16, 33, 70)}


def model() -> PreTrainedModel:
    return rounded("LlamaConfig", {})


def saved(folder: Path, config: Any, seed: int) -> Path:
    """A checkpoint with random weights, large enough to change every answer."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model(), copy.deepcopy(config))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.2 + ("ia3" in name)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: saved(root / name, config, seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str | None, int], list[int]]:
    """Greedy tokens by PEFT and ``generate``, for each adapter and prompt."""
    answers = {}
    for name in (None, *folders):
        reference_model: Any = model()
        reference_model.generation_config.eos_token_id = None
        if name is not None:
            adapted = PeftModel.from_pretrained(reference_model, str(folders[name]))
            reference_model = adapted.merge_and_unload()
        for length, prompt in PROMPTS.items():
            answers[name, length] = tiny.reference(reference_model, prompt, 6)
    assert len({tuple(v) for (_, n), v in answers.items() if n == 70}) == len(folders) + 1
    return answers


def engine_on(kind: str, **options: Any) -> Engine:
    make = {"fused": FusedRunner, "transformers": TransformersRunner}[kind]
    runner = make(model(), 256, page_size=16)
    memory = 80 * runner.page_bytes
    return Engine(runner, options=EngineOptions(kv_memory=memory, page_size=16, **options))


def requests_for(served: dict[str | None, ServedAdapter | None]) -> list[Request]:
    return [
        Request(f"{name}/{length}", prompt, tiny.greedy([1], 6, ignore_eos=True).sampling, False, a)
        for length, prompt in PROMPTS.items()
        for name, a in served.items()
    ]


@pytest.mark.parametrize("kind", ["fused", "transformers"])
@pytest.mark.parametrize("budget", [5, 10**9])
def test_a_mixed_batch_equals_each_adapter_alone(
    kind: str, budget: int, folders: dict[str, Path], expected: Any
) -> None:
    engine = engine_on(kind, token_budget=budget)
    served: dict[str | None, ServedAdapter | None] = {None: None}
    for name, folder in folders.items():
        served[name] = engine.add_adapter(name, AdapterCheckpoint.read(folder))
    tokens = engine.generate(requests_for(served))
    for (name, length), answer in expected.items():
        assert tokens[f"{name}/{length}"] == [answer], (name, length)
    # Again: now every prompt's pages are cached, each under its adapter.
    again = engine.generate(requests_for(served))
    assert again == tokens
    assert engine.cache.usage == 0
    engine.cache.check_integrity()


def test_the_fallback_operations_compute_the_same(
    folders: dict[str, Path], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = kernels.Operations.of(reference, compiled=False)
    monkeypatch.setattr("anabranch.serving.kernels.load", lambda: plain)
    engine = engine_on("fused")
    adapter = engine.add_adapter("all", AdapterCheckpoint.read(folders["all"]))
    tokens = engine.generate(requests_for({"all": adapter}))
    assert tokens == {f"all/{n}": [expected["all", n]] for n in PROMPTS}


def test_other_methods_are_served_one_after_the_other(
    folders: dict[str, Path], expected: Any, tmp_path: Path
) -> None:
    folder = saved(
        tmp_path / "ia3", IA3Config(target_modules="all-linear", feedforward_modules=[]), 9
    )
    adapted = PeftModel.from_pretrained(model(), str(folder)).merge_and_unload()
    adapted.generation_config.eos_token_id = None
    engine = engine_on("transformers")
    served = {
        name: engine.add_adapter(name, AdapterCheckpoint.read(path))
        for name, path in {"ia3": folder, "all": folders["all"]}.items()
    }
    tokens = engine.generate(requests_for({None: None, **served}))
    for length, prompt in PROMPTS.items():
        assert tokens[f"ia3/{length}"] == [tiny.reference(adapted, prompt, 6)]
        assert tokens[f"all/{length}"] == [expected["all", length]]
        assert tokens[f"None/{length}"] == [expected[None, length]]


def test_the_fused_runner_names_what_cannot_share_a_batch(tmp_path: Path) -> None:
    engine = engine_on("fused")
    for config, word in (
        (IA3Config(target_modules="all-linear", feedforward_modules=[]), "IA3"),
        (LoraConfig(use_dora=True, target_modules=["q_proj"]), "magnitude"),
        (LoraConfig(target_modules=["lm_head"]), "lm_head"),
    ):
        folder = saved(tmp_path / word, config, 0)
        with pytest.raises(AdapterError, match=word):
            engine.add_adapter("x", AdapterCheckpoint.read(folder))


@pytest.mark.parametrize("kind", ["fused", "transformers"])
def test_an_adapter_of_another_model_is_refused_and_the_engine_goes_on(
    kind: str, folders: dict[str, Path], expected: Any, tmp_path: Path
) -> None:
    other = get_peft_model(tiny.llama(), copy.deepcopy(CONFIGS["all"]))
    other.save_pretrained(tmp_path / "other")
    engine = engine_on(kind)
    for _ in range(2):
        with pytest.raises(AdapterError, match="another model"):
            engine.add_adapter("other", AdapterCheckpoint.read(tmp_path / "other"))
        adapter = engine.add_adapter("all", AdapterCheckpoint.read(folders["all"]))
        tokens = engine.generate(requests_for({None: None, "all": adapter}))
        for name in (None, "all"):
            assert tokens[f"{name}/33"] == [expected[name, 33]]


def test_virtual_tokens_are_refused(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model(), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(AdapterError, match="virtual tokens"):
        engine_on("transformers").add_adapter("p", AdapterCheckpoint.read(tmp_path / "prompt"))


class TestCheckpoints:
    def test_not_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="a PEFT folder"):
            AdapterCheckpoint.read(tmp_path / "nothing")

    def test_damaged(self, folders: dict[str, Path], tmp_path: Path) -> None:
        config = (folders["all"] / "adapter_config.json").read_text()
        (tmp_path / "adapter_config.json").write_text(config)
        weights = (folders["all"] / "adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(weights[:100])
        with pytest.raises(AdapterError, match="damaged"):
            AdapterCheckpoint.read(tmp_path)
        (tmp_path / "adapter_config.json").write_text(config[:-5])
        with pytest.raises(AdapterError, match="cannot be read"):
            AdapterCheckpoint.read(tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1}))
        with pytest.raises(AdapterError, match="peft_type"):
            AdapterCheckpoint.read(tmp_path)

    def test_options_that_leave_no_tensor(self, folders: dict[str, Path], tmp_path: Path) -> None:
        config = json.loads((folders["all"] / "adapter_config.json").read_text())
        config["alora_invocation_tokens"] = [1, 2]
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        weights = (folders["all"] / "adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        checkpoint = AdapterCheckpoint.read(tmp_path)
        assert "alora_invocation_tokens" in str(checkpoint.not_low_rank)
        with pytest.raises(AdapterError, match="alora"):
            checkpoint.low_rank()


class TestRemoval:
    def start(self, folders: dict[str, Path]) -> tuple[Engine, ServedAdapter, list[Any]]:
        engine = engine_on("transformers")
        removed: list[Any] = []
        engine.runner.remove_adapter = removed.append  # type: ignore[method-assign]
        adapter = engine.add_adapter("all", AdapterCheckpoint.read(folders["all"]))
        engine.add(tiny.greedy(PROMPTS[33], 6, ignore_eos=True))
        request = Request("r", PROMPTS[33], tiny.greedy([1], 6, ignore_eos=True).sampling)
        engine.add(replace(request, id="adapted", adapter=adapter))
        engine.step()
        engine.remove_adapter(adapter)
        engine.remove_adapter(adapter)  # twice is harmless
        assert removed == []
        return engine, adapter, removed

    def test_running_requests_finish_and_new_ones_are_refused(
        self, folders: dict[str, Path], expected: Any
    ) -> None:
        engine, adapter, removed = self.start(folders)
        with pytest.raises(InvalidRequest, match="removed"):
            engine.add(Request("late", [1], adapter=adapter))
        outputs = [o for o in engine.run() if o.request_id == "adapted"]
        tokens = [t for output in outputs for t in output.delta.token_ids]
        assert tokens == expected["all", 33][1:]
        assert removed == [adapter.handle]

    def test_an_aborted_request_releases_its_adapter(self, folders: dict[str, Path]) -> None:
        engine, adapter, removed = self.start(folders)
        engine.abort("adapted")
        assert removed == [adapter.handle]

    def test_an_unused_one_goes_at_once(self, folders: dict[str, Path]) -> None:
        engine, _, _ = self.start(folders)
        other = engine.add_adapter("other", AdapterCheckpoint.read(folders["attention"]))
        engine.remove_adapter(other)
        assert other not in engine._adapter_users


def test_a_branch_shares_the_weights_of_its_base(folders: dict[str, Path]) -> None:
    runner = TransformersRunner(model(), 256, page_size=16)
    checkpoint = AdapterCheckpoint.read(folders["all"])
    branch, memory = runner.add_adapter(checkpoint)
    base = {p.data_ptr() for p in runner.model.parameters()}
    own = [p for p in branch.parameters() if p.data_ptr() not in base]
    assert sum(p.numel() for p in own) == checkpoint.parameters
    assert memory == 4 * checkpoint.parameters
    assert not any("lora" in name for name in runner.model.state_dict())


class Recorder:
    """Stands in for an engine: every adapter takes 100 bytes."""

    def __init__(self) -> None:
        self.loaded: list[ServedAdapter] = []
        self.bank = AdapterBank(self.attach, self.loaded.remove, memory=250)

    async def attach(self, name: str, version: int, checkpoint: AdapterCheckpoint) -> ServedAdapter:
        await asyncio.sleep(0)
        adapter = ServedAdapter(name, version, b"", 100, None)
        self.loaded.append(adapter)
        return adapter

    @property
    def names(self) -> list[str]:
        return sorted(f"{a.name}@{a.version}" for a in self.loaded)


class TestBank:
    def test_keeps_the_most_recently_used_in_memory(self, folders: dict[str, Path]) -> None:
        async def story() -> None:
            recorder = Recorder()
            bank = recorder.bank
            for name in "abc":
                await bank.load(name, folders["all"])
            assert recorder.names == ["b@1", "c@1"]
            await bank.acquire("b")
            assert (await bank.acquire("a")).name == "a"
            assert recorder.names == ["a@1", "b@1"]
            assert [card.loaded for card in bank.cards()] == [True, True, False]

        asyncio.run(story())

    def test_a_new_version_replaces_the_old_one(self, folders: dict[str, Path]) -> None:
        async def story() -> None:
            recorder = Recorder()
            await recorder.bank.load("a", folders["all"])
            old = await recorder.bank.acquire("a")
            card = await recorder.bank.load("a", folders["attention"])
            assert card.version == 2 and recorder.names == ["a@2"]
            assert (await recorder.bank.acquire("a")).version == 2 and old.version == 1
            recorder.bank.unregister("a")
            assert recorder.names == []
            assert (await recorder.bank.load("a", folders["all"])).version == 3

        asyncio.run(story())

    def test_many_at_once_load_one_copy(self, folders: dict[str, Path]) -> None:
        async def story() -> None:
            recorder = Recorder()
            for name in "abc":
                await recorder.bank.load(name, folders["all"])
            served = await asyncio.gather(*(recorder.bank.acquire("a") for _ in range(9)))
            assert len(set(served)) == 1 and recorder.names.count("a@1") == 1

        asyncio.run(story())

    @settings(max_examples=40, deadline=None)
    @given(data=st.data())
    def test_what_is_in_memory_fits_and_is_what_was_used_last(
        self, folders: dict[str, Path], data: st.DataObject
    ) -> None:
        async def story() -> None:
            recorder = Recorder()
            order: list[str] = []
            for _ in range(data.draw(st.integers(1, 20))):
                name = data.draw(st.sampled_from("abcd"))
                if name in order:
                    assert (await recorder.bank.acquire(name)).name == name
                    order.remove(name)
                else:
                    await recorder.bank.load(name, folders["all"])
                order.append(name)
                assert recorder.names == sorted(f"{n}@1" for n in order[-2:])

        asyncio.run(story())

    def test_names(self, folders: dict[str, Path]) -> None:
        async def story() -> None:
            bank = Recorder().bank
            for name in ("", "a:b", "a/b", "a b", "\n"):
                with pytest.raises(ConfigurationError, match="cannot name"):
                    await bank.load(name, folders["all"])
            await bank.load("polite", folders["all"])
            with pytest.raises(ModelNotFound, match="did you mean 'polite'"):
                await bank.acquire("polit")
            with pytest.raises(ModelNotFound):
                bank.unregister("other")

        asyncio.run(story())
