"""TinyOps: a small transformer that knows four sequence operations and is to learn four more.

Symbols are 0 to 15, operations 16 to 23. A sequence is an operation, five input symbols, and the
five symbols that the operation makes of them; only those are trained on and scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.federated.randomness import derive_seed, generator
from anabranch.files import replacing
from anabranch.models.cache import root
from anabranch.models.progress import Progress, silent
from anabranch.training.example import Example, Item
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.options import TrainOptions
from anabranch.training.trainer import Trainer

SYMBOLS = 16
LENGTH = 5

OPERATIONS: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("copy", lambda x: x),
    ("reverse", lambda x: x[:, ::-1]),
    ("sort", lambda x: np.sort(x, axis=1)),
    ("rotate", lambda x: np.roll(x, 1, axis=1)),
    ("increment", lambda x: (x + 1) % SYMBOLS),
    ("swap", lambda x: np.concatenate([x[:, -1:], x[:, 1:-1], x[:, :1]], axis=1)),
    ("maximum", lambda x: np.repeat(x.max(1, keepdims=True), LENGTH, axis=1)),
    ("mirror", lambda x: SYMBOLS - 1 - x),
)
"""Name and what it does with inputs [n, 5]. The first four are known to the base model."""

KNOWN, NEW = (0, 1, 2, 3), (4, 5, 6, 7)
_TRAINED = (False,) * (1 + LENGTH) + (True,) * LENGTH


def sequences(operation: int, count: int, *seed: int | str) -> np.ndarray:
    """Random sequences of an operation, int64 [count, 11]."""
    inputs = generator("tinyops", operation, *seed).integers(0, SYMBOLS, (count, LENGTH))
    head = np.full((count, 1), SYMBOLS + operation)
    return np.concatenate([head, inputs, OPERATIONS[operation][1](inputs)], axis=1)


def items(operation: int, count: int, *seed: int | str) -> list[Item]:
    """The same as training items."""
    name = OPERATIONS[operation][0]
    rows = sequences(operation, count, *seed).tolist()
    return [(Example(tuple(row), _TRAINED, name),) for row in rows]


def network(seed: int = 0, layers: int = 2, width: int = 64) -> Any:
    """A Llama of 103,744 random weights, the same for the same arguments."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=SYMBOLS + len(OPERATIONS),
        max_position_embeddings=1 + 2 * LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrained(
    seed: int = 0, steps: int = 1500, layers: int = 2, width: int = 64, progress: Progress = silent
) -> Any:
    """The network after ``steps`` steps of 64 sequences on the known operations, from a cache."""
    recipe = {"seed": seed, "steps": steps, "layers": layers, "width": width, "version": 1}
    model = network(seed, layers, width)
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = root() / "testbeds" / f"tinyops-{digest}.safetensors"
    from safetensors.torch import load_model, save_model

    if not path.exists():
        data = [items(o, steps * 16, "pretraining", seed) for o in KNOWN]
        options = training_options(lr=2e-3, batch=64, steps=steps, schedule="cosine", warmup=0.3)
        mixed = [item for group in zip(*data, strict=True) for item in group]
        trainer: Trainer[Item] = Trainer(model, objective(), options, mixed)
        for step in range(steps):
            trainer.step(trainer.next_items())
            progress(f"pretraining TinyOps: step {step + 1} of {steps}", (step + 1) / steps)
        with replacing(path) as draft:
            save_model(model.eval(), str(draft))
    load_model(model, str(path))
    return model.eval()


def objective() -> LanguageObjective:
    """Next-symbol cross entropy of the outputs."""
    return LanguageObjective(Causal(), micro_batch_tokens=4096, packing="none")


def training_options(**values: Any) -> TrainOptions:
    """AdamW at 5e-3, batches of 16, 10 steps, constant rate; ``values`` change that."""
    settled = {
        "lr": 5e-3,
        "batch": 16,
        "steps": 10,
        "schedule": "constant",
        "warmup": 0.0,
        "clip": None,
        "precision": "fp32",
    }
    return TrainOptions.model_validate({**settled, **values})


@torch.no_grad()
def score(model: nn.Module, operations: Sequence[int] = NEW, seed: int = 77) -> dict[str, float]:
    """``loss`` and ``accuracy`` on 256 fresh sequences of each operation, and of each by name."""
    figures: dict[str, float] = {}
    for operation in operations:
        tokens = _held_out(operation, seed)
        logits = model(input_ids=tokens[:, :-1]).logits[:, LENGTH:]  # [n, 5, symbols]
        wanted = tokens[:, LENGTH + 1 :]
        name = OPERATIONS[operation][0]
        figures[f"loss/{name}"] = float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten()))
        figures[f"accuracy/{name}"] = float((logits.argmax(-1) == wanted).double().mean())
    names = [OPERATIONS[operation][0] for operation in operations]
    for figure in ("loss", "accuracy"):
        figures[figure] = float(np.mean([figures[f"{figure}/{name}"] for name in names]))
    return figures


@cache
def _held_out(operation: int, seed: int) -> Tensor:
    return torch.from_numpy(sequences(operation, 256, "test", derive_seed(seed)))
