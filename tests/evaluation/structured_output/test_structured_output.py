"""The evaluation, on schemas and back-ends that are made to fail."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from anabranch.cli import app
from anabranch.errors import InvalidConstraint, UnknownName, UnsupportedConstraint
from anabranch.evaluation.structured_output import coverage, load, maskbench, quality, summarise
from anabranch.evaluation.structured_output.cases import Instance, SchemaCase, generated
from anabranch.evaluation.structured_output.generation import Answer, Task
from anabranch.evaluation.structured_output.isolation import run_isolated
from anabranch.evaluation.structured_output.judge import Judge, Undecided
from anabranch.evaluation.structured_output.maskbench import run_case
from anabranch.evaluation.structured_output.quality import (
    answer_schema,
    last_letter,
    read_answer,
    shuffled_objects,
)
from anabranch.evaluation.structured_output.report import Report
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints import CompiledConstraint, ConstraintBackend
from anabranch.serving.constraints.llguidance import LLGuidance
from tests.serving.constraints.tiny_tokenizers import ROWS, byte_level, compiler, end_of

INTEGER = SchemaCase(
    "integer", "t", "t", {"type": "integer"}, (Instance(1, True), Instance("x", False))
)
DATA = pytest.mark.skipif("ANABRANCH_DATA" not in os.environ, reason="ANABRANCH_DATA is not set")


def tiny() -> tuple[Any, int, tuple[int, ...]]:
    """The tiny tokenizer, in whichever process asks."""
    tokenizer = byte_level()
    return tokenizer, ROWS, (end_of(tokenizer),)


class Faulty(ConstraintBackend):
    """Hangs, dies or lets everything through, as the schema's title says."""

    def __init__(self, *arguments: Any) -> None:
        self._honest = LLGuidance(*arguments)

    def compile(self, constraint: OutputConstraint) -> CompiledConstraint:
        title = json.loads(constraint.text or "{}").get("title")
        if title == "hang":
            time.sleep(60)
        if title == "die":
            os._exit(11)
        if title == "raise":
            raise RuntimeError("a defect")
        return self._honest.compile(
            constraint if title is None else OutputConstraint.json_schema(True)
        )


def faulty() -> tuple[Any, int, tuple[int, ...]]:
    """Called in the new process: there the back-end becomes a plug-in."""
    Faulty.name = "faulty"
    return tiny()


def case(title: str) -> SchemaCase:
    return replace(INTEGER, name=title, schema={"title": title, **INTEGER.schema})  # type: ignore[dict-item]


@pytest.mark.slow
def test_failures_of_every_class_take_nothing_else_down() -> None:
    cases = [INTEGER, case("raise"), case("die"), INTEGER, case("hang"), case("anything"), INTEGER]
    cases[1:1] = [replace(INTEGER, name="refused", schema={"not": {}})]
    found = list(run_isolated(cases, "faulty", faulty, timeout=4.0))
    assert [result.outcome for result in found] == [
        "passed", "refused", "crash", "crash", "passed", "timeout", "under-constrained", "passed",
    ]  # fmt: skip
    assert [result.name for result in found] == [each.name for each in cases]
    assert found[1].keyword == "not"
    assert "a defect" in found[2].reason and "status 11" in found[3].reason
    assert "invalid, but accepted" in found[6].reason or "drawn, but" in found[6].reason


def test_over_constrained_schemas_are_told_from_passing_ones() -> None:
    ordered = SchemaCase(
        "ordered", "t", "t",
        {"properties": {"a": {}, "b": {}}, "type": "object"},
        (Instance({"b": 1, "a": 1}, True), Instance([], False)),
    )  # fmt: skip
    result = run_case(ordered, compiler("llguidance"), "llguidance")
    assert result.outcome == "over-constrained" and "valid, but rejected" in result.reason


def test_labels_that_the_validator_contradicts_do_not_count() -> None:
    wrong = replace(INTEGER, instances=(Instance("x", True), Instance(2, True)))
    result = run_case(wrong, compiler("llguidance"), "llguidance")
    assert (result.outcome, result.disputed, result.instances) == ("passed", 1, 2)


def test_back_ends_pass_generated_schemas() -> None:
    report = maskbench(generated(8, seed=5), ["llguidance"], tokenizer=tiny)
    (summary,) = report.summaries()
    assert summary.sound and summary.accepted == summary.schemas == 8
    assert summary.outcomes["passed"] == 8 and summary.drawn > 4
    assert summary.mask_seconds["p50"] <= summary.mask_seconds["p99.9"]
    assert json.loads(json.dumps(report.to_dict()))["summaries"][0]["declared"] == 1.0
    assert report.markdown().count("\n") == 3
    assert len(report.common().results) == 8


