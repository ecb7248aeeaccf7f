"""Which tokens of a known solution contrast would have chosen, whatever the threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.evaluation.contrast.code_tasks import CodeTask
from anabranch.serving.contrast.lame_prompt import lame_prompt
from anabranch.serving.contrast.uncertainty import UncertaintyContrast, certainty


@dataclass(frozen=True)
class Tokens:
    """One entry a solution token: how sure the standard law was, and whose likeliest was right."""

    certainty: Tensor
    standard: Tensor
    contrast: Tensor

    def accuracy(self, threshold: float) -> float:
        """Share of right tokens if steps less certain than this are contrasted."""
        return float(
            torch.where(self.certainty < threshold, self.contrast, self.standard).float().mean()
        )

    def unsure(self, threshold: float) -> tuple[float, float, float]:
        """Share of uncertain steps, and the accuracy there without and with contrast."""
        at = self.certainty < threshold
        if not at.any():
            return 0.0, float("nan"), float("nan")
        right = (self.standard[at], self.contrast[at])
        return (float(at.float().mean()), *(float(r.float().mean()) for r in right))  # type: ignore[return-value]


def read_along(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[CodeTask],
    contrast: UncertaintyContrast,
    longest: int,
    each: Callable[[int], None] = lambda _: None,
) -> Tokens:
    """Feed the solutions' first ``longest`` tokens after prompt and lame prompt.

    Tasks without a removable example are an error of the caller's: choose others.
    """
    sure, standard, contrasted = [], [], []
    for number, task in enumerate(tasks):
        each(number)
        lame = lame_prompt(task.prompt)
        if lame is None:
            raise ValueError(f"{task.name} has no example that could be removed")
        solution = tokenizer(task.solution, add_special_tokens=False)["input_ids"][:longest]
        laws, others = (_laws(model, tokenizer, text, solution) for text in (task.prompt, lame))
        gold = torch.tensor(solution)
        sure.append(certainty(laws))
        standard.append(laws.argmax(dim=-1) == gold)
        contrasted.append(contrast.mix(laws, others).argmax(dim=-1) == gold)
    return Tokens(torch.cat(sure), torch.cat(standard), torch.cat(contrasted))


@torch.no_grad()
def _laws(model: Any, tokenizer: Any, text: str, solution: list[int]) -> Tensor:
    """Law before each token of the solution, ``[tokens, V]``."""
    prompt = tokenizer(text)["input_ids"]
    ids = torch.tensor([prompt + solution[:-1]])
    logits = model(ids, use_cache=False, logits_to_keep=len(solution)).logits[0]
    return logits.float().softmax(dim=-1)
