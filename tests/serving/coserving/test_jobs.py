"""Jobs in the engine: the plain trainer's updates, beside requests that notice nothing."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from anabranch import adapters
from anabranch.errors import AnabranchError, ConfigurationError
from anabranch.serving import Engine, EngineOptions
from anabranch.serving.coserving import JobEvent
from anabranch.serving.runner.fused import FusedRunner
from anabranch.training.errors import DataError
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.trainer import Trainer
from tests import tiny
from tests.serving.coserving.helpers import job, rows
from tests.serving.test_fused_runner import rounded


def fused_engine(**options: Any) -> Engine:
    runner = FusedRunner(rounded("LlamaConfig", {}), 256, page_size=16)
    memory = 60 * runner.page_bytes
    return Engine(runner, options=EngineOptions(kv_memory=memory, page_size=16, **options))


def engine_of(kind: str, **options: Any) -> Engine:
    return fused_engine(**options) if kind == "fused" else tiny.engine(**options)


def finish(engine: Engine) -> None:
    for _ in engine.run():
        pass


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["transformers", "fused"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ten_updates_equal_the_plain_trainers(kind: str, optimizer: str, tmp_path: Path) -> None:
    items = rows([20, 33, 7, 50, 12, 2, 40])
    # The engine computes in float32 here; the plain trainer would take bfloat16 where it is native.
    options = {"steps": 10, "batch": 3, "optimizer": optimizer, "lr": 1e-2, "precision": "fp32"}
    spec = job(tmp_path / "served", items, options=options, validation=items[:3])
    events: list[JobEvent] = []
    engine = engine_of(kind)
    engine.finetune(spec, events.append)
    finish(engine)
    assert events[-1].progress.state == "succeeded", events[-1].progress.error

    model = rounded("LlamaConfig", {}) if kind == "fused" else tiny.llama()
    torch.manual_seed(spec.options.seed)
    adapted: PeftModel = adapters.build(spec.method, model, **spec.method_options)
    plain = Trainer(
        adapted,
        LanguageObjective.from_options(Causal(), spec.options),
        spec.options,
        items,
        items[:3],
        output=tmp_path / "plain",
    )
    plain.fit()

    losses = [event.data["loss"] for event in events if event.kind == "step"]
    from anabranch.training.metrics_log import read_metrics

    log = list(read_metrics(tmp_path / "plain" / "metrics.jsonl"))
    assert losses == pytest.approx([line["loss"] for line in log if "loss" in line], rel=1e-4)
    validations = [event.data["loss"] for event in events if event.kind == "validation"]
    expected = [line["validation"]["loss"] for line in log if "validation" in line]
    assert validations == pytest.approx(expected, rel=1e-3) and validations
    (folder,) = [e.data["path"] for e in events if e.kind == "published"]
    theirs = adapters.save(adapted, tmp_path / "theirs")
    for name, weight in trained_weights(Path(folder)).items():
        tolerance = 1e-5 if optimizer == "sgd" else 2e-3
        torch.testing.assert_close(weight, trained_weights(theirs)[name], rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("kind", ["transformers", "fused"])
def test_requests_notice_nothing(kind: str, tmp_path: Path) -> None:
    rng = random.Random(3)
    requests = [
        tiny.greedy([rng.randrange(3, 96) for _ in range(n)], 12, str(n), ignore_eos=True)
        for n in (1, 16, 33, 90)
    ]
    alone = engine_of(kind, token_budget=24).generate(requests)
    engine = engine_of(kind, token_budget=24)
    jobs = [
        engine.finetune(job(tmp_path / name, rows([30, 50], seed), id=name, adapter=name))
        for seed, name in enumerate("ab")
    ]
    assert engine.generate(requests) == alone
    assert all(each.progress.state == "succeeded" for each in jobs)
    assert engine.statistics().finetune_tokens == 2 * 3 * 80
    assert engine.cache.usage == 0


def test_the_new_adapter_answers(tmp_path: Path) -> None:
    engine = fused_engine()
    spec = job(tmp_path, rows([30, 50]), options={"lr": 0.3}, publish_every=1)
    events: list[JobEvent] = []
    engine.finetune(spec, events.append)
    finish(engine)
    published = [event.data for event in events if event.kind == "published"]
    assert [each["version"] for each in published] == [1, 2, 3]
    assert [Path(each["path"]).exists() for each in published] == [False, True, True]
    adapter = engine.finetuned("mine")
    assert adapter.version == 3
    request = tiny.greedy([5, 6, 7], 8, "r", ignore_eos=True)
    (ours,) = engine.generate([replace(request, adapter=adapter)])["r"]
    model = adapters.load(rounded("LlamaConfig", {}), published[-1]["path"])
    model.generation_config.eos_token_id = None
    assert ours == tiny.reference(model, [5, 6, 7], 8)
    assert ours != engine.generate([request])["r"][0]


def test_pause_resume_and_cancel_between_any_two_steps(tmp_path: Path) -> None:
    undisturbed = tmp_path / "whole"
    engine = tiny.engine()
    engine.finetune(job(undisturbed, rows([30, 50, 9])))
    finish(engine)
    for at in (1, 3, 6):
        engine = tiny.engine()
        handle = engine.finetune(job(tmp_path / str(at), rows([30, 50, 9])))
        for _ in range(at):
            engine.step()
        handle.pause()
        finish(engine)
        assert handle.progress.state in ("paused", "succeeded")
        handle.resume()
        finish(engine)
        assert handle.progress.state == "succeeded"
        ours = trained_weights(tmp_path / str(at) / "adapter" / "step-3")
        for name, weight in trained_weights(undisturbed / "adapter" / "step-3").items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-3)

    engine = tiny.engine()
    handle = engine.finetune(job(tmp_path / "cancelled", rows([30, 50, 9])))
    engine.step()
    handle.cancel()
    assert not engine.has_work
    assert handle.wait(0).state == "cancelled"
    assert engine.coserving.jobs == []


def test_a_job_goes_on_after_its_last_checkpoint(tmp_path: Path) -> None:
    spec = job(tmp_path, rows([30, 50, 9]), options={"steps": 6})
    first: list[JobEvent] = []
    engine = tiny.engine()
    engine.finetune(spec, first.append)
    while not any(event.kind == "checkpoint" for event in first):
        engine.step()
    done = max(event.progress.step for event in first)  # the process ends here
    second: list[JobEvent] = []
    other = tiny.engine()
    other.finetune(spec, second.append)
    finish(other)
    steps = [event.progress.step for event in second if event.kind == "step"]
    assert steps[0] in (done, done + 1) and steps[-1] == 6 and len(set(steps)) == len(steps)
    assert second[-1].progress.state == "succeeded"
    again = tiny.engine()
    handle = again.finetune(spec)  # finished, but nobody may know
    finish(again)
    assert handle.progress.state == "succeeded" and handle.progress.version == 1


def test_what_can_never_run_is_refused_at_once(tmp_path: Path) -> None:
    engine = tiny.engine(finetune_tokens=64)
    items = rows([30])
    for wrong, kind, why in (
        (job(tmp_path, rows([90])), DataError, "row 0 has 90 tokens, but .* at most 64"),
        (job(tmp_path, items, method="lroa"), AnabranchError, "no adapter method named 'lroa'"),
        (job(tmp_path, items, options={"gradient_checkpointing": True}), AnabranchError, "grad"),
        (job(tmp_path, items, options={"precision": "bf16"}), AnabranchError, "in fp32, not bf16"),
        (job(tmp_path, []), DataError, "no items"),
    ):
        with pytest.raises(kind, match=why):
            engine.finetune(wrong)
    with pytest.raises(ConfigurationError, match="activations must be one of layer_input"):
        job(tmp_path, items, activations="all")
    with pytest.raises(ConfigurationError, match="weight"):
        job(tmp_path, items, weight=0.0)
    assert not engine.has_work


def test_values_that_are_not_finite_fail_the_job_and_nothing_else(tmp_path: Path) -> None:
    engine = tiny.engine()
    spec = job(tmp_path, rows([30, 50]), options={"steps": 20, "lr": 1e30, "clip": None})
    handle = engine.finetune(spec)
    request = tiny.greedy([5, 6, 7], 8, "r", ignore_eos=True)
    alone = tiny.engine().generate([request])
    finish(engine)
    assert handle.progress.state == "failed" and "not finite" in (handle.progress.error or "")
    assert engine.generate([request]) == alone
    healthy = engine.finetune(job(tmp_path / "healthy", rows([30, 50])))
    finish(engine)
    assert healthy.progress.state == "succeeded"


def test_jobs_share_by_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anabranch.serving.coserving.share.IDLE_SECONDS", 0.004)
    engine = tiny.engine(finetune_tokens=512)
    weights = {"light": 1.0, "heavy": 3.0}
    for name, weight in weights.items():
        engine.finetune(
            job(tmp_path / name, rows([60] * 8), id=name, weight=weight, options={"steps": 500})
        )
    for _ in range(200):
        engine.step()
    spent = {each.job.id: each.work * each.job.weight for each in engine.coserving.jobs}
    assert spent["heavy"] / spent["light"] == pytest.approx(3.0, rel=0.5)


def test_jobs_wait_for_room_in_the_cache(tmp_path: Path) -> None:
    engine = tiny.engine(finetune_tokens=96, page_size=32)
    handles = [
        engine.finetune(job(tmp_path / name, rows([60, 80]), id=name, adapter=name))
        for name in "abc"
    ]
    finish(engine)
    assert Counter(handle.progress.state for handle in handles) == {"succeeded": 3}


@settings(max_examples=10)
@given(
    actions=st.lists(
        st.sampled_from(["step", "request", "abort", "job", "pause", "resume", "cancel"]),
        max_size=40,
    )
)
def test_nothing_leaks_whatever_happens(
    actions: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("jobs")
    engine = tiny.engine(pages=12, page_size=16, token_budget=16, finetune_tokens=128)
    rng = random.Random(len(actions))
    handles, requests = [], 0
    for number, action in enumerate(actions):
        if action == "step":
            engine.step()
        elif action == "request":
            prompt = [rng.randrange(256) for _ in range(rng.randrange(1, 60))]
            engine.add(tiny.greedy(prompt, 6, f"r{number}", ignore_eos=True))
            requests = number
        elif action == "abort":
            engine.abort(f"r{requests}")
        elif action == "job" and len(handles) < 3:
            spec = job(folder / str(number), rows([40, 9]), id=str(number), adapter=str(number))
            handles.append(engine.finetune(spec))
        elif handles and action != "job":
            getattr(rng.choice(handles), action)()
    for handle in handles:
        handle.resume()
    finish(engine)
    assert all(handle.progress.state in ("succeeded", "cancelled") for handle in handles)
    assert engine.cache.usage == 0 and not engine.coserving.jobs
    free = engine.coserving._pool
    assert free.take([free.page_size] * free.count) is not None
