"""Word problems with a worked solution and one right answer.

Parsers and scoring follow LLM-Adapters (EMNLP 2023) and its evaluation script.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from anabranch.training.conversation import PAIRS, opening, text_of
from anabranch.training.errors import DataError
from anabranch.training.task import Rendered, Row, Task

TOLERANCE = 0.001
"""Between a predicted and a right number (LLM-Adapters, evaluate.py)."""

_NUMBER = re.compile(r"-?\d+\.?\d*", re.ASCII)
_ANNOUNCED = re.compile(r"answer\s+is\s*:?\s*\(?([A-E])\b", re.ASCII | re.IGNORECASE)
_LETTER = re.compile(r"\b([A-E])\b", re.ASCII)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"\s*####\s*(.*)\s*\Z", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What an answer says, read both ways. ``number`` and ``letter`` are None if it has none."""

    number: float | None
    letter: str | None


class Arithmetic(Task):
    """GSM8K, SVAMP, AQuA, MAWPS and their like: the rationale is learned, the result is judged.

    A row has a question and a rationale. The result is its ``answer`` column (LLM-Adapters' sets),
    or what stands after ``####`` (GSM8K, whose calculator marks are removed). With ``consistent``,
    rows whose rationale ends with another result are refused: a quarter of the machine-written
    rationales of LLM-Adapters do.
    """

    name: ClassVar[str] = "arithmetic"
    schema = PAIRS

    def __init__(self, consistent: bool = False) -> None:
        self._consistent = consistent

    def render(self, row: Row) -> tuple[Rendered, ...]:
        """The question, and the rationale that ends with the result in one wording."""
        shape = self.shape_of(row)
        rationale = _CALCULATOR.sub("", text_of(row, shape[1]))
        rationale = _FINAL.sub(lambda match: f"\nThe answer is {match[1].strip()}.", rationale)
        if self._consistent and not self.correct(self.parse(rationale), self.reference(row)):
            raise DataError(f"the rationale does not end with the result {self.reference(row)}")
        answer = {"role": "assistant", "content": rationale.strip()}
        return (Rendered((*opening(row, shape[0]), answer)),)

    def reference(self, row: Row) -> float | str:
        """The right number, or the right letter."""
        shape = self.shape_of(row)
        result = text_of(row, "answer" if "answer" in row else shape[1])
        if final := _FINAL.search(result):
            result = final[1].strip()
        if re.fullmatch(r"\(?[A-E]\)?", result):
            return result.strip("()")
        number = last_number(result)
        if number is None:
            raise DataError(
                f"the right answer {result!r:.80} is neither a number nor one of A to E"
            )
        return number

    def parse(self, text: str) -> Answer:
        """The last number, and the letter that the answer settles on."""
        return Answer(last_number(text), chosen_letter(text))

    def correct(self, prediction: Any, reference: Any) -> bool:
        """Numbers may differ by 0.001; no number, or no letter, is wrong."""
        if isinstance(reference, str):
            return bool(prediction.letter == reference)
        return prediction.number is not None and abs(prediction.number - reference) <= TOLERANCE


def last_number(text: str) -> float | None:
    """The last number in a text, commas removed; None without one."""
    found = _NUMBER.findall(text.replace(",", ""))
    number = float(found[-1]) if found else None
    return number if number is not None and math.isfinite(number) else None


def chosen_letter(text: str) -> str | None:
    """The letter after "answer is", else the first of A to E that stands alone.

    The published script takes the first such character anywhere, which reads "Because" as B.
    """
    if announced := _ANNOUNCED.findall(text):
        return str(announced[-1]).upper()
    alone = _LETTER.search(text)
    return alone[1] if alone else None
