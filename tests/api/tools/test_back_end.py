"""Grammars of calls through the compiler that a server uses: which schemas it honours."""

from __future__ import annotations

from typing import Any

import pytest

from anabranch.api.tools.grammar import calls_grammar
from anabranch.api.tools.plan import CallGuidance
from anabranch.api.tools.schemas import FunctionDefinition
from anabranch.errors import InvalidConstraint, UnsatisfiableConstraint, UnsupportedConstraint
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints import ConstraintCompiler
from tests import tiny

from .functions import CITY, call_text

END = 256

pytest.importorskip("llguidance", reason="llguidance is not installed")


@pytest.fixture(scope="module")
def compiler() -> ConstraintCompiler:
    """One token a byte, and an end token behind them."""
    return ConstraintCompiler(tiny.byte_tokenizer(), END + 1, (END,))


def accepts(compiler: ConstraintCompiler, grammar: str, text: str) -> bool:
    state = compiler.compile(OutputConstraint.grammar(grammar)).start()
    tokens = tiny.byte_tokenizer()(text)["input_ids"]
    return all(state.accept(token) for token in tokens) and state.accept(END)


def grammar(*schemas: dict[str, Any], **options: bool) -> str:
    pairs = [(f"f{i}", schema) for i, schema in enumerate(schemas)]
    return calls_grammar(pairs, **{"text": True, "several": True, **options})


def test_answers(compiler: ConstraintCompiler) -> None:
    both = grammar(CITY, {"type": "object"})
    for text in ("plain", f"so:\n{call_text('f0', {'city': 'é'})}\n{call_text('f1', {'a': []})}"):
        assert accepts(compiler, both, text)
    assert not accepts(compiler, both, call_text("f0", {"city": 1}))


def test_a_schema_means_the_same_as_alone(compiler: ConstraintCompiler) -> None:
    # Draft 7's name for $defs, a format, and alternatives that exclude each other.
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "day": {"$ref": "#/definitions/day"},
            "id": {"oneOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "required": ["day"],
        "additionalProperties": False,
        "definitions": {"day": {"type": "string", "format": "date"}},
    }
    source = grammar(schema)
    assert accepts(compiler, source, call_text("f0", {"day": "2024-02-28", "id": None}))
    assert not accepts(compiler, source, call_text("f0", {"day": "28.2.2024"}))


@pytest.mark.parametrize(
    ("schema", "error", "words"),
    [
        (
            {"properties": {"a": {"not": {"type": "null"}}}},
            UnsupportedConstraint,
            "#/properties/a/not",
        ),
        ({"properties": {"a": {"type": "strin"}}}, InvalidConstraint, "#/properties/a/type"),
        ({"properties": {"a": False}, "required": ["a"]}, UnsatisfiableConstraint, "arguments_1"),
    ],
)
def test_a_refusal_names_the_rule(
    compiler: ConstraintCompiler, schema: Any, error: type[InvalidConstraint], words: str
) -> None:
    source = grammar(CITY, {"type": "object", **schema})
    for _ in range(2):  # a second time, it may be remembered
        with pytest.raises(error, match=words) as refused:
            compiler.compile(OutputConstraint.grammar(source))
        assert refused.value.field == "arguments_1"
        assert str(refused.value).startswith("arguments_1: ")


@pytest.mark.parametrize("options", [{}, {"text": False}, {"text": False, "several": False}])
def test_no_other_back_end_passes_over_what_one_refuses(
    compiler: ConstraintCompiler, options: dict[str, bool]
) -> None:
    source = grammar({"type": "object", "not": {"required": ["a"]}}, **options)
    with pytest.raises(UnsupportedConstraint, match="'not'"):
        compiler.compile(OutputConstraint.grammar(source))


def test_what_is_left_when_it_does_not_honour_a_schema(compiler: ConstraintCompiler) -> None:
    """As the route does it, without the generation."""
    odd = {"type": "object", "not": {"required": ["a", "b"]}}
    functions = tuple(
        FunctionDefinition(name=f"f{i}", parameters=schema)
        for i, schema in enumerate([odd, CITY, odd])
    )
    asked: Any = CallGuidance.of(functions, text=True, several=True)
    refusals = 0
    while True:
        try:
            compiler.compile(asked.constraint)
            break
        except InvalidConstraint as error:
            asked, refusals = asked.after(error), refusals + 1
    assert (asked.loose, refusals) == ({0, 2}, 2)
    source = asked.constraint.text
    assert accepts(compiler, source, call_text("f2", {"a": 1, "b": 2}))
    assert not accepts(compiler, source, call_text("f1", {"a": 1, "b": 2}))


def test_percent_json_elsewhere_is_no_schema(compiler: ConstraintCompiler) -> None:
    source = r"""start: "%json {" body /%json \{/ // %json {not one}
body: %json {"type": "object", "properties": {"a\"}": {"type": "integer"}}, "required": ["a\"}"],
  "additionalProperties": false, "x-guidance": {"key_separator": "  :  "}} | "x"
"""
    assert accepts(compiler, source, '%json {{"a\\"}"  :  1}%json {')
    assert accepts(compiler, source, "%json {x%json {")
    assert not accepts(compiler, source, '%json {{"a\\"}": 1}%json {')
    with pytest.raises(InvalidConstraint):
        compiler.compile(OutputConstraint.grammar('start: %json {"type": '))
