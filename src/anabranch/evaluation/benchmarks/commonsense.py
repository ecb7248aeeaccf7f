"""Published multiple-choice sets, in the instruction form in which LLM-Adapters released them.

Its rows are an ``instruction`` with question, numbered choices and an answer format, and an
``answer`` such as answer2 (Hu et al. 2023). The numbering is taken apart here, so that a base model
can be asked: "Question: ...", "Answer:", and the choice's own words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from anabranch.evaluation.benchmarks.base import rows_of
from anabranch.evaluation.benchmarks.multiple_choice import Choices, MultipleChoice
from anabranch.training.errors import DataError
from anabranch.training.task import Row

_CHOICE = re.compile(r"\b(answer|solution|option)([1-9]):\s*", re.IGNORECASE)
_FORMAT = re.compile(r"\s*Answer format:.*\Z", re.DOTALL)
_OPENING = re.compile(r"\APlease (?:choose|answer)[^:]*:\s*")


class _Published(MultipleChoice):
    """A file of the built-in set ``reasoning-mcq``, which ANABRANCH_DATA has to hold."""

    file: ClassVar[str]

    def read(self) -> Sequence[Choices]:
        """All rows of the file."""
        rows = rows_of(f"builtin:reasoning-mcq/{self.file}")
        return [published(row.row, row.where) for row in rows]


class ArcEasy(_Published):
    """ARC, the easy questions: 2,376 of school science (Clark et al. 2018)."""

    name, file = "arc-easy", "arc_easy.test"


class ArcChallenge(_Published):
    """ARC, the 1,172 questions that retrieval and co-occurrence get wrong (Clark et al. 2018)."""

    name, file = "arc-challenge", "arc_challenge.test"


class OpenBookQA(_Published):
    """OpenBookQA: 500 questions on elementary facts, without the book (Mihaylov et al. 2018)."""

    name, file = "openbookqa", "openbookqa.test"


class BoolQ(_Published):
    """BoolQ: 3,270 yes/no questions, without the passage (Clark et al. 2019)."""

    name, file = "boolq", "boolq.test"


class Piqa(_Published):
    """PIQA: which of two ways reaches an everyday goal (Bisk et al. 2020)."""

    name, file = "piqa", "piqa.test"


class WinoGrande(_Published):
    """WinoGrande: who or what a gap in a sentence stands for (Sakaguchi et al. 2020)."""

    name, file = "winogrande", "winogrande.test"


def published(row: Row, where: str) -> Choices:
    """A row of LLM-Adapters' files. Raises :class:`DataError` naming it."""
    instruction, answer = row.get("instruction"), row.get("answer")
    if not isinstance(instruction, str) or not isinstance(answer, str):
        raise DataError(f"{where}: a row has an instruction and an answer, both texts")
    body = _FORMAT.sub("", instruction)
    if answer in ("true", "false"):
        asked = _OPENING.sub("", body).strip()
        return Choices(_question(asked), ("yes", "no"), int(answer == "false"), where)
    question, *parts = _CHOICE.split(body)
    kinds, numbers, texts = parts[::3], parts[1::3], [text.strip() for text in parts[2::3]]
    expected = [str(number) for number in range(1, len(texts) + 1)]
    named = [f"{kind.lower()}{number}" for kind, number in zip(kinds, numbers, strict=True)]
    if numbers != expected or answer not in named:
        raise DataError(
            f"{where}: the choices {', '.join(named) or '(none)'} are not numbered from 1, or "
            f"{answer!r} is none of them"
        )
    asked = _OPENING.sub("", question).strip()
    blank = kinds[0].lower() == "option"
    prompt = asked if blank else _question(asked)
    return Choices(prompt, tuple(texts), named.index(answer), where, blank)


def _question(text: str) -> str:
    return f"Question: {text}\nAnswer:"
