"""From a request's tools to what the model is shown and what it may answer.

=============  ======================================================  ==========================
tool_choice    the answer                                              arguments
=============  ======================================================  ==========================
``none``       text; the functions are not shown to the model          --
``auto``       text, calls, or text and then calls                     by the schemas
``required``   one call, or several                                    by the schemas
a function     one call of it                                          by its schema
=============  ======================================================  ==========================

A schema that the back-end cannot enforce is refused if the function is ``strict``, as OpenAI does.
Otherwise this function's arguments are any JSON object, and the client validates them, as OpenAI
advises. If the back-end has no such grammars at all, ``auto`` goes on without any constraint: calls
are then read from the text that the model writes of its own accord.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from anabranch.api.guidance import Guidance, relocated, schema_constraint
from anabranch.api.tools.grammar import calls_grammar, function_of_rule
from anabranch.api.tools.reader import CallReader
from anabranch.api.tools.schemas import FunctionDefinition, FunctionTool, NamedFunction, ToolChoice
from anabranch.errors import (
    ConstraintTooComplex,
    InvalidConstraint,
    InvalidRequest,
    UnsupportedConstraint,
    did_you_mean,
)
from anabranch.models.constraint import OutputConstraint
from anabranch.models.tools import CALL_OPEN

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class CallPlan:
    """How functions are offered and their calls read.

    ``tools`` go to the chat template. ``opening`` is how the answer begins: a forced call's head
    is not generated, so ``forced`` names the function whose arguments the model writes at once.
    """

    tools: tuple[dict[str, Any], ...]
    guidance: Guidance
    opening: str = ""
    forced: str | None = None

    def reader(self) -> CallReader:
        """A reader for one choice."""
        return CallReader({tool["function"]["name"] for tool in self.tools}, self.forced)


def plan(
    tools: Sequence[FunctionTool] | None, choice: ToolChoice | None, parallel: bool
) -> CallPlan | None:
    """The plan, or None if nothing can be called. Raises :class:`InvalidRequest`."""
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice", "needs tools to choose from")
        return None
    _check(tools)
    if choice == "none":
        return None
    if isinstance(choice, NamedFunction):
        index = _index(tools, choice.function.name)
        return _forced(tools, index)
    if choice == "required" and len(tools) == 1 and not parallel:
        return _forced(tools, 0)
    functions = tuple(tool.function for tool in tools)
    shown = tuple(tool.for_template() for tool in tools)
    return CallPlan(shown, CallGuidance.of(functions, choice != "required", parallel))


@dataclass(frozen=True)
class CallGuidance(Guidance):
    """The grammar of calls. ``loose`` functions have arguments that are any object."""

    functions: tuple[FunctionDefinition, ...] = ()
    loose: frozenset[int] = frozenset()
    text: bool = True
    several: bool = True

    @classmethod
    def of(
        cls,
        functions: tuple[FunctionDefinition, ...],
        text: bool,
        several: bool,
        loose: frozenset[int] = frozenset(),
    ) -> CallGuidance:
        """The guidance whose constraint is the grammar of these functions."""
        pairs = [
            (function.name, ANY_OBJECT if i in loose else function.schema_of_arguments())
            for i, function in enumerate(functions)
        ]
        try:
            grammar = calls_grammar(pairs, text=text, several=several)
        except RecursionError:
            raise InvalidRequest("tools", "a schema is nested too deeply") from None
        constraint = OutputConstraint.grammar(grammar)
        return cls("tools", constraint, None, functions, loose, text, several)

    def after(self, refusal: InvalidConstraint) -> Guidance | None:
        """A grammar that asks for less, if the functions allow it."""
        if self.constraint is None:
            return None
        lax = frozenset(i for i, function in enumerate(self.functions) if not function.strict)
        index = function_of_rule(refusal.field)
        if index is not None:
            unsupported = isinstance(refusal, UnsupportedConstraint | ConstraintTooComplex)
            may_be_any = unsupported and index in lax - self.loose
            return self._with(self.loose | {index}) if may_be_any else None
        # The grammar is ours: whatever is wrong with it is beyond the back-end.
        if self.loose != lax:
            return self._with(lax)
        # Without a constraint nothing would keep the model to one call, or to a schema.
        free = self.text and self.several and len(lax) == len(self.functions)
        return replace(self, constraint=None) if free else None

    def located(self, refusal: InvalidConstraint) -> InvalidConstraint:
        """The refusal at the function whose schema it is about, if it is about one."""
        index = function_of_rule(refusal.field)
        if index is None:
            return super().located(refusal)
        return relocated(refusal, f"tools[{index}].function.parameters")

    def _with(self, loose: frozenset[int]) -> CallGuidance:
        return CallGuidance.of(self.functions, self.text, self.several, loose)


def _forced(tools: Sequence[FunctionTool], index: int) -> CallPlan:
    function = tools[index].function
    field = f"tools[{index}].function.parameters"
    schema = schema_constraint(function.schema_of_arguments(), field)
    otherwise = None if function.strict else Guidance(field, OutputConstraint.json_object())
    return CallPlan(
        tuple(tool.for_template() for tool in tools),
        Guidance(field, schema, otherwise),
        f'{CALL_OPEN}\n{{"name": "{function.name}", "arguments":',
        function.name,
    )


def _check(tools: Sequence[FunctionTool]) -> None:
    first: dict[str, int] = {}
    for i, tool in enumerate(tools):
        name = tool.function.name
        if name in first:
            raise InvalidRequest(
                f"tools[{i}].function.name", f"{name!r} is the name of tools[{first[name]}] too"
            )
        first[name] = i
        kind = tool.function.schema_of_arguments()["type"]
        if kind != "object":
            raise InvalidRequest(
                f"tools[{i}].function.parameters.type",
                f'must be "object", since arguments have names, not {str(kind)[:80]!r}',
            )


def _index(tools: Sequence[FunctionTool], name: str) -> int:
    names = [tool.function.name for tool in tools]
    if name not in names:
        raise InvalidRequest(
            "tool_choice.function.name",
            f"{name!r} is not among the tools{did_you_mean(name, names)}",
        )
    return names.index(name)
