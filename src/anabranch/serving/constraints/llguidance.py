"""llguidance: an Earley parser over derivatives of regular expressions, walked along a token trie.

Compiles in about a millisecond, because most of the automaton is built when an answer gets there,
and refuses by itself nearly everything that it does not honour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from anabranch.errors import (
    ConstraintTooComplex,
    InvalidConstraint,
    MissingExtra,
    RequestFailed,
    UnsatisfiableConstraint,
    UnsupportedConstraint,
)
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints.base import (
    CompiledConstraint,
    ConstraintBackend,
    Whitespace,
)
from anabranch.serving.constraints.ending import EndingState
from anabranch.serving.constraints.lark import with_normal_schemas
from anabranch.serving.constraints.normal_form import (
    FIELD,
    Refuse,
    SchemaRules,
    UnsupportedKeyword,
    normal_form,
)
from anabranch.serving.constraints.schemas import pattern_text, schema_text
from anabranch.serving.constraints.vocabulary import Vocabulary

HONOURED = frozenset(
    {
        "$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum",
        "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum",
        "minItems", "minLength", "minProperties", "minimum", "multipleOf", "oneOf", "pattern",
        "patternProperties", "prefixItems", "properties", "required", "type",
    }
)  # fmt: skip


def check(schema: Mapping[str, Any], refuse: Refuse) -> None:
    """Free names may repeat: only one beyond those that are required is sure to be another."""
    least, required = schema.get("minProperties", 0), len(schema.get("required", ()))
    if least > required + 1:
        raise refuse("minProperties", f"{least - required} free names could be the same one")


_WHITESPACE: dict[Whitespace, dict[str, Any]] = {
    "compact": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"},
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    # Bounded: a small model would write spaces until its answer is full.
    "flexible": {"whitespace_flexible": True, "whitespace_pattern": r"\n?[ \t]{0,40}"},
}
_EVERY_SPELLING = '%llguidance {"no_forcing": true}\n'
"""Where only one text can follow, the mask still allows every way to cut it into tokens: the model
decides. Otherwise it would allow only the tokenizer's own."""
_STRICT = {"lenient": False, "coerce_one_of": False}
_KEYWORD_OF = {
    "oneOf": "oneOf",
    "Properties": "minProperties",
    "patternProperty": "patternProperties",
    "circular": "$ref",
    "float range": "minimum",
    "multipleOf": "multipleOf",
    "regex": "pattern",
}
"""What a message speaks of."""
_BYTES_PER_COMPILED = 64 * 1024
"""What the parser and the lazily built automaton of a constraint take, about; a schema adds to it
in proportion to its text."""


class LLGuidance(ConstraintBackend):
    """Fast to compile and exact: the first choice."""

    name = "llguidance"
    rules = SchemaRules("llguidance", HONOURED, check)

    def __init__(self, vocabulary: Vocabulary, whitespace: Whitespace = "spaced") -> None:
        try:
            import llguidance
        except ImportError as error:  # pragma: no cover - the default installation has it
            raise MissingExtra("llguidance", "constraints") from error
        self._library = llguidance
        self._vocabulary = vocabulary
        self._whitespace = whitespace
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Spelling(vocabulary)),
            n_vocab=len(vocabulary),
            eos_token=list(vocabulary.end_tokens),
        )

    def compile(self, constraint: OutputConstraint) -> CompiledConstraint:
        """Compile, checking that the parser has a first token to offer."""
        matcher = self._library.LLMatcher(self._tokenizer, self._grammar(constraint), log_level=0)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), constraint)
        memory = _BYTES_PER_COMPILED + 64 * len(constraint.text)
        return _Compiled(matcher, self._vocabulary, memory)

    def _grammar(self, constraint: OutputConstraint) -> str:
        """The constraint in the library's own variant of Lark's notation."""
        if constraint.kind == "grammar":
            options = _WHITESPACE[self._whitespace] | _STRICT
            source = with_normal_schemas(constraint.text, self.rules, options)
            # A grammar that sets options of its own keeps them.
            return self._lark(source if "%llguidance" in source else f"{source}\n{_EVERY_SPELLING}")
        if constraint.kind in ("json_object", "json_schema"):
            schema = normal_form(schema_text(constraint), self.rules)
            options = {"x-guidance": _WHITESPACE[self._whitespace] | _STRICT}
            whole = {**options, **schema} if isinstance(schema, dict) else options
            start = f"%json {json.dumps(whole, ensure_ascii=False)}"
        else:
            start = f"/{pattern_text(constraint)}/"
        return self._lark(f"start: {start}\n{_EVERY_SPELLING}")

    def _lark(self, source: str) -> str:
        grammar: str = self._library.LLMatcher.grammar_from_lark(source)
        return grammar


class _Spelling:
    """The vocabulary as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.eos_token_id = vocabulary.end_tokens[0]
        self.special_token_ids = [i for i, token in enumerate(vocabulary.tokens) if not token]
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        return self._vocabulary.encode(text.decode() if isinstance(text, bytes) else text)


class _Compiled(CompiledConstraint):
    def __init__(self, matcher: Any, vocabulary: Vocabulary, memory: int) -> None:
        self.memory = memory
        self._matcher = matcher
        self._vocabulary = vocabulary

    def start(self) -> _State:
        """A copy of the parser before the first token."""
        return _State(self._matcher.deep_copy(), self._vocabulary)


class _State(EndingState):
    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._matcher = matcher

    def _fill_text(self, row: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._require_alive()

    def _accept_text(self, token: int) -> bool:
        # The plain method would leave the parser in an error that it never leaves.
        accepted: bool = self._matcher.try_consume_tokens([token]) == 1
        self._require_alive()
        return accepted

    def _rollback_text(self, count: int) -> None:
        self._matcher.rollback(count)
        self._require_alive()

    def _forced_bytes(self) -> bytes:
        data: bytes = self._matcher.compute_ff_bytes()
        continues = bool(data) and data[0] & 0xC0 == 0x80
        return b"" if continues else data

    @property
    def _text_complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def _require_alive(self) -> None:
        if self._matcher.is_error():
            raise RequestFailed(f"llguidance gave up: {_first_line(self._matcher.get_error())}")


def _refusal(message: str, constraint: OutputConstraint) -> InvalidConstraint:
    """The library's message as one of ours."""
    line = _first_line(message)
    if "nsatisfiable" in line:
        return UnsatisfiableConstraint(FIELD, line)
    if re.search("too (large|complex|many|big)|limit|fuel|level exceeded", message):
        return ConstraintTooComplex(FIELD, line)
    if constraint.kind == "grammar":
        return InvalidConstraint(FIELD, message.strip())
    for sign, keyword in _KEYWORD_OF.items():
        if sign in message:
            return UnsupportedKeyword("#", keyword, "llguidance", line)
    return UnsupportedConstraint(FIELD, line)


def _first_line(message: str) -> str:
    return (message.strip() or "no reason given").splitlines()[0]
