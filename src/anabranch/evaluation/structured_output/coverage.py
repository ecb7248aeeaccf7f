"""Coverage with a model (JSONSchemaBench, section 4): declared, empirical, and compliance.

A schema is *declared* as covered if the back-end compiles it, and covered *empirically* if the
model's greedy answer then validates. The compliance rate is one over the other; answers that did
not end within their tokens are counted apart.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.evaluation.structured_output.cases import SchemaCase
from anabranch.evaluation.structured_output.generation import Answer, Generator, Task
from anabranch.evaluation.structured_output.judge import Judge, Undecided
from anabranch.models.constraint import OutputConstraint

PROMPT = """Write one JSON value that follows the JSON schema. Answer with the JSON only.

Schema: {{"type": "object", "properties": {{"city": {{"type": "string"}}, "population": {{"type": "integer"}}}}, "required": ["city", "population"]}}
Answer: {{"city": "Lyon", "population": 522250}}

Schema: {{"type": "array", "items": {{"enum": ["red", "green", "blue"]}}, "minItems": 2}}
Answer: ["green", "red"]

Schema: {schema}
Answer:"""  # noqa: E501


@dataclass(frozen=True)
class CoverageResult:
    """One schema, one way to answer. ``valid`` is None if it was refused or undecided."""

    name: str
    dataset: str
    constrained: bool
    declared: bool
    finished: bool
    valid: bool | None
    answer: Answer
    reason: str = ""


@dataclass(frozen=True)
class CoverageSummary:
    """Rates over a set of schemas; times are medians in seconds."""

    schemas: int
    declared: int
    finished: int
    valid: int
    compile_seconds: float
    first_token_seconds: float
    seconds_per_token: float

    @property
    def empirical(self) -> float:
        """Share of all schemas with a valid answer."""
        return self.valid / self.schemas if self.schemas else 0.0

    @property
    def compliance(self) -> float:
        """Share of the declared schemas' finished answers that are valid."""
        return self.valid / self.finished if self.finished else 0.0


def coverage(
    cases: Sequence[SchemaCase], generator: Generator, constrained: bool, max_tokens: int = 256
) -> list[CoverageResult]:
    """Ask for an instance of every schema."""
    tasks = [
        Task(
            PROMPT.format(schema=json.dumps(case.schema, ensure_ascii=False)),
            OutputConstraint.json_schema(case.schema) if constrained else None,
            max_tokens,
        )
        for case in cases
    ]
    answers = generator.generate(tasks)
    return [_result(case, answer, constrained) for case, answer in zip(cases, answers, strict=True)]


def summarise(results: Sequence[CoverageResult]) -> CoverageSummary:
    """Rates and medians."""
    declared = [result for result in results if result.declared]
    finished = [result for result in declared if result.finished]

    def median(values: list[float]) -> float:
        return statistics.median(values) if values else 0.0

    return CoverageSummary(
        schemas=len(results),
        declared=len(declared),
        finished=len(finished),
        valid=sum(result.valid is True for result in finished),
        compile_seconds=median([result.answer.compile_seconds for result in declared]),
        first_token_seconds=median([result.answer.first_token_seconds for result in declared]),
        seconds_per_token=median([result.answer.seconds_per_token for result in declared]),
    )


def _result(case: SchemaCase, answer: Answer, constrained: bool) -> CoverageResult:
    names = (case.name, case.dataset, constrained)
    if answer.refusal is not None:
        return CoverageResult(*names, False, False, None, answer, str(answer.refusal))
    finished = answer.finish_reason == "stop"
    text = answer.text if constrained else unfenced(answer.text)
    try:
        why = Judge(case.schema).error(text)
    except Undecided as error:
        return CoverageResult(*names, True, finished, None, answer, str(error))
    return CoverageResult(*names, True, finished, why is None, answer, why or "")


def unfenced(text: str) -> str:
    """What is inside a Markdown code block, where an unconstrained answer is one."""
    match = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    return match[1] if match else text
