"""Synthetic languages over bytes, and a base model that knows one of them.

A language is a lexicon of made-up words and, for each word, a few words that may follow it. Two
languages share the alphabet and nothing else, so that a base trained on one can be adapted to the
other, and forgetting the first can be measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anabranch.evaluation.adapter_comparison import Problem
from anabranch.evaluation.tiny_models import tiny_llama
from anabranch.models.progress import Progress, silent
from anabranch.training.example import Example, Item
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.causal import Causal
from anabranch.training.options import TrainOptions
from anabranch.training.trainer import Trainer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Language:
    """``words`` words of 2 to 6 letters, each with ``successors`` words that may follow."""

    def __init__(self, seed: int, words: int = 48, successors: int = 4) -> None:
        rng = np.random.default_rng([seed, 17])
        lexicon: dict[str, None] = {}
        while len(lexicon) < words:
            lexicon["".join(rng.choice(list(LETTERS), rng.integers(2, 7)))] = None
        self.words = list(lexicon)
        self._next = np.stack(
            [rng.choice(words, successors, replace=False) for _ in range(words)]
        )  # [words, successors]
        self._chance = rng.dirichlet(np.ones(successors), words)  # [words, successors]

    def text(self, length: int, rng: np.random.Generator) -> str:
        """``length`` characters of running text that begins with a word."""
        word = int(rng.integers(len(self.words)))
        text = self.words[word]
        while len(text) < length:
            word = int(rng.choice(self._next[word], p=self._chance[word]))
            text += " " + self.words[word]
        return text[:length]

    def items(self, count: int, length: int, seed: int) -> list[Item]:
        """``count`` texts of ``length`` bytes; every byte but the first is predicted."""
        rng = np.random.default_rng([seed, 23])
        trained = [False] + [True] * (length - 1)
        return [(Example(list(self.text(length, rng).encode()), trained),) for _ in range(count)]


def adaptation_problem(
    *,
    pretraining: int,
    steps: int,
    batch: int = 8,
    length: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Any, Problem]:
    """A base that knows one language, and the task to learn another one in ``steps`` steps."""
    known, unknown = Language(2 * seed + 1), Language(2 * seed + 2)
    base = pretrained(known, steps=pretraining, length=length, seed=seed, progress=progress)
    problem = Problem(
        train=unknown.items(800, length, seed + 5),
        valid=unknown.items(64, length, seed + 6),
        general=known.items(64, length, seed + 7),
        steps=steps,
        batch=batch,
    )
    return base, problem


def pretrained(
    language: Language,
    *,
    steps: int,
    layers: int = 4,
    width: int = 128,
    length: int = 48,
    batch: int = 16,
    lr: float = 3e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> Any:
    """A tiny Llama that was trained from scratch on a language; it takes no gradients."""
    values = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "warmup": 0.05,
        "weight_decay": 0.01,
        "micro_batch_tokens": batch * length,
        "precision": "fp32",
        "seed": seed,
    }
    options = TrainOptions.model_validate(values)
    network = tiny_llama(layers, width, seed=seed)
    items = language.items(min(steps * batch, 8192), length, seed)
    objective = LanguageObjective.from_options(Causal(), options)
    Trainer(network, objective, options, items, progress=progress).fit()
    return network.eval().requires_grad_(False)
