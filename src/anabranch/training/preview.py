"""What a recipe would do: rows as the model will see them, and what a run would cost."""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from anabranch.models.progress import Progress, silent, within
from anabranch.training.checks import check
from anabranch.training.data import DataReport, prepare
from anabranch.training.example import Example
from anabranch.training.recipe import Recipe
from anabranch.training.setup import Setup, load_base
from anabranch.training.template import Template

MEASURED_STEPS = 3
"""The first one also warms up and does not count."""


@dataclass(frozen=True)
class Span:
    """A stretch of text that is trained on, or not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Preview:
    """Rows, counts and cost of a run that did not take place.

    ``rows`` holds the spans of each text of a few training rows. ``train_seconds`` extrapolates
    measured optimiser steps by tokens; held-out evaluation comes on top. ``peak_bytes`` is the
    memory of this process, or of the GPU, during those steps.
    """

    recipe: dict[str, Any]
    rows: list[list[list[Span]]]
    items: dict[str, int]
    tokens: int
    targets: int
    steps: int
    trainable: int
    parameters: int
    tokens_per_second: float
    train_seconds: float
    peak_bytes: int
    data: DataReport

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def preview(recipe: Recipe, rows: int = 3, progress: Progress = silent) -> Preview:
    """Check and read everything, take a few steps, and write nothing.

    Raises whatever the run would raise before its first step.
    """
    check(recipe)
    prepared = prepare(recipe, within(progress, 0.0, 0.4))
    base = load_base(recipe, progress)
    setup = Setup.of(recipe, base, prepared)
    trainer = setup.trainer(None)
    seconds, tokens = [], []
    for number in range(MEASURED_STEPS):
        progress(f"measuring step {number + 1} of {MEASURED_STEPS}", 0.6 + 0.1 * number)
        report = trainer.step(trainer.next_items())
        seconds.append(report.seconds)
        tokens.append(report.tokens)
    speed = statistics.median(t / s for t, s in zip(tokens[1:], seconds[1:], strict=True))
    total = sum(len(example) for item in trainer.items for example in item)
    per_step = total / len(trainer.items) * recipe.train.batch
    return Preview(
        recipe=recipe.resolved(),
        rows=[
            [spans(example, setup.template) for example in item] for item in trainer.items[:rows]
        ],
        items={"train": len(trainer.items), "valid": len(trainer.validation)}
        | {name: len(held_out.items) for name, held_out in setup.held_out.items()},
        tokens=total,
        targets=sum(example.targets for item in trainer.items for example in item),
        steps=trainer.total_steps,
        trainable=sum(p.numel() for p in trainer.trainable.values()),
        parameters=sum(p.numel() for p in setup.model.parameters()),
        tokens_per_second=speed,
        train_seconds=trainer.total_steps * per_step / speed,
        peak_bytes=_peak_bytes(),
        data=prepared.report,
    )


def spans(example: Example, template: Template) -> list[Span]:
    """Consecutive tokens that are all trained on, or all not, as text."""
    pairs = zip(example.tokens, example.trained, strict=True)
    return [
        Span(template.decode([token for token, _ in group]), trained)
        for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]


def marked(parts: Sequence[Span]) -> str:
    """Spans as one text, with what is trained on between ``[[`` and ``]]``."""
    return "".join(f"[[{span.text}]]" if span.trained else span.text for span in parts)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
