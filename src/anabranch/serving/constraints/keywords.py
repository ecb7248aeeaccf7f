"""The keywords of JSON Schema that decide whether an instance is valid, by what they hold."""

from __future__ import annotations

ONE_SCHEMA = frozenset(
    {
        "additionalItems",
        "additionalProperties",
        "contains",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
SCHEMA_LIST = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SCHEMA_MAP = frozenset({"dependentSchemas", "patternProperties", "properties"})
PLAIN = frozenset(
    {
        "const",
        "dependentRequired",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maxContains",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minContains",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "pattern",
        "required",
        "type",
        "uniqueItems",
    }
)
REFERENCES = frozenset({"$dynamicRef", "$recursiveRef", "$ref"})
ASSERTIONS = ONE_SCHEMA | SCHEMA_LIST | SCHEMA_MAP | PLAIN | REFERENCES
"""Everything else is an annotation, which any validator ignores."""

IN_PLACE = frozenset({"allOf", "anyOf", "else", "if", "not", "oneOf", "then"})
"""Applied to the same instance as the schema that holds them."""

LIMITS = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
    ("minContains", "maxContains"),
    ("minimum", "maximum"),
)
