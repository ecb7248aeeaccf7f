"""Adapters on disk: whole or not at all, refused if they do not fit, readable by plain PEFT."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from anabranch import adapters
from anabranch.adapters import AdapterError, AdapterMismatch
from tests.adapters.models import MODELS, batch


def built(name: str = "lora", **options: Any) -> Any:
    torch.manual_seed(5)
    model = adapters.build(name, MODELS["llama"](), **options).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_lora_loads_in_plain_peft(tmp_path: Path) -> None:
    model = built()
    folder = adapters.save(model, tmp_path / "a")
    plain = PeftModel.from_pretrained(MODELS["llama"](), folder).eval()
    assert torch.equal(plain(batch()).logits, model(batch()).logits)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written.keys() <= {field.name for field in dataclasses.fields(LoraConfig)}


def test_only_its_own_weights_are_stored_under_its_prefix(tmp_path: Path) -> None:
    folder = adapters.save(built("ssf"), tmp_path / "a")
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == 2 * 7 * 2
    assert all(".anabn_ssf_branches." in key and "default" not in key for key in stored)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_named_adapter_is_stored_alike_and_alone(tmp_path: Path) -> None:
    model = built("ssf")
    adapters.build("ssf", model, "other", init_std=0.3)
    one = adapters.save(model, tmp_path / "one", "default")
    other = adapters.save(model, tmp_path / "other", "other")
    assert {path.name for path in one.iterdir()} - {"README.md"} == {
        path.name for path in other.iterdir()
    } - {"README.md"}
    loaded = adapters.load(MODELS["llama"](), other, "default")
    adapters.load(loaded, one, "first")
    model.set_adapter("other")
    assert torch.equal(loaded(batch()).logits, model.eval()(batch()).logits)
    loaded.set_adapter("first")
    model.set_adapter("default")
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)


def test_loading_beside_a_trained_one_leaves_that_trainable(tmp_path: Path) -> None:
    folder = adapters.save(built("ssf"), tmp_path / "a")
    model = built("ssf")
    trained = sum(p.requires_grad for p in model.parameters())
    adapters.load(model, folder, "stored")
    assert sum(p.requires_grad for p in model.parameters()) == trained
    resumed = adapters.load(MODELS["llama"](), folder, trainable=True)
    assert sum(p.requires_grad for p in resumed.parameters()) == trained


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = built()
    folder = adapters.save(model, tmp_path / "a")
    with pytest.raises(AdapterError, match="exists"):
        adapters.save(model, folder)
    with pytest.raises(AdapterError, match=r"no adapter named 'defualt' \(did you mean 'default'"):
        adapters.save(model, tmp_path / "b", "defualt")
    assert not (tmp_path / "b").exists()


def test_a_failed_save_leaves_no_trace(tmp_path: Path, monkeypatch: Any) -> None:
    model = built()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        adapters.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_killed_while_saving_leaves_whole_adapters_only(tmp_path: Path) -> None:
    model = built("ssf")

    def save_for_ever() -> None:
        for index in itertools.count():
            adapters.save(model, tmp_path / str(index))

    process = multiprocessing.get_context("fork").Process(target=save_for_ever)
    process.start()
    while not list(tmp_path.glob("[0-9]*")):
        time.sleep(0.01)
    time.sleep(0.02)
    process.kill()
    process.join()
    whole = list(tmp_path.glob("[0-9]*"))
    assert whole
    for folder in whole:
        adapters.load(MODELS["llama"](), folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "is no adapter: it has no adapter_config"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 30), "is damaged"),
        (lambda f: edit(f, peft_type="LORRA"), r"'LORRA' \(did you mean 'LORA'"),
        (lambda f: edit(f, warp=1, shield=2), "does not know: shield, warp"),
        (lambda f: edit(f, target_modules=["nowhere"]), "nowhere"),
    ],
)
def test_refuses_what_is_no_adapter(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = adapters.save(built(), tmp_path / "a")
    spoil(folder)
    model = MODELS["llama"]()
    with pytest.raises(AdapterError, match=message):
        adapters.load(model, folder)
    assert not hasattr(model, "peft_config")


def test_refuses_an_adapter_of_another_base(tmp_path: Path) -> None:
    folder = adapters.save(built("lora"), tmp_path / "a")
    model = MODELS["qwen2"]()
    with pytest.raises(AdapterMismatch, match=r"is \[8, 48\] there, but \[8, 32\] here"):
        adapters.load(model, folder)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(batch()).logits, MODELS["qwen2"]()(batch()).logits)


def test_refuses_missing_and_surplus_tensors(tmp_path: Path) -> None:
    folder = adapters.save(built("lora", target_modules=["q_proj"]), tmp_path / "a")
    edit(folder, target_modules=["q_proj", "v_proj"])
    with pytest.raises(AdapterMismatch, match=r"lacks .*v_proj.lora_A"):
        adapters.load(MODELS["llama"](), folder)
    folder = adapters.save(built("lora", target_modules=["q_proj", "v_proj"]), tmp_path / "b")
    edit(folder, target_modules=["q_proj"])
    with pytest.raises(AdapterMismatch, match=r"no place for .*v_proj"):
        adapters.load(MODELS["llama"](), folder)
