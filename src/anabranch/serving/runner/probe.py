"""A short prompt on which a runner proves that it computes what the model does.

It is longer than a page and computed in two pieces, over pages in reverse order, so that a wrong
position, page, mask or layout shows.
"""

from __future__ import annotations

from typing import Any

from anabranch.serving.batch import StepPlan
from anabranch.serving.sequence import Request, Segment, Sequence

FIRST_PIECE = 3


def probe_prompt(model: Any, page_size: int) -> list[int]:
    """Token ids, a page and five more."""
    return [(7 * i + 3) % model.config.vocab_size for i in range(page_size + 5)]


def probe_plans(prompt: list[int], page_size: int) -> list[StepPlan]:
    """The steps that compute the prompt; the last one wants logits."""
    pages = list(reversed(range(num_pages(prompt, page_size))))
    sequence = Sequence(Request("probe", prompt), 0, prompt, max_tokens=1, pages=pages)
    pieces = (0, FIRST_PIECE), (FIRST_PIECE, len(prompt))
    return [StepPlan((Segment(sequence, *piece),), page_size) for piece in pieces]


def num_pages(prompt: list[int], page_size: int) -> int:
    """Pages that the prompt takes."""
    return -(-len(prompt) // page_size)
