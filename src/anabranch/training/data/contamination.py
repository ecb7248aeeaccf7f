"""Training rows that give away evaluation rows.

Runs of 13 words as in GPT-3 (Brown et al. 2020, appendix C), and equal questions whatever their
length, which is how LLM-Adapters found MAWPS to leak its test sets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from anabranch.training.data.minhash import normalise

BOILERPLATE = 10
"""A run of words in more training rows than this is the data set's wording (GPT-3 uses 10)."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A row as it is compared: all its words, and the question (or text) that it asks."""

    content: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Indices of training rows by how they overlap, and the runs that were wording."""

    ngram: list[int]
    question: list[int]
    boilerplate: int


def find_overlap(
    train: Sequence[Passage],
    held_out: Iterable[Passage],
    ngram: int = 13,
    digits: Literal["keep", "mask"] = "keep",
) -> Overlap:
    """Training rows that share a run of ``ngram`` words, or the whole question, with held-out rows.

    Linear in the words of both. A row that overlaps in both ways is listed under ``question``.
    """
    runs: set[int] = set()
    questions: set[str] = set()
    for passage in held_out:
        runs.update(_runs(words(passage.content, digits), ngram))
        questions.update(_key(question, digits) for question in passage.questions)
    questions.discard("")

    shared: list[set[int]] = []
    frequency: Counter[int] = Counter()
    for passage in train:
        found = runs.intersection(_runs(words(passage.content, digits), ngram))
        shared.append(found)
        frequency.update(found)
    wording = {run for run, count in frequency.items() if count > BOILERPLATE}
    same = [
        index
        for index, passage in enumerate(train)
        if any(_key(question, digits) in questions for question in passage.questions)
    ]
    known = set(same)
    overlapping = [i for i, found in enumerate(shared) if i not in known and found - wording]
    return Overlap(overlapping, same, len(wording))


def _key(question: str, digits: Literal["keep", "mask"]) -> str:
    return " ".join(words(question, digits))


def words(text: str, digits: Literal["keep", "mask"]) -> list[str]:
    """Lower-case words without punctuation; with ``mask`` every number is the same word."""
    plain = normalise(text)
    if digits == "mask":
        plain = re.sub(r"\d+(?:[.,]\d+)*", "0", plain)
    return re.findall(r"\w+", plain)


def _runs(sequence: Sequence[str], length: int) -> Iterable[int]:
    # Hashes of this process only: they never leave it, and 64 bits make a chance hit negligible.
    return (
        hash(tuple(sequence[start : start + length])) for start in range(len(sequence) - length + 1)
    )
