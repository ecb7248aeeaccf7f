"""Does a constraint cost or bring quality: the same tasks answered with and without one.

As in JSONSchemaBench (section 6): Last Letter and Shuffled Objects, which are made here, and GSM8K.
Every answer is an object with ``reasoning`` and ``answer``; what counts is the exact answer.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.errors import UnknownName
from anabranch.evaluation.structured_output.cases import data_folder
from anabranch.evaluation.structured_output.coverage import unfenced
from anabranch.evaluation.structured_output.generation import Generator, Task
from anabranch.models.constraint import OutputConstraint

_NAMES = ("Ada", "Boris", "Chloe", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas")
_OBJECTS = ("red ball", "blue ball", "green ball", "book", "hat", "key", "lamp", "pen")
_INSTRUCTIONS = (
    'Answer with a JSON object that has "reasoning", a sentence or two, and "answer".\n\n'
)


@dataclass(frozen=True)
class Question:
    """A task with its one right answer and the schema of ``answer``."""

    text: str
    right: str | int
    answer_schema: dict[str, Any]


@dataclass(frozen=True)
class QualityResult:
    """Exact matches of one task, with and without the constraint."""

    task: str
    questions: int
    constrained: int
    free: int
    free_readable: int
    """Free answers from which an answer could be read at all."""


def last_letter(count: int, seed: int = 0) -> list[Question]:
    """Concatenate the last letters of names (Wei et al. 2022)."""
    draw = random.Random(f"last letter/{seed}")
    questions = []
    for _ in range(count):
        names = draw.sample(_NAMES, draw.randint(2, 4))
        text = f'Take the last letters of the words in "{" ".join(names)}" and concatenate them.'
        right = "".join(name[-1] for name in names)
        questions.append(Question(text, right, {"type": "string", "pattern": "^[a-z]{1,8}$"}))
    return questions


def shuffled_objects(count: int, seed: int = 0) -> list[Question]:
    """Track three objects through swaps (Srivastava et al. 2022)."""
    draw = random.Random(f"shuffled objects/{seed}")
    questions = []
    for _ in range(count):
        people, things = draw.sample(_NAMES, 3), draw.sample(_OBJECTS, 3)
        holds = dict(zip(people, things, strict=True))
        story = [f"{person} has a {thing}." for person, thing in holds.items()]
        for _ in range(3):
            one, other = draw.sample(people, 2)
            holds[one], holds[other] = holds[other], holds[one]
            story.append(f"{one} and {other} swap what they have.")
        asked = draw.choice(people)
        text = f"{' '.join(story)} What does {asked} have at the end?"
        questions.append(Question(text, holds[asked], {"enum": things}))
    return questions


def gsm8k(count: int, seed: int = 0) -> list[Question]:
    """Grade-school word problems (Cobbe et al. 2021) from the data folder."""
    path = data_folder() / "gsm8k" / "test.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    questions = []
    for row in random.Random(f"gsm8k/{seed}").sample(rows, count):
        right = int(row["answer"].rpartition("####")[2].replace(",", ""))
        questions.append(Question(row["question"], right, {"type": "integer"}))
    return questions


TASKS = {"last-letter": last_letter, "shuffled-objects": shuffled_objects, "gsm8k": gsm8k}


def quality(
    task: str, count: int, generator: Generator, seed: int = 0, max_tokens: int = 160
) -> QualityResult:
    """Exact matches over ``count`` questions."""
    if task not in TASKS:
        raise UnknownName("task", task, TASKS)
    questions = TASKS[task](count, seed)
    constrained = generator.generate([_ask(q, max_tokens, True) for q in questions])
    free = generator.generate([_ask(q, max_tokens, False) for q in questions])
    read = [read_answer(answer.text) for answer in free]
    return QualityResult(
        task,
        count,
        constrained=_matches(questions, [read_answer(answer.text) for answer in constrained]),
        free=_matches(questions, read),
        free_readable=sum(answer is not None for answer in read),
    )


def answer_schema(question: Question) -> dict[str, Any]:
    """``{"reasoning": string, "answer": ...}``; the length leaves room for the answer."""
    return {
        "type": "object",
        "properties": {
            "reasoning": {"type": "string", "maxLength": 240},
            "answer": question.answer_schema,
        },
        "required": ["reasoning", "answer"],
        "additionalProperties": False,
    }


def read_answer(text: str) -> str | None:
    """The ``answer`` of an object, or what a text says its answer is; None if it says nothing."""
    try:
        value = json.loads(unfenced(text))
    except ValueError:
        found = re.findall(r'answer"?\s*(?:is|:)\s*"?([^".,}\n]+)', text, re.IGNORECASE)
        return found[-1].strip() if found else None
    return str(value["answer"]).strip() if isinstance(value, dict) and "answer" in value else None


def _ask(question: Question, max_tokens: int, constrained: bool) -> Task:
    schema = answer_schema(question)
    return Task(
        _INSTRUCTIONS + question.text,
        OutputConstraint.json_schema(schema) if constrained else None,
        max_tokens,
    )


def _matches(questions: Sequence[Question], answers: Sequence[str | None]) -> int:
    return sum(
        answer is not None and answer.lower() == str(question.right).lower()
        for question, answer in zip(questions, answers, strict=True)
    )
