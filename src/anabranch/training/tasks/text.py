"""Language modelling on running text."""

from __future__ import annotations

from typing import ClassVar

from anabranch.training.conversation import text_of
from anabranch.training.task import Rendered, Row, Task


class Text(Task):
    """Running text; every token is learned, and an end token after each document."""

    name: ClassVar[str] = "text"
    schema = (("text",),)

    def render(self, row: Row) -> tuple[Rendered, ...]:
        """The text as it is, without white space around it."""
        self.shape_of(row)
        return (Rendered(text=text_of(row, "text")),)
