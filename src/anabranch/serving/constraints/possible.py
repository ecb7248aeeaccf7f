"""Which schemas have any instance: the rest become ``false``, so that no answer runs into them.

A least fixed point over the definitions: at first no definition is known to have an instance, and
one is found to have one as soon as what it requires has. A list that must contain itself never
gets there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anabranch.errors import InvalidConstraint, UnsatisfiableConstraint
from anabranch.serving.constraints.keywords import IN_PLACE, ONE_SCHEMA, SCHEMA_LIST, SCHEMA_MAP

Schema = dict[str, Any] | bool

_FIELD = "response_format"
_TYPES = frozenset({"null", "boolean", "object", "array", "number", "string", "integer"})
_LIMITS = (
    ("minLength", "maxLength", {"string"}),
    ("minItems", "maxItems", {"array"}),
    ("minProperties", "maxProperties", {"object"}),
    ("minimum", "maximum", {"number", "integer"}),
)


def without_impossible(root: Schema) -> Schema:
    """A schema in normal form with ``false`` for subschemas that have no instance.

    Raises :class:`UnsatisfiableConstraint` if that is all of it, and :class:`InvalidConstraint`
    if deciding about an instance leads back to the same question.
    """
    definitions = root.get("$defs", {}) if isinstance(root, dict) else {}
    _refuse_circles(definitions)
    known: set[str] = set()
    while True:
        more = {name for name in definitions if _possible(definitions[name], known)}
        if more == known:
            break
        known = more
    if not _possible(root, known):
        raise UnsatisfiableConstraint(_FIELD, "no JSON value at all satisfies the schema")
    return _pruned(root, known)


def _possible(schema: Schema, known: set[str]) -> bool:
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in known:
        return False
    if "enum" in schema:
        return bool(schema["enum"])
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(_possible(each, known) for each in schema[keyword]):
            return False
    if not all(_possible(each, known) for each in schema.get("allOf", ())):
        return False
    declared = schema.get("type", _TYPES)
    types = {declared} if isinstance(declared, str) else set(declared)
    for least, most, of in _LIMITS:
        if schema.get(least, 0) > schema.get(most, schema.get(least, 0)):
            types -= of
    properties = schema.get("properties", {})
    if not all(_possible(properties.get(name, True), known) for name in schema.get("required", ())):
        types.discard("object")
    first = schema.get("prefixItems", ())[: schema.get("minItems", 0)]
    if schema.get("minItems", 0) > len(first):
        first = [*first, schema.get("items", True)]
    if not all(_possible(item, known) for item in first):
        types.discard("array")
    return bool(types)


def _pruned(schema: Schema, known: set[str]) -> Schema:
    if not isinstance(schema, dict):
        return schema
    pruned: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword == "$defs":
            value = {name: each for name, each in value.items() if name in known}
        if keyword in ONE_SCHEMA:
            pruned[keyword] = _kept(value, known)
        elif keyword in ("anyOf", "oneOf"):
            kept = [_kept(each, known) for each in value]
            pruned[keyword] = [each for each in kept if each is not False]
        elif keyword in SCHEMA_LIST:
            pruned[keyword] = [_kept(each, known) for each in value]
        elif keyword in SCHEMA_MAP or keyword == "$defs":
            pruned[keyword] = {name: _kept(each, known) for name, each in value.items()}
        else:
            pruned[keyword] = value
    return pruned


def _kept(schema: Schema, known: set[str]) -> Schema:
    return _pruned(schema, known) if _possible(schema, known) else False


def _refuse_circles(definitions: Mapping[str, Schema]) -> None:
    """Raise if a definition applies itself to the same instance."""
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise InvalidConstraint(
                _FIELD,
                f"{' -> '.join((*above, name))}: the schema refers to itself without progress",
            )
        if name not in done:
            for inner in _applied_in_place(definitions[name]):
                visit(inner, (*above, name))
            done.add(name)

    for name in definitions:
        visit(name, ())


def _applied_in_place(schema: Schema) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for keyword in IN_PLACE & schema.keys():
        value = schema[keyword]
        for each in value if isinstance(value, list) else [value]:
            yield from _applied_in_place(each)
    for each in schema.get("dependentSchemas", {}).values():
        yield from _applied_in_place(each)
