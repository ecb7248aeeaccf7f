"""What an answer must look like: ``response_format`` and the extension ``constraint``.

Both become an :class:`~anabranch.models.constraint.OutputConstraint`. Whether a model can honour it
shows when it is admitted, before any response exists; its refusal gets the name of the field that
the client sent.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from anabranch.api.fields import JsonSchema, Name, Strict, Text
from anabranch.errors import (
    ConstraintTooComplex,
    InvalidConstraint,
    InvalidRequest,
    UnsatisfiableConstraint,
    UnsupportedConstraint,
)
from anabranch.models.constraint import OutputConstraint
from anabranch.models.protocol import Generation


class PlainText(Strict):
    """Any text."""

    type: Literal["text"]


class AnyObject(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """The schema of OpenAI's structured outputs."""

    name: Name
    description: str | None = Field(None, description="Accepted; not shown to the model.")
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = Field(
        None, description="Accepted; the schema is enforced, or refused, either way."
    )


class SchemaFormat(Strict):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainText | AnyObject | SchemaFormat, Field(discriminator="type")]


class SchemaConstraint(Strict):
    """JSON that validates against a schema."""

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")


class RegexConstraint(Strict):
    """Text that a regular expression matches from beginning to end."""

    type: Literal["regex"]
    pattern: Text


class GrammarConstraint(Strict):
    """Text of a context-free grammar."""

    type: Literal["grammar"]
    grammar: Text = Field(description="EBNF in Lark's notation; the first rule is `start`.")


class ChoiceConstraint(Strict):
    """One of several strings."""

    type: Literal["choice"]
    choices: list[Text] = Field(min_length=1, max_length=10_000)


AnyConstraint = (
    SchemaConstraint | RegexConstraint | GrammarConstraint | ChoiceConstraint | AnyObject
)
Constraint = Annotated[AnyConstraint, Field(discriminator="type")]

_REFUSALS = (
    InvalidConstraint,
    UnsupportedConstraint,
    UnsatisfiableConstraint,
    ConstraintTooComplex,
)


@dataclass(frozen=True)
class Guidance:
    """A constraint, and the field of the request that it comes from.

    ``otherwise`` is tried if the model does not support the constraint. A constraint of None is
    none.
    """

    field: str
    constraint: OutputConstraint | None
    otherwise: Guidance | None = None

    @property
    def name(self) -> str:
        """The request's own field, without what is inside it."""
        return re.split(r"[.\[]", self.field)[0]

    def after(self, refusal: InvalidConstraint) -> Guidance | None:
        """What to try after the model's refusal, or None if it is final."""
        supported = not isinstance(refusal, UnsupportedConstraint | ConstraintTooComplex)
        return None if supported else self.otherwise

    def located(self, refusal: InvalidConstraint) -> InvalidConstraint:
        """The refusal at the client's field; where in a schema it is remains in the message."""
        # A model does not know the field and calls it by OpenAI's name.
        place = "" if refusal.field == "response_format" else f"{refusal.field}: "
        return relocated(refusal, self.field, place)


def guidance(
    response_format: PlainText | AnyObject | SchemaFormat | None,
    constraint: AnyConstraint | None,
    tools: Guidance | None = None,
    *,
    ignore_eos: bool,
) -> Guidance:
    """What the request asks for. Raises :class:`InvalidRequest` if it asks for two things."""
    found = (tools, _of_format(response_format), _of_constraint(constraint))
    given = [each for each in found if each is not None]
    if len(given) > 1:
        raise InvalidRequest(given[1].name, f"cannot be combined with {given[0].name}; give one")
    if given and ignore_eos:
        raise InvalidRequest("ignore_eos", f"cannot be combined with {given[0].name}")
    return given[0] if given else Guidance("", None)


async def admit(
    start: Callable[[OutputConstraint | None], Awaitable[Generation]], asked: Guidance
) -> Generation:
    """Start a generation under the best constraint that the model supports."""
    while True:
        try:
            return await start(asked.constraint)
        except InvalidConstraint as refusal:
            following = asked.after(refusal)
            if following is None:
                raise asked.located(refusal) from refusal
            asked = following


def schema_constraint(schema: dict[str, Any], field: str) -> OutputConstraint:
    """A schema as a constraint. Raises :class:`InvalidRequest` if it is nested too deeply."""
    try:
        return OutputConstraint.json_schema(schema)
    except RecursionError:
        raise InvalidRequest(field, "is nested too deeply") from None


def relocated(refusal: InvalidConstraint, field: str, place: str = "") -> InvalidConstraint:
    """The same refusal at another field; ``place`` is put before what it says."""
    kind = next(cls for cls in type(refusal).__mro__ if cls in _REFUSALS)
    return kind(field, place + str(refusal).removeprefix(f"{refusal.field}: "))


def _of_format(asked: PlainText | AnyObject | SchemaFormat | None) -> Guidance | None:
    match asked:
        case AnyObject():
            return Guidance("response_format", OutputConstraint.json_object())
        case SchemaFormat(json_schema=named):
            field = "response_format.json_schema.schema"
            return Guidance(field, schema_constraint(named.schema_, field))
        case _:
            return None


def _of_constraint(asked: AnyConstraint | None) -> Guidance | None:
    match asked:
        case SchemaConstraint(schema_=schema):
            field = "constraint.schema"
            return Guidance(field, schema_constraint(schema, field))
        case RegexConstraint(pattern=pattern):
            return Guidance("constraint.pattern", OutputConstraint.regex(pattern))
        case GrammarConstraint(grammar=source):
            return Guidance("constraint.grammar", OutputConstraint.grammar(source))
        case ChoiceConstraint(choices=choices):
            return Guidance("constraint.choices", OutputConstraint.choice(choices))
        case AnyObject():
            return Guidance("constraint", OutputConstraint.json_object())
        case None:
            return None
