"""A tiny language model with LoRA, and clients of a few random sequences."""

from __future__ import annotations

import numpy as np
import torch

from anabranch import adapters
from anabranch.evaluation.testbeds import tinyops
from anabranch.federated import Site
from anabranch.federated.local import LocalTraining
from anabranch.training.example import Example
from tests import tiny


def lora(r=4, alpha=8, seed=0, **options):
    torch.manual_seed(seed)
    chosen = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, **options}
    return adapters.build("lora", tiny.llama(), r=r, lora_alpha=alpha, **chosen)


def items(count, seed=0, task="noise", length=8):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, tiny.VOCABULARY, (count, length)).tolist()
    trained = (False,) * (length // 2) + (True,) * (length - length // 2)
    return [(Example(tuple(row), trained, task),) for row in rows]


def sites(count=3, examples=8):
    return [Site(f"c{i}", items(examples, i, f"task {i}")) for i in range(count)]


def local(**options):
    settings = {"lr": 1e-2, "batch": 4, "steps": 2, **options}
    return LocalTraining(tinyops.objective(), tinyops.training_options(**settings))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits
