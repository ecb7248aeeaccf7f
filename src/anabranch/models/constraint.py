"""What an answer must look like, whoever enforces it: a schema, a pattern, a grammar, a list."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ConstraintKind = Literal["json_object", "json_schema", "regex", "grammar", "choice"]
"""``grammar`` is EBNF in Lark's notation; ``choice`` a JSON list of strings."""


@dataclass(frozen=True)
class OutputConstraint:
    """A language that the answer is from. Hashable: equal ones are compiled once.

    Use the constructors below; ``text`` is the canonical JSON of a schema or list of choices, or
    the source of a pattern or grammar. Whether a back-end can honour it shows when it is compiled.
    """

    kind: ConstraintKind
    text: str = ""

    @classmethod
    def json_object(cls) -> OutputConstraint:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> OutputConstraint:
        """JSON that validates against a schema (Draft 2020-12). The order of keys is kept."""
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def regex(cls, pattern: str) -> OutputConstraint:
        """Text that a pattern matches from beginning to end."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, source: str) -> OutputConstraint:
        """Text of a grammar in Lark's EBNF whose first rule is ``start``."""
        return cls("grammar", source)

    @classmethod
    def choice(cls, options: list[str]) -> OutputConstraint:
        """One of several strings."""
        return cls("choice", json.dumps(options, ensure_ascii=False))
