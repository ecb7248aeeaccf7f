"""Whether an answer is valid, by the jsonschema library with formats, in exact arithmetic."""

from __future__ import annotations

import decimal
import json
import re
from decimal import Decimal
from typing import Any

from anabranch.serving.constraints.drafts import draft_of, validator_class

_PRECISION = 2000
"""Digits: enough for the remainder of the largest double by the smallest."""


class Undecided(Exception):
    """The validator cannot say whether this is valid."""


class Judge:
    """Validates texts against one schema, in the draft that it names.

    Numbers are decimal as they are written: 1131.12 is a multiple of 0.01, which is not so in
    binary floating point.
    """

    def __init__(self, schema: dict[str, Any] | bool) -> None:
        import jsonschema

        cls = validator_class(draft_of(schema, "schema"))
        checker = cls.TYPE_CHECKER
        if cls is not jsonschema.Draft4Validator:  # there 1.0 is no integer
            checker = checker.redefine("integer", _is_integer)
        cls = jsonschema.validators.extend(cls, type_checker=checker)
        exact = _parse(json.dumps(schema))
        self._validator = cls(exact, format_checker=cls.FORMAT_CHECKER)

    def error(self, text: str) -> str | None:
        """Why a text is no valid instance; None if it is one. Raises :class:`Undecided`."""
        try:
            instance = _parse(text)
        except ValueError as error:
            return f"not JSON: {error}"
        except decimal.InvalidOperation as error:
            raise Undecided("a number has an exponent of twenty digits") from error
        try:
            with decimal.localcontext(prec=_PRECISION):
                found = next(self._validator.iter_errors(instance), None)
        except re.error as error:
            raise Undecided(f"a pattern is not Python's: {error}") from error
        except decimal.InvalidOperation as error:
            raise Undecided("a number is too large to be divided") from error
        return None if found is None else f"{found.validator}: {found.message}"


def _parse(text: str) -> Any:
    return json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _is_integer(checker: Any, instance: Any) -> bool:
    if isinstance(instance, Decimal):
        return instance == instance.to_integral_value()
    return isinstance(instance, int) and not isinstance(instance, bool)
