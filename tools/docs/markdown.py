"""Tables and cells of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`~?(?:[^`<]*<)?([^`>]+)>?`")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a blank line behind it; nothing if there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *([cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def cell(text: str) -> str:
    """A text as one cell: one line, and bars that do not end it."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """A text in the typewriter face; empty stays empty."""
    return f"`{text}`" if text else ""


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring as one line of Markdown."""
    return plain(" ".join((text or "").strip().split("\n\n")[0].split()))


def plain(text: str) -> str:
    """A docstring in reStructuredText as Markdown: roles become code, ``::`` a colon.

    A role's target keeps its last name only: ``anabranch.errors.QueueFull`` is ``QueueFull``.
    """
    text = _ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    return re.sub(r"^::$|(?<=\S)::$", lambda end: "" if _alone(end) else ":", text, flags=re.M)


def _alone(match: re.Match[str]) -> bool:
    return match.start() == 0 or match.string[match.start() - 1] == "\n"
