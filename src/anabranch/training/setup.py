"""Stages 2 and 3 of a recipe: the base with its adapter, and rows as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch import adapters, models
from anabranch.models.loading import LoadedModel
from anabranch.models.progress import Progress, silent
from anabranch.models.quiet import quiet
from anabranch.training.checks import ALL_WEIGHTS, half_fine_tuning
from anabranch.training.data import Prepared, PreparedRow
from anabranch.training.errors import DataError
from anabranch.training.example import Item
from anabranch.training.forward import base_only
from anabranch.training.language import LanguageObjective
from anabranch.training.plugins import make_loss
from anabranch.training.randomness import seed_all
from anabranch.training.recipe import Evaluation, Recipe
from anabranch.training.scores import Scores, evaluate
from anabranch.training.template import Template
from anabranch.training.trainer import Trainer


@dataclass(frozen=True)
class HeldOut:
    """The rows of one evaluation and their tokens, one for one."""

    rows: list[PreparedRow]
    items: list[Item]
    left_out: int = 0


@dataclass
class Setup:
    """Everything that training and evaluation share: base with adapter, template, examples."""

    recipe: Recipe
    base: LoadedModel
    model: Any
    template: Template
    objective: LanguageObjective
    train: list[Item]
    valid: list[Item]
    held_out: dict[str, HeldOut]

    @classmethod
    def of(cls, recipe: Recipe, base: LoadedModel, prepared: Prepared) -> Setup:
        """Attach the adapter and tokenise. Raises before anything is trained or evaluated."""
        eos = base.generation.eos_token_id
        ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        template = Template(recipe.template, base.tokenizer, ends)
        context = base.card.context_length
        limit = min(recipe.train.max_length or context, context)
        options = recipe.train.model_copy(update={"max_length": limit})
        pad = base.tokenizer.pad_token_id
        objective = LanguageObjective.from_options(
            make_loss(recipe.loss), options, pad_id=int(pad) if pad is not None else 0
        )
        seed_all(recipe.seed)
        if recipe.adapter.method in ALL_WEIGHTS:
            model: Any = base.network.requires_grad_(True)
        else:
            model = adapters.build(recipe.adapter.method, base.network, **recipe.adapter.options)
        return cls(
            recipe,
            base,
            model,
            template,
            objective,
            items_of(prepared.train, template),
            items_of(prepared.valid, template),
            {
                evaluation.name: _held_out(evaluation, prepared, template, objective, recipe.seed)
                for evaluation in recipe.evaluate
            },
        )

    def trainer(self, output: Path | None, progress: Progress = silent) -> Trainer[Item]:
        """The trainer of this run; it has checked model, objective and items."""
        half = half_fine_tuning(self.recipe)
        return Trainer(
            self.model,
            self.objective,
            self.recipe.train,
            self.train,
            self.valid or None,
            output=output,
            progress=progress,
            hooks=[*half, *self.objective.criterion.hooks(self.train, self.valid)],
        )

    def evaluate(self, base: bool, progress: Progress = silent) -> dict[str, Scores]:
        """Scores of the model, or of its base with the adapter switched off."""
        adapted = self.recipe.adapter.method not in ALL_WEIGHTS
        with base_only(self.model) if base and adapted else nullcontext():
            return {
                evaluation.name: evaluate(
                    self.model,
                    self.base.tokenizer,
                    self.template,
                    self.held_out[evaluation.name].rows,
                    self.held_out[evaluation.name].items,
                    evaluation.generate,
                    self.recipe.train.micro_batch_tokens,
                    self.recipe.train.packing,
                    progress,
                )
                for evaluation in self.recipe.evaluate
            }

    def save(self, folder: Path) -> Path:
        """The trained weights: ``adapter/``, or ``model/`` if all weights were trained."""
        if self.recipe.adapter.method not in ALL_WEIGHTS:
            path = folder / "adapter"
            return path if path.exists() else adapters.save(self.model, path)
        path = folder / "model"
        if not path.exists():
            draft = folder / ".model.tmp"
            with quiet():
                self.model.save_pretrained(draft, safe_serialization=True)
                self.base.tokenizer.save_pretrained(draft)
            draft.rename(path)
        return path

    def samples(
        self, before: Mapping[str, Scores], after: Mapping[str, Scores], most: int = 3
    ) -> list[dict[str, str]]:
        """Questions with the base's and the tuned model's answers, for the report."""
        found = []
        for name, held_out in self.held_out.items():
            answers = zip(
                before[name].asked, before[name].answers, after[name].answers, strict=True
            )
            for index, old, new in list(answers)[:most]:
                text = held_out.rows[index].texts[0]
                found.append(
                    {"question": text.question, "wanted": text.answer, "base": old, "tuned": new}
                )
        return found

    def prompt_lengths(self) -> list[int]:
        """Tokens before the first that counts, of every training example."""
        return [example.trained.index(True) for item in self.train for example in item[:1]]


def load_base(recipe: Recipe, progress: Progress = silent) -> LoadedModel:
    """The base in single precision, on the GPU if there is one.

    Weights and optimiser stay in float32; the trainer multiplies in ``train.precision``.
    """
    name = models.DEFAULT if recipe.base == "default" else recipe.base
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return models.load(name, dtype="float32", device=device, progress=progress)


def items_of(rows: Sequence[PreparedRow], template: Template) -> list[Item]:
    """Token sequences of rows, one item each."""
    return [
        tuple(template.example(text, row.source, row.where) for text in row.texts) for row in rows
    ]


def _held_out(
    evaluation: Evaluation,
    prepared: Prepared,
    template: Template,
    objective: LanguageObjective,
    seed: int,
) -> HeldOut:
    """At most ``evaluation.rows`` rows chosen by the seed, under the trainer's length policy."""
    pool = [
        row
        for row in prepared.rows(evaluation.on)
        if evaluation.data is None or row.source in evaluation.data
    ]
    if not pool:
        raise DataError(
            f"evaluate: {evaluation.name} has no rows: no source has a share of {evaluation.on!r}; "
            f"give one in data.split, or evaluate: []"
        )
    chosen = np.random.default_rng(seed).permutation(len(pool))[: evaluation.rows]
    rows: list[PreparedRow] = []
    items: list[Item] = []
    left_out = 0
    for index in sorted(chosen.tolist()):
        pieces = objective.prepare(items_of([pool[index]], template)).items
        rows += [pool[index]] * len(pieces)
        items += pieces
        left_out += not pieces
    if not rows:
        raise DataError(
            f"evaluate: {evaluation.name}: all {left_out} rows are longer than train.max_length"
        )
    return HeldOut(rows, items, left_out)
