"""Which draft of JSON Schema a document is written in, and whether it is a schema at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from anabranch.errors import InvalidConstraint, MissingExtra, UnsupportedConstraint

_ADDRESS = re.compile(
    r"https?://json-schema\.org/(?:draft[-/](03|04|06|07|2019-09|2020-12)/)?schema#?"
)
LATEST = "2020-12"


def draft_of(schema: Mapping[str, Any] | bool, field: str) -> str:
    """``"2020-12"`` or what ``$schema`` names, by any of its usual spellings.

    Raises :class:`UnsupportedConstraint` for a dialect that nobody here knows: its keywords could
    mean anything.
    """
    address = schema.get("$schema", "") if isinstance(schema, Mapping) else ""
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if not address or (match and not match[1]):
        return LATEST
    if match is None or match[1] == "03":
        raise UnsupportedConstraint(
            field, f"#/$schema: {address!r} is none of the drafts 04, 06, 07, 2019-09 and 2020-12"
        )
    return match[1]


def validator_class(draft: str) -> Any:
    """The class of the jsonschema library that validates instances against this draft."""
    try:
        import jsonschema
    except ImportError as error:  # pragma: no cover - the default installation has it
        raise MissingExtra("jsonschema", "constraints") from error
    return {
        "04": jsonschema.Draft4Validator,
        "06": jsonschema.Draft6Validator,
        "07": jsonschema.Draft7Validator,
        "2019-09": jsonschema.Draft201909Validator,
        "2020-12": jsonschema.Draft202012Validator,
    }[draft]


def specification(draft: str) -> Any:
    """How references are resolved in this draft, for the referencing library."""
    from referencing import jsonschema

    return {
        "04": jsonschema.DRAFT4,
        "06": jsonschema.DRAFT6,
        "07": jsonschema.DRAFT7,
        "2019-09": jsonschema.DRAFT201909,
        "2020-12": jsonschema.DRAFT202012,
    }[draft]


def require_schema(schema: Any, draft: str, field: str) -> None:
    """Raise :class:`InvalidConstraint` with the pointer of the first thing that is no schema."""
    from jsonschema.exceptions import best_match

    cls = validator_class(draft)
    try:
        error = best_match(cls(cls.META_SCHEMA).iter_errors(schema))
    except RecursionError as deep:
        raise InvalidConstraint(field, "the schema is nested too deeply") from deep
    if error is not None:
        where = pointer(*error.absolute_path)
        raise InvalidConstraint(
            field, f"{where}: {error.message[:300]} (JSON Schema, draft {draft})"
        )


def pointer(*path: str | int) -> str:
    """``#/properties/a~1b``: a JSON pointer (RFC 6901) as the fragment of a URI."""
    return "#" + "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)
