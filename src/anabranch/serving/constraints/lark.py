"""Schemas inside of a grammar, held to the same rules as a schema that comes alone.

llguidance's notation has ``%json {...}``, a schema as a rule. It would be read with the library's
own reading of JSON Schema, which differs from the normal form's in what is silently passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from anabranch.errors import InvalidConstraint
from anabranch.serving.constraints.normal_form import SchemaRules, normal_form

_OPTIONS = "x-guidance"
_LARGE = 20_000
"""Characters of a schema whose normal form is not worth keeping."""

# Strings, comments and patterns may contain anything.
_SCHEMA = re.compile(
    r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<schema>%json\s*)', re.DOTALL
)
_RULE = re.compile(r"^[!?]*(\w+)(?:\[[^\]\n]*\])?(?:\.-?\d+)?\s*:", re.MULTILINE)


def with_normal_schemas(source: str, rules: SchemaRules, options: Mapping[str, Any]) -> str:
    """The grammar with every schema in normal form, and these options unless it has its own.

    Raises what :func:`normal_form` raises; the error's ``field`` is the name of the rule.
    """
    parts, at = [], 0
    while (match := _SCHEMA.search(source, at)) is not None:
        parts.append(source[at : match.end()])
        at = match.end()
        if match["schema"] is None:
            continue
        try:
            schema, at = json.JSONDecoder().raw_decode(source, at)
        except (ValueError, RecursionError):
            break  # the library says what is wrong with it
        normal = _in_rule(schema, rules, source[: match.start()])
        own = schema.get(_OPTIONS, {}) if isinstance(schema, dict) else {}
        parts.append(json.dumps({**normal, _OPTIONS: {**options, **own}}, ensure_ascii=False))
    return "".join([*parts, source[at:]])


def has_schemas(source: str) -> bool:
    """Whether there is a schema in the grammar."""
    return any(match["schema"] is not None for match in _SCHEMA.finditer(source))


def _in_rule(schema: Any, rules: SchemaRules, before: str) -> dict[str, Any]:
    if isinstance(schema, dict):
        schema = {key: value for key, value in schema.items() if key != _OPTIONS}
    text = json.dumps(schema, ensure_ascii=False)
    try:
        normal = _kept(text, rules) if len(text) <= _LARGE else normal_form(text, rules)
    except InvalidConstraint as error:
        names = _RULE.findall(before)
        if names:
            detail = str(error).removeprefix(f"{error.field}: ")
            error.field = names[-1]
            error.args = (f"{error.field}: {detail}",)
        raise
    return normal if isinstance(normal, dict) else {}


@lru_cache(maxsize=1000)
def _kept(text: str, rules: SchemaRules) -> Any:
    return normal_form(text, rules)
