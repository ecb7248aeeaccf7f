"""Multiple choice by log-likelihood: the model prefers the choice that it finds most likely.

Nothing is generated. Of each choice the log-probabilities of its tokens are added, given the
question (Brown et al. 2020, section 2.4). The score counts the largest sum; ``normalised`` counts
the largest sum divided by the choice's bytes in UTF-8, which does not favour short choices and does
not hang on the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from anabranch.evaluation.benchmarks.base import Asked, Benchmark, Result, Subject, rows_of
from anabranch.models.progress import Progress, silent
from anabranch.training.errors import DataError, Diverged
from anabranch.training.example import Example, Item
from anabranch.training.scores import score_answers
from anabranch.training.task import Rendered, Row

ROWS_AT_A_TIME = 64
"""Between two reports of progress; forward passes are as large as the trainer's."""


@dataclass(frozen=True)
class Choices:
    """One question. ``answer`` is the right choice, counted from 0.

    ``blank`` marks a sentence with a gap ``_``: what follows the gap is scored, with each choice
    put in (the partial evaluation of Trinh and Le 2018).
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    where: str = ""
    blank: bool = False

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(choice.strip() for choice in self.choices):
            raise DataError(f"{self.where}: there must be two choices or more, none of them empty")
        if not 0 <= self.answer < len(self.choices):
            raise DataError(
                f"{self.where}: answer {self.answer} is no choice; there are {len(self.choices)}, "
                f"counted from 0"
            )
        if self.blank and (self.question.count("_") != 1 or not self.question.partition("_")[2]):
            raise DataError(f"{self.where}: the sentence needs one gap _ with text after it")

    def texts(self) -> list[tuple[str, str]]:
        """What is given and what is scored, for each choice."""
        if self.blank:
            before, _, after = self.question.partition("_")
            return [(before + choice, after) for choice in self.choices]
        space = "" if not self.question or self.question[-1].isspace() else " "
        return [(self.question, space + choice) for choice in self.choices]

    def sizes(self) -> np.ndarray:
        """Bytes of what is scored, without the space before it ``[choices]``."""
        return np.array([len(scored.strip().encode()) for _, scored in self.texts()])


class MultipleChoice(Benchmark[Choices]):
    """Choices by their likelihood, wherever the questions come from.

    With ``asked: template`` question and choice are turns of a conversation, as the recipe writes
    them, and an end token is scored, too.
    """

    def __init__(
        self,
        asked: Asked = "plain",
        limit: int | None = None,
        seed: int = 0,
        label: str | None = None,
    ) -> None:
        super().__init__(limit, seed, label)
        self.asked: Asked = asked

    def ask(
        self, subject: Subject, questions: Sequence[Choices], progress: Progress = silent
    ) -> Result:
        """Accuracies."""
        sums = log_likelihoods(subject, questions, self.asked, progress, self.label)
        truth = np.array([question.answer for question in questions])
        best = np.array([np.argmax(row) for row in sums])
        pairs = zip(sums, questions, strict=True)
        by_size = np.array([np.argmax(row / question.sizes()) for row, question in pairs])
        return Result(
            score=float((best == truth).mean()),
            rows=len(questions),
            chance=float(np.mean([1 / len(question.choices) for question in questions])),
            others={"normalised": float((by_size == truth).mean())},
        )


class ChoicesFile(MultipleChoice):
    """Rows of a file: ``prompt``, ``choices`` (a list) and ``answer`` (its number from 0, or text).

    ``path`` is a JSONL, CSV or Parquet file (``source``); in CSV, choices are a JSON list. The
    prompt is used as it is, and a choice follows after a space.
    """

    name: ClassVar[str] = "choices"

    def __init__(
        self,
        path: Path,
        source: Literal["jsonl", "csv", "parquet"] = "jsonl",
        asked: Asked = "plain",
        limit: int | None = None,
        seed: int = 0,
        label: str | None = None,
    ) -> None:
        super().__init__(asked, limit, seed, label or path.name.split(".")[0])
        self.path, self.source = path, source

    def read(self) -> Sequence[Choices]:
        """The rows of the file."""
        return [from_row(row.row, row.where) for row in rows_of(self.source, self.path)]


def log_likelihoods(
    subject: Subject,
    questions: Sequence[Choices],
    asked: Asked = "plain",
    progress: Progress = silent,
    label: str = "choices",
) -> list[np.ndarray]:
    """Sum of the log-probabilities of each choice's tokens ``[questions][choices]``, in nats.

    Choices are packed into forward passes as training packs rows. Raises :class:`DataError` for a
    question that is longer than the model's context, :class:`Diverged` for NaN.
    """
    items = [_item(subject, question, asked) for question in questions]
    found: list[np.ndarray] = [np.empty(0)] * len(items)
    order = sorted(range(len(items)), key=lambda index: sum(map(len, items[index])))
    for start in range(0, len(order), ROWS_AT_A_TIME):
        progress(f"{label}: {start} of {len(order)} questions", start / len(order))
        block = order[start : start + ROWS_AT_A_TIME]
        nll, _ = score_answers(
            subject.model,
            [items[index] for index in block],
            subject.micro_batch_tokens,
            subject.packing,
        )
        for index, row in zip(block, nll, strict=True):
            found[index] = -np.array(row)
            if np.isnan(found[index]).any():
                raise Diverged(f"{label}: a log-likelihood of {questions[index].where} is NaN")
    return found


def from_row(row: Row, where: str) -> Choices:
    """A row ``{prompt, choices, answer}``. Raises :class:`DataError` naming it."""
    if missing := [name for name in ("prompt", "choices", "answer") if name not in row]:
        raise DataError(
            f"{where} has no {' and no '.join(missing)}; a row has prompt, choices and answer; "
            f"this one has {', '.join(map(str, row)) or '(none)'}"
        )
    choices: Any = row["choices"]
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except ValueError:
            choices = None
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: choices must be a list of texts, not {row['choices']!r:.80}")
    answer: Any = row["answer"]
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    try:
        position = int(answer)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: the answer {answer!r:.80} is neither one of the choices nor a number"
        ) from None
    return Choices(str(row["prompt"]), tuple(choices), position, where)


def _item(subject: Subject, question: Choices, asked: Asked) -> Item:
    examples = []
    for choice, (given, scored) in zip(question.choices, question.texts(), strict=True):
        if asked == "template":
            turns = (
                {"role": "user", "content": question.question},
                {"role": "assistant", "content": choice},
            )
            example = subject.template.example(Rendered(turns), "", question.where)
        else:
            example = continuation(subject.tokenizer, given, scored, question.where)
        subject.require_room(len(example), question.where)
        examples.append(example)
    return tuple(examples)


def continuation(tokenizer: Any, given: str, scored: str, where: str = "") -> Example:
    """The tokens of ``given + scored``, of which those count that end in ``scored``.

    Begins as the tokenizer begins texts; with an end-of-text token if there is nothing before.
    """
    encoded = tokenizer(given + scored, return_offsets_mapping=True)
    tokens = list(encoded["input_ids"])
    marks = [end > len(given) for _, end in encoded["offset_mapping"]]
    if tokens and marks[0]:
        first = tokenizer.bos_token_id
        tokens.insert(0, int(tokenizer.eos_token_id if first is None else first))
        marks.insert(0, False)
    if not any(marks):
        raise DataError(f"{where}: {scored!r:.80} has no tokens")
    return Example(tokens, marks, "", where)
