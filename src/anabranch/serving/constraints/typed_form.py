"""Normal form in which every schema speaks of one type: for back-ends that look at ``type`` first.

``{"minLength": 2}`` also allows every number; such a back-end would drop the limit, or the numbers.
Each schema object becomes one of: a reference, an enumeration, ``anyOf``, or one ``type`` with the
keywords of that type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from anabranch.serving.constraints.possible import Schema

KEYWORDS_OF: dict[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_ALONE = ("$ref", "enum", "anyOf")
_ANY_TYPE = ("null", "boolean", "number", "string", "array", "object")


def typed_form(schema: Schema, pattern: Callable[[str], str]) -> Schema:
    """The typed form of a schema in normal form; ``pattern`` rewrites patterns."""
    if isinstance(schema, bool):
        return schema
    definitions = schema.get("$defs", {})
    typed = _typed({k: v for k, v in schema.items() if k != "$defs"}, pattern)
    if not definitions:
        return typed
    assert isinstance(typed, dict)
    return {**typed, "$defs": {name: _typed(each, pattern) for name, each in definitions.items()}}


def conflict(schema: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keyword, and why, that keeps a schema object from having a typed form."""
    for keyword in _ALONE:
        others = schema.keys() - {keyword, *(_ALONE[1:2] if keyword == "const" else ())}
        if keyword in schema and others:
            return keyword, f"not beside {', '.join(sorted(others))}"
    names = [*schema.get("properties", ()), *schema.get("required", ())]
    if escaped := next(
        (name for name in names if json.dumps(name, ensure_ascii=False)[1:-1] != name), None
    ):
        return "properties" if escaped in schema.get("properties", ()) else "required", (
            f"the name {escaped!r}, which JSON writes with an escape"
        )
    if len(schema.get("allOf", ())) > 1 or ("allOf" in schema and len(schema) > 1):
        return "allOf", "only one schema, and nothing beside it"
    return None


def _typed(schema: Schema, pattern: Callable[[str], str]) -> Schema:
    if isinstance(schema, bool):
        return schema
    if "allOf" in schema:
        return _typed(schema["allOf"][0], pattern)
    if "anyOf" in schema:
        return {"anyOf": [_typed(each, pattern) for each in schema["anyOf"]]}
    if "$ref" in schema or "enum" in schema:
        return schema
    declared = schema.get("type", _ANY_TYPE)
    types = [declared] if isinstance(declared, str) else list(declared)
    if "number" in types and "integer" in types:
        types.remove("integer")
    branches = [_of_type(kind, schema, pattern) for kind in types]
    return branches[0] if len(branches) == 1 else {"anyOf": branches}


def _of_type(kind: str, schema: Mapping[str, Any], pattern: Callable[[str], str]) -> Schema:
    typed: dict[str, Any] = {"type": kind}
    if kind == "object" and "required" in schema:
        # A name that only ``required`` knows would be forgotten.
        known = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        missing = {name: others for name in schema["required"] if name not in known}
        schema = {**schema, "properties": {**known, **missing}}
    for keyword in schema:
        if keyword not in KEYWORDS_OF[kind]:
            continue
        value = schema[keyword]
        if keyword in ("items", "additionalProperties"):
            value = _typed(value, pattern)
        elif keyword == "prefixItems":
            value = [_typed(each, pattern) for each in value]
        elif keyword == "properties":
            value = {name: _typed(each, pattern) for name, each in value.items()}
        elif keyword == "pattern":
            value = pattern(value)
        typed[keyword] = value
    return typed
