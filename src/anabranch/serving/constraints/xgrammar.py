"""xgrammar: a byte-level pushdown automaton with the masks of its states computed beforehand.

Slower to compile, fastest per token. It silently ignores what it does not know, and knows a keyword
only beside its ``type``: schemas are brought into :mod:`typed form <.typed_form>`, and what that
does not cover is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from anabranch.errors import (
    InvalidConstraint,
    MissingExtra,
    UnsatisfiableConstraint,
    UnsupportedConstraint,
)
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints import formats
from anabranch.serving.constraints.base import (
    CompiledConstraint,
    ConstraintBackend,
    Whitespace,
)
from anabranch.serving.constraints.ending import EndingState
from anabranch.serving.constraints.lark import has_schemas
from anabranch.serving.constraints.normal_form import FIELD, Refuse, SchemaRules, normal_form
from anabranch.serving.constraints.patterns import whole_text_pattern
from anabranch.serving.constraints.schemas import pattern_text, schema_text
from anabranch.serving.constraints.typed_form import conflict, typed_form
from anabranch.serving.constraints.vocabulary import Vocabulary

HONOURED = frozenset(
    {
        "$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum",
        "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maximum", "minItems",
        "minLength", "minimum", "pattern", "prefixItems", "properties", "required", "type",
    }
)  # fmt: skip


def check(schema: Mapping[str, Any], refuse: Refuse) -> None:
    """Combinations of keywords of which xgrammar drops one."""
    if found := conflict(schema):
        raise refuse(*found)
    formatted = schema.get("format") in formats.PATTERNS
    if "pattern" in schema or formatted:
        for limit in ("minLength", "maxLength"):
            if limit in schema:
                raise refuse(limit, "not beside a pattern or format")
    if "pattern" in schema and formatted:
        raise refuse("format", "not beside a pattern")


_WHITESPACE: dict[Whitespace, dict[str, Any]] = {
    "compact": {"any_whitespace": False, "separators": (",", ":")},
    "spaced": {"any_whitespace": False, "separators": (", ", ": ")},
    "flexible": {"any_whitespace": True, "max_whitespace_cnt": 40},
}


class XGrammar(ConstraintBackend):
    """The second choice: fewer keywords, other limits."""

    name = "xgrammar"
    rules = SchemaRules("xgrammar", HONOURED, check)

    def __init__(self, vocabulary: Vocabulary, whitespace: Whitespace = "spaced") -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise MissingExtra("xgrammar", "xgrammar") from error
        self._library = xgrammar
        self._vocabulary = vocabulary
        self._whitespace = whitespace
        tokens = xgrammar.TokenizerInfo(
            list(vocabulary.tokens),
            xgrammar.VocabType.RAW,
            vocab_size=len(vocabulary),
            stop_token_ids=list(vocabulary.end_tokens),
        )
        # One thread, no cache: the caller decides on both.
        self._compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_enabled=False)

    def compile(self, constraint: OutputConstraint) -> CompiledConstraint:
        """Compile, computing the masks of all states."""
        try:
            grammar = self._compile(constraint)
        except RuntimeError as error:  # all that the library raises
            raise _refusal(str(error), constraint) from error
        return _Compiled(self._library, grammar, self._vocabulary)

    def _compile(self, constraint: OutputConstraint) -> Any:
        if constraint.kind in ("json_object", "json_schema"):
            schema = typed_form(
                normal_form(schema_text(constraint), self.rules), whole_text_pattern
            )
            return self._compiler.compile_json_schema(
                json.dumps(schema, ensure_ascii=False),
                strict_mode=False,
                **_WHITESPACE[self._whitespace],
            )
        if constraint.kind == "grammar":
            if has_schemas(constraint.text):
                raise UnsupportedConstraint(
                    FIELD, "xgrammar passes over keywords of schemas inside of a grammar (%json)"
                )
            return self._compiler.compile_lark(constraint.text)
        return self._compiler.compile_regex(f"^(?:{pattern_text(constraint)})$")


class _Compiled(CompiledConstraint):
    def __init__(self, library: Any, grammar: Any, vocabulary: Vocabulary) -> None:
        self.memory = int(grammar.memory_size_bytes)
        self._library = library
        self._grammar = grammar
        self._vocabulary = vocabulary

    def start(self) -> _State:
        """A matcher before the first token."""
        return _State(self._library.GrammarMatcher(self._grammar), self._vocabulary)


class _State(EndingState):
    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._matcher = matcher

    def _fill_text(self, row: np.ndarray) -> None:
        row.fill(-1)  # a mask that allows everything is not written
        self._matcher.fill_next_token_bitmask(row[None])

    def _accept_text(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def _rollback_text(self, count: int) -> None:
        self._matcher.rollback(count)

    def _forced_bytes(self) -> bytes:
        try:
            text: str = self._matcher.find_jump_forward_string()
        except UnicodeDecodeError:
            return b""
        return text.encode()

    @property
    def _text_complete(self) -> bool:
        return bool(self._matcher.is_completed())


def _refusal(message: str, constraint: OutputConstraint) -> InvalidConstraint:
    line = next((part for part in message.split("\n") if part.strip()), "no reason given")
    line = line.rpartition(".cc:")[2] or line
    if "greater than" in line or "must not be empty" in line or "nsatisfiable" in line:
        return UnsatisfiableConstraint(FIELD, line)
    if constraint.kind == "grammar":
        return InvalidConstraint(FIELD, line)
    return UnsupportedConstraint(FIELD, f"xgrammar: {line}")
