"""One schema object of any draft, said in the keywords of Draft 2020-12 and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anabranch.serving.constraints.keywords import ASSERTIONS

_SAYS_NOTHING: dict[str, tuple[Any, ...]] = {
    "additionalProperties": (True, {}),
    "allOf": ([],),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "items": (True, {}),
    "minItems": (0,),
    "minLength": (0,),
    "minProperties": (0,),
    "not": (False,),
    "patternProperties": ({},),
    "prefixItems": ([],),
    "propertyNames": (True, {}),
    "properties": ({},),
    "required": ([],),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}


def modern(schema: Mapping[str, Any], draft: str) -> dict[str, Any]:
    """The assertions of a schema object, without those that say nothing; order is kept.

    Subschemas are left as they are.
    """
    if draft in ("04", "06", "07") and "$ref" in schema:
        return {"$ref": schema["$ref"]}  # those drafts ignore what stands beside it
    known = {keyword: _whole(value) for keyword, value in schema.items()}
    _array_items(known, draft)
    _exclusive_bounds(known)
    _dependencies(known)
    _conditions(known)
    if known.get("maxItems", 2) <= 1:
        known.pop("uniqueItems", None)
    if "contains" not in known:
        known.pop("minContains", None)
        known.pop("maxContains", None)
    return {
        keyword: value
        for keyword, value in known.items()
        if keyword in ASSERTIONS and not _says_nothing(keyword, value)
    }


def _whole(value: Any) -> Any:
    """2.0 is an integer in JSON Schema, and counts are integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _array_items(known: dict[str, Any], draft: str) -> None:
    """Until 2019-09 ``items`` may be a list, and ``additionalItems`` what comes after it."""
    rest = known.pop("additionalItems", True)
    if draft != "2020-12" and isinstance(known.get("items"), list):
        known["prefixItems"] = known.pop("items")
        known["items"] = rest


def _exclusive_bounds(known: dict[str, Any]) -> None:
    """In draft 04 an exclusive bound is a flag beside the bound."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(known.get(exclusive), bool) and known.pop(exclusive) and bound in known:
            known[exclusive] = known.pop(bound)


def _dependencies(known: dict[str, Any]) -> None:
    """Until draft 07 one keyword; it is still understood."""
    for name, needed in known.pop("dependencies", {}).items():
        keyword = "dependentRequired" if isinstance(needed, list) else "dependentSchemas"
        known[keyword] = {**known.get(keyword, {}), name: needed}


def _conditions(known: dict[str, Any]) -> None:
    if "if" not in known:
        known.pop("then", None)
        known.pop("else", None)
    elif "then" not in known and "else" not in known:
        del known["if"]


def _says_nothing(keyword: str, value: Any) -> bool:
    # JSON's true and 1 are different, Python's are equal.
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        for nothing in _SAYS_NOTHING.get(keyword, ())
    )
