"""GSM8K: word problems, answered by a chain of thought that ends with ``#### number``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

import numpy as np

from anabranch.errors import ConfigurationError
from anabranch.evaluation.benchmarks.base import Asked, Benchmark, Result, Subject, answers, rows_of
from anabranch.models.progress import Progress, silent
from anabranch.training.data.sources import SourceRow
from anabranch.training.errors import DataError

_STATED = re.compile(r"####\s*\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+)", re.ASCII)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_NEXT = re.compile(r"\n\s*Question:")


@dataclass(frozen=True)
class Problem:
    """A problem and its worked answer, without calculator marks."""

    question: str
    worked: str
    number: Decimal
    where: str = ""


class GSM8K(Benchmark[Problem]):
    """GSM8K's 1,319 test problems by chain of thought (Cobbe et al. 2021; Wei et al. 2022).

    ``shots`` worked problems of the training set, drawn by ``seed`` and the same for all, stand
    before each. Decoding is greedy with at most ``max_tokens``. Right is exactly the number after
    the first ``####``; an answer that states none, or is cut off before it, is wrong. ``stated`` is
    the share that states one. Problems are turns of a conversation in the recipe's template, or,
    with ``asked: plain``, running text "Question: ... Answer: ..." for models that know no other.
    """

    name: ClassVar[str] = "gsm8k"

    def __init__(
        self,
        shots: int = 8,
        max_tokens: int = 256,
        batch: int = 8,
        asked: Asked = "template",
        limit: int | None = None,
        seed: int = 0,
        label: str | None = None,
    ) -> None:
        super().__init__(limit, seed, label)
        if shots < 0 or max_tokens < 1 or batch < 1:
            raise ConfigurationError(
                f"shots is at least 0, max_tokens and batch at least 1; not {shots}, {max_tokens} "
                f"and {batch}"
            )
        self.shots, self.max_tokens, self.batch = shots, max_tokens, batch
        self.asked: Asked = asked

    def read(self) -> Sequence[Problem]:
        """The test problems."""
        return [_problem(row) for row in rows_of("builtin:gsm8k/test")]

    def examples(self) -> list[Problem]:
        """The worked problems that are shown."""
        if not self.shots:
            return []
        rows = rows_of("builtin:gsm8k/train")
        if len(rows) < self.shots:
            raise DataError(f"{self.shots} shots, but gsm8k/train has {len(rows)} problems")
        chosen = np.random.default_rng(self.seed).choice(len(rows), self.shots, replace=False)
        return [_problem(rows[index]) for index in chosen.tolist()]

    def ask(
        self, subject: Subject, questions: Sequence[Problem], progress: Progress = silent
    ) -> Result:
        """The share of right numbers."""
        shown = self.examples()
        prompts = [self._prompt(subject, shown, problem) for problem in questions]
        written = answers(subject, prompts, self.max_tokens, self.batch, self.label, progress)
        numbers = [stated(_NEXT.split(answer)[0]) for answer in written]
        right = [n == problem.number for n, problem in zip(numbers, questions, strict=True)]
        share = sum(number is not None for number in numbers) / len(numbers)
        return Result(sum(right) / len(right), len(right), 0.0, {"stated": share})

    def _prompt(self, subject: Subject, shown: Sequence[Problem], problem: Problem) -> list[int]:
        if self.asked == "template":
            turns = [
                {"role": role, "content": text}
                for example in shown
                for role, text in (("user", example.question), ("assistant", example.worked))
            ]
            tokens = subject.template.prompt(
                [*turns, {"role": "user", "content": problem.question}]
            )
        else:
            before = "".join(f"Question: {e.question}\nAnswer: {e.worked}\n\n" for e in shown)
            text = f"{before}Question: {problem.question}\nAnswer:"
            tokens = list(subject.tokenizer(text)["input_ids"])
        subject.require_room(len(tokens) + self.max_tokens, problem.where)
        return tokens


def stated(text: str) -> Decimal | None:
    """The number after the first ``####``, without commas and dollars; None if there is none."""
    found = _STATED.search(text)
    return None if found is None else Decimal(found[1].replace(",", ""))


def _problem(row: SourceRow) -> Problem:
    question, worked = row.row.get("question"), row.row.get("answer")
    if not isinstance(question, str) or not isinstance(worked, str):
        raise DataError(f"{row.where}: a problem has a question and an answer, both texts")
    number = stated(worked)
    if number is None:
        raise DataError(f"{row.where}: the answer states no number after ####")
    return Problem(question, _CALCULATOR.sub("", worked), number, row.where)
