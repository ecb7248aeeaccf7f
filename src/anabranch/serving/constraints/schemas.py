"""Constraints that are schemas or patterns in the end: objects, choices, regular expressions."""

from __future__ import annotations

import json

from anabranch.errors import InvalidConstraint, UnsatisfiableConstraint
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints.normal_form import FIELD
from anabranch.serving.constraints.patterns import literal_pattern, portable_pattern

ANY_OBJECT = json.dumps({"type": "object"})


def schema_text(constraint: OutputConstraint) -> str:
    """The schema of a ``json_object`` or ``json_schema`` constraint."""
    return ANY_OBJECT if constraint.kind == "json_object" else constraint.text


def pattern_text(constraint: OutputConstraint) -> str:
    """The pattern of a ``regex`` or ``choice`` constraint, in the common dialect."""
    if constraint.kind == "regex":
        return portable_pattern(constraint.text, FIELD)
    return "|".join(map(literal_pattern, choices(constraint.text)))


def choices(text: str) -> list[str]:
    """The strings of a ``choice`` constraint, each once.

    Raises :class:`InvalidConstraint` unless it is a list of strings, and
    :class:`UnsatisfiableConstraint` if it is empty.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise InvalidConstraint(FIELD, f"the choices are not JSON: {error}") from error
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise InvalidConstraint(FIELD, "the choices must be a list of strings")
    if not options:
        raise UnsatisfiableConstraint(FIELD, "the list of choices is empty")
    for option in options:
        try:
            option.encode()
        except UnicodeEncodeError as error:
            raise InvalidConstraint(FIELD, f"the choice {option!r} is no text: {error}") from error
    return list(dict.fromkeys(options))
