"""Greedy programs with and without contrast, by transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.evaluation.contrast.idiom_tasks import PLACES, IdiomTask
from anabranch.serving.contrast.processor import ContrastProcessor
from anabranch.serving.contrast.uncertainty import UncertaintyContrast, certainty

PAD = 0


@dataclass(frozen=True)
class Decoded:
    """Programs in the order of the tasks.

    ``certainty [tasks, places]`` is that of the standard law at each step. ``contrasted`` is the
    share of steps that were mixed, ``forwards`` the companions' forward passes a step.
    """

    programs: tuple[str, ...]
    certainty: Tensor
    contrasted: float = 0.0
    forwards: float = 0.0

    def exact_match(self, tasks: Sequence[IdiomTask]) -> float:
        """Share of programs that are right as a whole."""
        right = [p == task.program for p, task in zip(self.programs, tasks, strict=True)]
        return sum(right) / len(right)

    def wrong(self, tasks: Sequence[IdiomTask]) -> Tensor:
        """Bool ``[tasks, places]``: which signs are wrong."""
        return torch.tensor(
            [
                [said != sign for said, sign in zip(program, task.program, strict=True)]
                for program, task in zip(self.programs, tasks, strict=True)
            ]
        )


@torch.no_grad()
def decode(
    model: Any,
    tasks: Sequence[IdiomTask],
    contrast: UncertaintyContrast | None = None,
    lame: Sequence[IdiomTask] | None = None,
) -> Decoded:
    """The most likely program of each task, sign by sign.

    ``lame``: tasks whose descriptions are the lame prompts, if not the tasks' own.
    """
    prompts = [list(task.prompt()) for task in tasks]
    width = max(map(len, prompts))
    batch = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processor = None
    if contrast is not None:
        others = [list(task.prompt(examples=False)) for task in lame or tasks]
        processor = ContrastProcessor(model, contrast, prompts, others, max_new_tokens=PLACES)
    output = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=PLACES,
        do_sample=False,
        pad_token_id=PAD,
        logits_processor=[processor] if processor else [],
        output_logits=True,
        return_dict_in_generate=True,
    )
    programs = tuple(bytes(row).decode("latin-1") for row in output.sequences[:, width:].tolist())
    laws = [logits.float().softmax(dim=-1) for logits in output.logits]
    sure = torch.stack([certainty(law) for law in laws], dim=1)
    if processor is None:
        return Decoded(programs, sure)
    steps = processor.steps
    return Decoded(programs, sure, processor.contrasted / steps, processor.forwards / steps)