def test_an_empty_report_is_a_table_without_rows() -> None:
    assert Report(()).summaries() == []
    assert Report(()).markdown().count("\n") == 2


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"multipleOf": 0.01}, ["1131.12", "0"], ["1131.125"]),
        ({"type": "integer"}, ["1.0", "12345678901234567890"], ["1.5", "true"]),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer"}, ["1"], ["1.0"]),
        ({"format": "date"}, ['"2024-02-29"', "7"], ['"2023-02-29"']),
        ({}, ["[]"], ["NaN", "", "[1,]"]),
        ({"minimum": 0.1}, ["0.1"], ["0.09999999999999999999"]),
    ],
)
def test_the_judge(schema: Any, valid: list[str], invalid: list[str]) -> None:
    judge = Judge(schema)
    for text in valid:
        assert judge.error(text) is None, text
    for text in invalid:
        assert judge.error(text) is not None, text


def test_the_judge_says_when_it_cannot_decide() -> None:
    with pytest.raises(Undecided, match="not Python's"):
        Judge({"pattern": r"\cA"}).error('"x"')


class Canned:
    """Answers in turn."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts
        self.asked: list[Task] = []

    def generate(self, tasks: Sequence[Task]) -> list[Answer]:
        self.asked += tasks
        refusal = UnsupportedConstraint("response_format", "no")
        return [
            Answer(refusal=refusal)
            if text == "refused"
            else Answer(text, "length" if text == "endless" else "stop", 3, 0.1, 0.2, 0.6)
            for text, _ in zip(self._texts, tasks, strict=True)
        ]


def test_coverage_counts_declared_finished_and_valid() -> None:
    generator = Canned("1", "refused", "endless", '"x"')
    results = coverage([INTEGER] * 4, generator, constrained=True)
    summary = summarise(results)
    assert (summary.schemas, summary.declared, summary.finished, summary.valid) == (4, 3, 2, 1)
    assert (summary.empirical, summary.compliance) == (0.25, 0.5)
    assert summary.seconds_per_token == pytest.approx(0.2)
    assert all(task.constraint for task in generator.asked)
    assert '"integer"' in generator.asked[0].prompt


def test_free_answers_may_be_fenced_and_nothing_is_asked_of_no_schema() -> None:
    (result,) = coverage([INTEGER], Canned("Sure:\n```json\n7\n```"), constrained=False)
    assert result.valid and result.declared
    assert summarise([]).compliance == 0.0


def test_quality_compares_exact_answers() -> None:
    questions = last_letter(2, seed=1)
    right = json.dumps({"reasoning": "", "answer": questions[0].right})

    class Both(Canned):
        def generate(self, tasks: Sequence[Task]) -> list[Answer]:
            texts = [right, "endless"] if tasks[0].constraint else ["The answer is nothing.", "?"]
            return [Answer(text, "stop") for text in texts]

    found = quality("last-letter", 2, Both(), seed=1)
    assert (found.constrained, found.free, found.free_readable) == (1, 0, 1)
    with pytest.raises(UnknownName, match="last-letter"):
        quality("last-leter", 2, Both())


@pytest.mark.parametrize("make", [last_letter, shuffled_objects])
def test_generated_questions_have_answers_that_their_schema_allows(make: Any) -> None:
    for question in make(20, seed=2):
        text = json.dumps({"reasoning": "because", "answer": question.right})
        assert Judge(answer_schema(question)).error(text) is None
    assert make(3, seed=2) == make(3, seed=2) != make(3, seed=3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"reasoning": "", "answer": 7}', "7"),
        ("So the answer is 42.", "42"),
        ('{"answer": "ab", "reaso', "ab"),
        ("[]", None),
        ("", None),
    ],
)
def test_reading_answers(text: str, answer: str | None) -> None:
    assert read_answer(text) == answer


def test_unknown_data_sets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    with pytest.raises(UnknownName, match="generated"):
        load(["glaive"])
    assert len(load(limit=3)) == 3


@DATA
def test_the_data_sets_are_there() -> None:
    assert len(load(["glaive", "draft7"], limit=5)) == 10
    assert len(load()) > 8000


@DATA
def test_the_official_suite_is_never_under_constrained() -> None:
    cases = [case for case in load(["draft2020-12"]) if not case.category.startswith("optional")]
    sample = cases[::4]
    for result in (run_case(case, compiler("llguidance"), "llguidance") for case in sample):
        assert result.outcome in ("passed", "refused", "over-constrained"), result


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anabranch.evaluation.structured_output.benchmark.default_tokenizer", tiny)
    monkeypatch.setitem(maskbench.__kwdefaults__, "tokenizer", tiny)
    arguments = ["structured", "masks", "--dataset", "generated", "--limit", "3"]
    done = CliRunner().invoke(app, [*arguments, "--backend", "llguidance", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["summaries"][0]["schemas"] == 3
    refused = CliRunner().invoke(app, [*arguments, "--by", "x"])
    assert refused.exit_code == 2


def test_constraints_are_refused_before_the_engine_sees_them() -> None:
    with pytest.raises(InvalidConstraint):
        compiler("llguidance").compile(OutputConstraint("json_schema", "["))
