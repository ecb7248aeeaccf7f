"""What clients may send about tools: functions, the choice among them, calls and results."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from anabranch.api.fields import JsonSchema, Name, Strict, Text

MAX_TOOLS = 128


class FunctionDefinition(Strict):
    """A function that the model may call; the client runs it."""

    name: Name
    description: str | None = None
    parameters: JsonSchema | None = Field(
        None, description="The schema of one object with all arguments; absent: no arguments."
    )
    strict: bool | None = Field(
        None,
        description="true: arguments always validate, or the request is refused with the keyword "
        "that cannot be enforced. Otherwise such a schema leaves the arguments any JSON object.",
    )

    def schema_of_arguments(self) -> dict[str, Any]:
        """``parameters`` as the schema of an object."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", "properties": {}, **self.parameters}


class FunctionTool(Strict):
    """The only kind of tool."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it."""
        shown = {
            "name": self.function.name,
            "description": self.function.description or "",  # some templates cannot do without
            "parameters": self.function.schema_of_arguments(),
        }
        return {"type": "function", "function": shown}


class FunctionName(Strict):
    """A function by its name."""

    name: Name


class NamedFunction(Strict):
    """Call this function, once."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedFunction


class CalledFunction(Strict):
    """A function and the JSON text of its arguments, as the model wrote it."""

    name: Text
    arguments: str
    parsed_arguments: Any = Field(
        None, description="Accepted; what OpenAI's client made of the arguments."
    )


class Call(Strict):
    """A call of an earlier answer."""

    id: Text
    type: Literal["function"]
    function: CalledFunction
