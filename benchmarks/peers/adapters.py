"""Adapters with random weights: what they say does not matter for how long it takes."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from anabranch import models
from anabranch.models.cache import root

RANK = 16


def random_adapters(model: str, count: int) -> list[str]:
    """Folders of ``count`` LoRA adapters on all linear layers, made once."""
    base = root() / "bench" / "adapters" / models.card(model).fingerprint[:16]
    folders = [base / str(index) for index in range(count)]
    missing = [folder for folder in folders if not (folder / "adapter_config.json").exists()]
    if missing:
        network = models.load(model, dtype="float32").network
        config = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(network, config)
        for folder in missing:
            _randomise(adapted, folder)
            adapted.save_pretrained(folder)
    return [str(folder) for folder in folders]


def _randomise(adapted: torch.nn.Module, folder: Path) -> None:
    generator = torch.Generator().manual_seed(int(folder.name))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.01, generator=generator)
