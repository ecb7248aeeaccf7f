"""The kinds of field that all requests are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Unsupported = Annotated[None, Field(description="Not supported here: only null is accepted.")]

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
"""OpenAI's names of functions and schemas."""
JsonSchema = Annotated[dict[str, Any], Field(description="JSON Schema, Draft 2020-12.")]


class Strict(BaseModel):
    """Unknown fields are refused and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A piece of a message. Images, audio and files are refused."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[TextPart], Field(min_length=1)],
    Field(description="Text, or text parts, which are joined without a separator."),
]


def joined(content: str | list[TextPart]) -> str:
    """The text of a content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
