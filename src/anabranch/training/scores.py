"""How good answers are on held-out rows: their likelihood, and what the model itself answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anabranch.models.progress import Progress, silent
from anabranch.training.example import Example, Item
from anabranch.training.forward import evaluating
from anabranch.training.language import LanguageObjective
from anabranch.training.losses.base import Loss, TokenScores
from anabranch.training.objective import LossOutput
from anabranch.training.packing import Packing
from anabranch.training.recipe import Generate
from anabranch.training.score_statistics import (
    difference_of_scores,
    difference_per_token,
    mcnemar,
    mean_per_token,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from anabranch.training.data import PreparedRow
    from anabranch.training.template import Template


@dataclass(frozen=True)
class Scores:
    """What one model does on the rows of one evaluation.

    ``nll[row][text]`` and ``tokens[row][text]`` are sums over the answer's tokens; a preference
    pair has two texts. ``answers`` are generated, for the rows ``asked``.
    """

    nll: list[list[float]]
    tokens: list[list[int]]
    asked: list[int]
    answers: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "nll": self.nll,
            "tokens": self.tokens,
            "asked": self.asked,
            "answers": self.answers,
        }


def score_answers(
    model: Any,
    items: Sequence[Item],
    micro_batch_tokens: int = 4096,
    packing: Packing = "bfd",
) -> tuple[list[list[float]], list[list[int]]]:
    """Sum of the NLL over each example's trained tokens, and their number: ``[items][examples]``.

    Runs through the trainer's own forward pass, so that it is the quantity that training lowers.
    """
    collector = _Collector(items)
    objective = LanguageObjective(
        collector,
        micro_batch_tokens=max(micro_batch_tokens, max((_size(item) for item in items), default=1)),
        packing=packing,
    )
    with evaluating(model), torch.no_grad():
        for batch in objective.plan(items):
            collector.rows = batch.layout.items
            objective.loss(model, batch, {})
    counts = [[example.targets for example in item] for item in items]
    return collector.totals, counts


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    end_tokens: Sequence[int],
    options: Generate,
    progress: Progress = silent,
) -> list[str]:
    """Greedy answers of at most ``max_tokens``, in the order of the prompts.

    Prompts of like length share a batch, padded on the left.
    """
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*end_tokens, 0)[0]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=options.max_tokens,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), options.batch):
            progress(f"answering {start} of {len(order)} questions", start / len(order))
            chosen = order[start : start + options.batch]
            width = max(len(prompts[index]) for index in chosen)
            ids = torch.full((len(chosen), width), int(pad))
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                length = len(prompts[index])
                ids[row, width - length :] = torch.tensor(list(prompts[index]))
                mask[row, width - length :] = 1
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for row, index in enumerate(chosen):
                text = tokenizer.decode(output[row, width:], skip_special_tokens=True)
                answers[index] = str(text)
    return answers


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[PreparedRow],
    items: Sequence[Item],
    generate: Generate | None = None,
    micro_batch_tokens: int = 4096,
    packing: Packing = "bfd",
    progress: Progress = silent,
) -> Scores:
    """Likelihoods of the rows' answers and, with ``generate``, the model's own answers.

    Only rows whose task can judge an answer are asked, the first ``generate.rows`` of them.
    """
    progress(f"likelihood of {len(items)} answers", None)
    nll, tokens = score_answers(model, items, micro_batch_tokens, packing)
    asked: list[int] = []
    answers: list[str] = []
    if generate is not None:
        judged = (i for i, row in enumerate(rows) if row.task.reference(row.row) is not None)
        asked = list(judged)[: generate.rows]
        prompts = [template.prompt(rows[index].texts[0].prompt) for index in asked]
        answers = generate_answers(
            model, tokenizer, prompts, template.end_tokens, generate, progress
        )
    return Scores(nll, tokens, asked, answers)


def compare(
    rows: Sequence[PreparedRow], base: Scores, tuned: Scores, seed: int = 0
) -> dict[str, Any]:
    """Figures of both models on the same rows, their differences, and how sure these are.

    ``nll`` is per token of the first text (for pairs: the chosen answer). Pairs add
    ``reward_accuracy``: the share whose chosen answer gained more likelihood over the base than the
    rejected one, half of them for an untrained model. Figures of tasks come from the answers.
    """
    tokens = np.array([row[0] for row in base.tokens], dtype=np.float64)
    before = np.array([row[0] for row in base.nll], dtype=np.float64)
    after = np.array([row[0] for row in tuned.nll], dtype=np.float64)
    figures: dict[str, Any] = {
        "nll": {
            "higher_is_better": False,
            "rows": len(rows),
            "base": mean_per_token(before, tokens, seed).to_dict(),
            "tuned": mean_per_token(after, tokens, seed).to_dict(),
            "difference": difference_per_token(after, before, tokens, seed).to_dict(),
        }
    }
    if margins := [_margin(b, t) for b, t in zip(base.nll, tuned.nll, strict=True) if len(b) == 2]:
        right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
        figures["reward_accuracy"] = {
            "higher_is_better": True,
            "rows": len(margins),
            "base": {"value": 0.5},
            "tuned": {"value": right / len(margins)},
            "difference": {"value": right / len(margins) - 0.5},
            "mean_margin": sum(margins) / len(margins),
        }
    sources = sorted({rows[index].source for index in base.asked})
    for source in sources:
        prefix = f"{source}." if len(sources) > 1 else ""
        for name, figure in _answer_figures(rows, base, tuned, source, seed).items():
            figures[prefix + name] = figure
    return figures


def _answer_figures(
    rows: Sequence[PreparedRow], base: Scores, tuned: Scores, source: str, seed: int
) -> dict[str, Any]:
    """The task's figures for the rows of one source."""
    places = [place for place, index in enumerate(base.asked) if rows[index].source == source]
    task = rows[base.asked[places[0]]].task
    references = [task.reference(rows[base.asked[place]].row) for place in places]
    parsed = {
        name: [task.parse(scores.answers[place]) for place in places]
        for name, scores in (("base", base), ("tuned", tuned))
    }

    def score(model: str, metric: str, chosen: Sequence[int]) -> float:
        predictions = parsed[model]
        return task.score([predictions[i] for i in chosen], [references[i] for i in chosen])[metric]

    everything = range(len(places))
    right = {
        name: [task.correct(p, r) for p, r in zip(predictions, references, strict=True)]
        for name, predictions in parsed.items()
    }
    figures: dict[str, Any] = {}
    for metric in task.score(parsed["base"], references):
        figures[metric] = {
            "higher_is_better": True,
            "rows": len(places),
            "base": {"value": score("base", metric, everything)},
            "tuned": {"value": score("tuned", metric, everything)},
            "difference": difference_of_scores(
                lambda chosen, metric=metric: score("tuned", metric, chosen),  # type: ignore[misc]
                lambda chosen, metric=metric: score("base", metric, chosen),  # type: ignore[misc]
                len(places),
                seed,
            ).to_dict(),
        }
    first = next(iter(figures), None)
    if first is not None:
        figures[first]["mcnemar_p"] = mcnemar(right["base"], right["tuned"])
    return figures


def regression(figure: Mapping[str, Any]) -> float:
    """By how much the tuned model is worse than the base; negative if it is better."""
    difference = float(figure["difference"]["value"])
    return -difference if figure["higher_is_better"] else difference


def _margin(base: Sequence[float], tuned: Sequence[float]) -> float:
    """Gain of the chosen answer over the base minus that of the rejected one, in nats."""
    return (base[0] - tuned[0]) - (base[1] - tuned[1])


def _size(item: Item) -> int:
    return sum(len(example) for example in item)


class _Collector(Loss):
    """Takes the scores and gives no loss: the objective's forward pass without training."""

    def __init__(self, items: Sequence[tuple[Example, ...]]) -> None:
        self.rows: Sequence[int] = ()
        self.totals = [[0.0] * len(item) for item in items]

    def denominators(self, items: Sequence[Item]) -> Mapping[str, float]:
        return {}

    def __call__(self, scores: TokenScores, denominators: Mapping[str, float]) -> LossOutput:
        values = scores.nll.double().cpu().numpy()
        for item, example, value in zip(
            scores.item.tolist(), scores.example.tolist(), values, strict=True
        ):
            self.totals[self.rows[item]][example] += float(value)
        return LossOutput(scores.nll.sum())
